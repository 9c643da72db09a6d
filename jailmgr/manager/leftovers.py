"""What a crash left behind: things of ours on the host that belong to no jail that runs and to no row of the store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial

import msgspec

from jailmgr.config import Root
from jailmgr.manager import lxcfs
from jailmgr.manager.host import BUILD_TENANT, Manager
from jailmgr.network import bridge, dns, firewall, shaping
from jailmgr.runtime import cgroups, netlink
from jailmgr.runtime.shaping import DIRECTIONS
from jailmgr.runtime.state import engine_runs, jails_up, load_state, read_state, remove_state, running_jails, waits
from jailmgr.storage.pool import is_open, open_pool
from jailmgr.storage.volume import delete_volume, half_deleted, list_builds, list_volumes
from jailmgr.store import READY, Store


class Leftover(msgspec.Struct, frozen=True):
    """Something of ours that nothing needs. `remove` is None where opening and closing the instance takes it away."""

    what: str
    remove: Callable[[], object] | None = None


def find_leftovers(root: Root) -> list[Leftover]:
    """All of them. With an engine running, what it may be about to make or remove is not counted.

    Raises JailmgrError where the store can't be read: then nothing can be told from what is in use.
    """
    store = Store(root.store)
    if not os.path.exists(root.store):
        return [*_of_host(root, store, set())]
    store.open_to_read()
    try:
        alive = {
            (tenant, jail)
            for tenant in _tenants(root)
            for jail in jails_up(root, tenant)
            if waits(root, tenant, jail) or read_state(root, tenant, jail)
        }
        found = [*_of_host(root, store, alive), *_of_disk(root, store)]
        if not engine_runs(root):
            found += [
                Leftover(f"jail {row.jail.tenant}/{row.jail.name}, whose row says {row.state}")
                for row in store.rows()
                if row.state != READY
            ]
        return found
    finally:
        store.close()


def fix(root: Root) -> list[str]:
    """Remove the leftovers; a line for each. Raises JailmgrError."""
    found = find_leftovers(root)
    for leftover in found:
        if leftover.remove is not None:
            leftover.remove()
    if not engine_runs(root) and os.path.exists(root.store):
        m = Manager(root)
        m.open()
        m.close()
    return [leftover.what for leftover in found]


def _tenants(root: Root) -> list[str]:
    return os.listdir(f"{root.run}/tenants") if os.path.isdir(f"{root.run}/tenants") else []


def _of_host(root: Root, store: Store, alive: set[tuple[str, str]]) -> Iterator[Leftover]:
    engine = engine_runs(root)
    rows = {(row.jail.tenant, row.jail.name): row.jail for row in store.rows()} if os.path.exists(root.store) else {}
    networks = {network.id: network for network in store.networks()} if rows else {}
    idle = not alive and not engine
    # Between a jail's start and its state file there are milliseconds; an engine at work knows its own.
    needed = {nic.veth for key, jail in rows.items() for nic in jail.nics if key in alive or engine}
    for veth in bridge.list_veths(root):
        if veth not in needed:
            yield Leftover(f"interface {veth}", partial(netlink.detach, veth))
    names = {bridge.bridge_name(root, ident) for ident in networks}
    for name in bridge.list_bridges(root):
        if idle or name not in names:
            yield Leftover(f"bridge {name}", partial(bridge.remove_bridge, root, name))
    yield from _queues(root, store, idle)
    for ident in dns.list_dns(root):
        if idle or ident not in networks:
            yield Leftover(f"DNS server of network {ident}", partial(dns.stop_dns, root, ident))
    if idle and firewall.is_there(root):
        yield Leftover(f"nftables tables {root.table}", partial(firewall.remove_all, root))
    if idle and lxcfs.is_there(root):
        yield Leftover("lxcfs and its mount", partial(lxcfs.stop, root))
    yield from _groups(root, alive, engine)
    for tenant in _tenants(root):
        for jail in running_jails(root, tenant):
            if load_state(root.tenant_run(tenant), jail) is not None and read_state(root, tenant, jail) is None:
                path = root.tenant_run(tenant)
                yield Leftover(f"state of {tenant}/{jail}, which has ended", partial(remove_state, path, jail))


def _queues(root: Root, store: Store, idle: bool) -> Iterator[Leftover]:
    tenants = store.tenants() if os.path.exists(root.store) else []
    needed = {shaping.ifb_name(root, tenant.id, direction) for tenant in tenants for direction in DIRECTIONS}
    for name in bridge.list_ifbs(root):
        if idle or name not in needed:
            yield Leftover(f"queues on {name}", partial(shaping.remove, root, name))


def _groups(root: Root, alive: set[tuple[str, str]], engine: bool) -> Iterator[Leftover]:
    hierarchies = cgroups.discover()
    for group in cgroups.list_groups(hierarchies, root.cgroup):
        parts = tuple(group.split("/")[1:])
        in_use = (len(parts) == 1 or parts[0] == BUILD_TENANT) and (engine or any(parts[0] == key[0] for key in alive))
        if not in_use and parts not in alive and not (engine and len(parts) == 1):
            yield Leftover(f"cgroup {group}", partial(_remove_group, hierarchies, group))


def _remove_group(hierarchies: cgroups.Hierarchies, group: str) -> None:
    cgroups.kill(hierarchies, group)
    cgroups.remove(hierarchies, group)


def _of_disk(root: Root, store: Store) -> Iterator[Leftover]:
    known = {(row.jail.tenant, name) for row in store.rows() for name in (row.jail.name, row.next) if name}
    lib = f"{root.lib}/jails"
    kept = {(tenant, jail) for tenant in _list(lib) for jail in _list(f"{lib}/{tenant}") if tenant != BUILD_TENANT}
    for tenant, jail in sorted(kept - known):
        path = root.jail_lib(tenant, jail)
        yield Leftover(f"directory {path} of a jail there is not", partial(shutil.rmtree, path))
    if not is_open(root):
        return
    pool = open_pool(root)
    for tenant, jail in list_volumes(pool):
        if (tenant, jail) not in known:
            yield Leftover(
                f"volume {tenant}/{jail} of a jail there is not", partial(delete_volume, pool, tenant, jail, None)
            )
    if not engine_runs(root):
        for name in list_builds(pool):
            yield Leftover(f"build {name}, which was cut off")
        for name in half_deleted(pool):
            yield Leftover(f"trash {name} in the pool, whose deletion was cut off")


def _list(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []
