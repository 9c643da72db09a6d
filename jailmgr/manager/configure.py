"""Change a jail's configuration, at once where the kernel allows it, and its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack

import msgspec

from jailmgr.errors import JailmgrError, full_name
from jailmgr.keys import DEVICES, FIXED, SHORT, TYPES, check_name, find_key, fold, is_live
from jailmgr.manager import networks, shaping
from jailmgr.manager.access import check_root_only
from jailmgr.manager.admission import admit, check_restricted
from jailmgr.manager.create import render_files
from jailmgr.manager.files import replace_files
from jailmgr.manager.host import Manager
from jailmgr.manager.kept import renew as renew_kept
from jailmgr.manager.nodes import check_nodes
from jailmgr.manager.plan import disk_of, kernel_limits, write_bundle
from jailmgr.manager.ports import check_ports, ports_of
from jailmgr.manager.running import is_up, running
from jailmgr.manager.strangers import check_free
from jailmgr.model import Jail
from jailmgr.network.shaping import rates_of_jail
from jailmgr.runtime import cgroups
from jailmgr.storage.volume import rename_volume, resize_volume
from jailmgr.store import RENAMING, Row

ConfigChanges = Mapping[str, str | None]
DeviceChanges = Mapping[str, Mapping[str, str | None] | None]


def configure(
    m: Manager, tenant: str, name: str, config: ConfigChanges, devices: DeviceChanges, *, root: bool = True
) -> list[str]:
    """Set keys, and unset those given as None; of a running jail too. Returns the keys that wait for its next start.

    `root`: the host's root asks for it, and not a user of the tenant's.

    Raises JailmgrError, with nothing changed: `missing` (also a device of the host), `invalid`, `exists` (a host port
    or address), `full` (less disk than is used), `conflict` (less memory than is used; another network or address while
    it runs), `denied` (restricted, or only for root).
    """
    with m.jail(tenant, name) as old:
        new = changed(old, config, devices)
        up, runs = is_up(m, old), running(m, old)
        if not root:
            check_root_only(new, old)
        _check(m, old, new, up)
        with m.tenant(tenant), ExitStack() as undo:
            _apply_limits(m, old, new, runs, undo)
            moves = _nic(old) != _nic(new)
            if moves:
                networks.leave(m, old)
            with m.store.transaction():
                m.store.update(new)
                m.store.set_ports(new, ports_of(new))
                admit(m, new, old)
                if moves:
                    new = msgspec.structs.replace(new, nics=networks.assign_nics(m, new, new.devices))
            if moves:
                undo.callback(networks.refresh_names_of, m, old, new)
            undo.callback(_put_back, m, old, moves)
            write = write_bundle if up else renew_kept
            undo.callback(write, m, old)
            write(m, new)
            _apply_ports(m, old, new, runs, undo)
            if rates_of_jail(old) != rates_of_jail(new):
                undo.callback(shaping.apply, m, old)
                shaping.apply(m, new)
            if moves:
                networks.refresh_names_of(m, old, new)
            if networks.connections_of(old) != networks.connections_of(new):
                undo.callback(networks.limit_connections, m, old)
                networks.limit_connections(m, new)
            undo.pop_all()
    return waiting(old, new) if runs else []


def changed(jail: Jail, config: ConfigChanges, devices: DeviceChanges) -> Jail:
    """The jail as it would be, checked. JailmgrError `invalid`."""
    values = dict(jail.config)
    places = {name: dict(device) for name, device in jail.devices.items()}
    for key, value in config.items():
        find_key(key)
        if key in SHORT:
            device, of_device, _ = SHORT[key]
            _merge(places.setdefault(device, {"type": FIXED[device]}), {of_device: value})
        elif value is None:
            values.pop(key, None)
        else:
            values[key] = value
    for name, changes in devices.items():
        if changes is None:
            places.pop(name, None)
        else:
            _merge(places.setdefault(name, {}), changes)
    folded, placed = fold(values, places)
    return msgspec.structs.replace(jail, config=folded, devices=placed)


def _merge(device: dict[str, str], changes: Mapping[str, str | None]) -> None:
    for key, value in changes.items():
        if value is None:
            device.pop(key, None)
        else:
            device[key] = value


def waiting(old: Jail, new: Jail) -> list[str]:
    """Keys that differ and that a running jail doesn't take at once, and devices of which that is true."""
    keys = {key for key in old.config.keys() | new.config.keys() if old.config.get(key) != new.config.get(key)}
    devices = {
        name
        for name in old.devices.keys() | new.devices.keys()
        for device in (old.devices.get(name), new.devices.get(name))
        if old.devices.get(name) != new.devices.get(name) and device and TYPES[device["type"]].waits
    }
    return sorted(key for key in keys if not is_live(key)) + sorted(devices)


def _nic(jail: Jail) -> dict[str, str]:
    """Of its NIC, what can't be changed while it runs."""
    keys = DEVICES["nic"]
    return {key: value for key, value in jail.devices.get("eth0", {}).items() if key in keys and not keys[key].live}


def _check(m: Manager, old: Jail, new: Jail, runs: bool) -> None:
    check_ports(m, new, but=ports_of(old))
    check_restricted(m, new, old)
    check_nodes(new, old)
    cgroups.check_limits(m.hierarchies, m.root.jail_cgroup(old.tenant, old.name), kernel_limits(m, new))
    if _nic(old) == _nic(new):
        return
    if runs:
        raise JailmgrError(
            f"jail {old.full_name}",
            "its network can't be changed while it runs",
            f"Stop it: jailmgr stop {old.full_name}",
            "conflict",
        )
    device = _nic(new)
    network = device.get("network", networks.DEFAULT)
    networks.check_network(m, old.tenant, network)
    if wanted := device.get("ipv4.address"):
        networks.check_address(m, old.tenant, network, wanted, but=old)


def _apply_limits(m: Manager, old: Jail, new: Jail, runs: bool, undo: ExitStack) -> None:
    was, wanted = disk_of(old.devices), disk_of(new.devices)
    if was != wanted:
        undo.callback(resize_volume, m.pool, old.id, was)
        resize_volume(m.pool, old.id, wanted)
    before, after = kernel_limits(m, old), kernel_limits(m, new)
    if runs:
        after = after._replace(cpus=m.pins.choose(new))
    if runs and before != after:
        cgroup = m.root.jail_cgroup(old.tenant, old.name)
        undo.callback(cgroups.set_limits, m.hierarchies, cgroup, cgroups.Limits(*before))
        cgroups.set_limits(m.hierarchies, cgroup, cgroups.Limits(*after))


def _apply_ports(m: Manager, old: Jail, new: Jail, runs: bool, undo: ExitStack) -> None:
    """Publish and unpublish what differs. A jail that has just ended may still have ports on the host."""
    before, after = ports_of(old), ports_of(new)
    with m.network_lock:
        for port in before if runs else networks.ports_left(m, old):
            if port not in after:
                if runs:
                    undo.callback(networks.publish_port, m, old, port)
                networks.unpublish_port(m, old, port)
        for port in after if runs else ():
            if port not in before:
                networks.publish_port(m, new, port)
                undo.callback(networks.unpublish_port, m, new, port)
    gone = [port for port in before if port not in after]
    if gone and not runs:
        # Now, and not with those of others that have ended: once the jail runs again, flows of these ports are its own.
        networks.end_flows_to(m, old, gone)


def _put_back(m: Manager, old: Jail, moved: bool) -> None:
    with m.store.transaction():
        m.store.update(old)
        m.store.set_ports(old, ports_of(old))
        if moved:
            networks.keep_nics(m, old)


def rename(m: Manager, tenant: str, name: str, new: str) -> None:
    """Give a stopped jail another name. JailmgrError `missing`, `invalid`, `exists`, `conflict` where it runs.

    A crash leaves it `renaming`, and the next start goes on.
    """
    check_name(new)
    with m.jail(tenant, name) as jail:
        if new == name:
            return
        if is_up(m, jail):
            why = "it is running" if running(m, jail) else "it is about to be started again"
            raise JailmgrError(
                f"jail {full_name(tenant, name)}",
                why,
                f"Stop it first: jailmgr stop {full_name(tenant, name)}",
                "conflict",
            )
        with m.store.transaction():
            if m.store.name_taken(tenant, new):
                raise JailmgrError(f"jail {full_name(tenant, new)}", "already exists", "Choose another name.", "exists")
            check_free(m, tenant, new)
            m.store.set_state(jail, RENAMING, new)
        finish_rename(m, Row(jail, RENAMING, new))


def finish_rename(m: Manager, row: Row) -> None:
    """Carry out what a row in state `renaming` announces. Idempotent.

    Raises JailmgrError: `conflict` where a name is by now that of a jail that the store does not know.
    """
    old, name = row.jail, row.next or row.jail.name
    m.check_known(old.tenant, old.name)
    m.check_known(old.tenant, name)
    new = msgspec.structs.replace(old, name=name)
    if os.path.isdir(m.root.volume(old.tenant, old.name)):
        rename_volume(m.pool, old.tenant, old.name, name)
    lib = m.root.jail_lib(old.tenant, old.name)
    if os.path.isdir(lib):
        os.rename(lib, m.root.jail_lib(old.tenant, name))
    cgroups.remove(m.hierarchies, m.root.jail_cgroup(old.tenant, old.name))
    image = m.store.find_image(old.image)
    if image is not None:
        upper = f"{m.root.volume(old.tenant, name)}/upper"
        replace_files(upper, render_files(m, old, image), render_files(m, new, image))
        write_bundle(m, new, stopped=True)
    m.store.set_name(old, name)
    networks.refresh_names_of(m, old)
