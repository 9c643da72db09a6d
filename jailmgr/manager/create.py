"""Create a jail: check all, take the name, have the image, make the volume and what lies beside it."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress

import msgspec

from jailmgr.errors import JailmgrError, from_os, full_name
from jailmgr.keys import Config, Devices, check_name, fold
from jailmgr.manager import networks
from jailmgr.manager.access import check_root_only
from jailmgr.manager.admission import admit, check_restricted, check_source_allowed
from jailmgr.manager.delete import delete, finish_delete
from jailmgr.manager.files import Rendered, write_files
from jailmgr.manager.host import Manager
from jailmgr.manager.images import ensure_image, find_source
from jailmgr.manager.names import make_up_name
from jailmgr.manager.nodes import check_nodes
from jailmgr.manager.plan import disk_of, kernel_limits, write_bundle
from jailmgr.manager.ports import check_ports, ports_of
from jailmgr.manager.start import start, wait_ready
from jailmgr.manager.strangers import check_free
from jailmgr.manager.tenants import check_tenant, ensure_tenant
from jailmgr.manager.totals import hold_volumes
from jailmgr.model import Image, Jail
from jailmgr.progress import Cancelled, CancelledError, Progress, never, quiet
from jailmgr.runtime import cgroups
from jailmgr.storage.pool import is_made
from jailmgr.storage.volume import create_volume
from jailmgr.store import DELETING, READY
from jailmgr.template.render import render_create_files


def check_new(
    m: Manager,
    tenant: str,
    name: str | None,
    source: str,
    config: Config,
    devices: Devices,
    *,
    root: bool = True,
) -> None:
    """Refuse what `create` would refuse, without making anything.

    Raises JailmgrError: `invalid`, `missing`, `exists`, `denied`.
    `root`: the host's root asks for it, and not a user of the tenant's.
    """
    if name is not None:
        check_name(name)
    folded, placed = fold(config, devices)
    check_tenant(m, tenant)
    if name is not None and m.store.name_taken(tenant, name):
        raise JailmgrError(
            f"jail {full_name(tenant, name)}",
            "there is one of that name already",
            "Choose another name, or delete it first.",
            "exists",
        )
    found = find_source(m, source)
    check_source_allowed(m.store.find_tenant(tenant), found)
    device = placed.get("eth0", {})
    networks.check_network(m, tenant, device.get("network", networks.DEFAULT))
    if wanted := device.get("ipv4.address"):
        networks.check_address(m, tenant, device.get("network", networks.DEFAULT), wanted)
    jail = Jail(0, tenant, name or "", "", source, 0.0, folded, placed, 0)
    if not root:
        check_root_only(jail)
    check_restricted(m, jail)
    check_nodes(jail)
    check_ports(m, jail)
    cgroups.check_limits(m.hierarchies, m.root.jail_cgroup(tenant, name or "new"), kernel_limits(m, jail))


def create(
    m: Manager,
    tenant: str,
    name: str | None,
    source: str,
    config: Config,
    devices: Devices,
    *,
    root: bool = True,
    progress: Progress = quiet,
    cancelled: Cancelled = never,
) -> Jail:
    """A new, stopped jail of a template or image; without a name it gets one.

    `config` and `devices` are LXD's (keys.py), `root` as in check_new. Raises JailmgrError: `invalid`, `missing`,
    `exists`, `denied`, `full`, `failed`; CancelledError. Nothing of the jail is left then; an image that was built
    stays.
    """
    check_new(m, tenant, name, source, config, devices, root=root)
    m.check_disk()
    folded, placed = fold(config, devices)
    ensure_tenant(m, tenant)
    if is_made(m.root):
        _ = m.pool
    jail = _reserve(m, tenant, name, source, folded, placed)
    with ExitStack() as undo:
        undo.callback(finish_delete, m, jail)
        undo.callback(m.store.set_state, jail, DELETING)
        try:
            made = _make(m, jail, progress, cancelled)
        except OSError as error:
            raise _told(jail, error) from error
        undo.pop_all()
    return made


def launch(
    m: Manager,
    tenant: str,
    name: str | None,
    source: str,
    config: Config,
    devices: Devices,
    *,
    root: bool = True,
    wait: bool = False,
    progress: Progress = quiet,
    cancelled: Cancelled = never,
) -> Jail:
    """`create` and `start`. A jail that can't be started is deleted again; one that only isn't up in time is kept."""
    jail = create(m, tenant, name, source, config, devices, root=root, progress=progress, cancelled=cancelled)
    with ExitStack() as undo:
        undo.callback(_delete_again, m, jail)
        progress("starting", 0, 0)
        start(m, tenant, jail.name)
        undo.pop_all()
    if wait:
        progress("booting", 0, 0)
        wait_ready(m, tenant, jail.name)
    return jail


def _delete_again(m: Manager, jail: Jail) -> None:
    """Delete the jail that `launch` has made, unless somebody else has started, renamed or deleted it meanwhile."""
    with suppress(JailmgrError):
        delete(m, jail.tenant, jail.name, ident=jail.id)


def _reserve(m: Manager, tenant: str, name: str | None, source: str, config: Config, devices: Devices) -> Jail:
    """Take the name, once nothing of it is there: from here on all that has it is this call's, and may be undone."""
    while True:
        try:
            with m.store.transaction():
                jail = m.store.reserve(tenant, name or make_up_name(m, tenant), source, config, devices)
                check_free(m, tenant, jail.name)
                m.store.set_ports(jail, ports_of(jail))
                admit(m, jail)
                return jail
        except JailmgrError as error:
            taken = error.what.startswith("jail ") and error.code in ("exists", "conflict")
            if name is not None or not taken:
                raise


def _make(m: Manager, jail: Jail, progress: Progress, cancelled: Cancelled) -> Jail:
    jail = msgspec.structs.replace(jail, nics=networks.assign_nics(m, jail, jail.devices))
    jail, image = _with_image(m, jail, progress, cancelled)
    progress("creating", 0, 0)
    jail = m.claims.idmap(jail)
    tenant = m.store.tenant(jail.tenant)
    hold_volumes(m, tenant)
    lower = f"{m.root.image(image.fingerprint)}/rootfs"
    create_volume(m.pool, jail.tenant, tenant.id, jail.name, jail.id, disk_of(jail.devices), [lower])
    m.make_ahead(image.fingerprint)
    upper = f"{m.root.volume(jail.tenant, jail.name)}/upper"
    write_files(upper, lower, render_files(m, jail, image))
    os.makedirs(m.root.jail_lib(jail.tenant, jail.name), mode=0o700, exist_ok=True)
    if cancelled():
        raise CancelledError(f"jail {jail.full_name}")
    # Last before the state: a row in state `creating` with its config.json is that of a whole jail (reconcile).
    m.claims.uid(jail.tenant)
    write_bundle(m, jail, stopped=True)
    m.store.set_state(jail, READY)
    networks.refresh_names_of(m, jail)
    return jail


def _with_image(m: Manager, jail: Jail, progress: Progress, cancelled: Cancelled) -> tuple[Jail, Image]:
    """The image of the jail's source, written into its row so that it can't be deleted any more."""
    while True:
        image = ensure_image(m, jail.source, progress, cancelled)
        with m.image_lock:
            if m.store.find_image(image.fingerprint) is not None:
                jail = msgspec.structs.replace(jail, image=image.fingerprint)
                m.store.update(jail)
                return jail, image


def render_files(m: Manager, jail: Jail, image: Image) -> Rendered:
    """The files of the image's template, rendered for this jail."""
    nic = jail.nics[0]
    network = m.store.find_network(jail.tenant, nic.network)
    if network is None:
        raise JailmgrError(f"network {nic.network}", f"tenant {jail.tenant} has none of that name", "", "missing")
    gateway4, gateway6 = network.ipv4.partition("/")[0], network.ipv6.partition("/")[0]
    context = {
        "jail.name": jail.name,
        "jail.tenant": jail.tenant,
        "network.name": network.name,
        "network.ipv4": nic.ipv4,
        "network.ipv6": nic.ipv6,
        "network.gateway4": gateway4,
        "network.gateway6": gateway6,
        "network.dns": [gateway4, gateway6],
    }
    return render_create_files(image.files, context)


def _told(jail: Jail, error: OSError) -> JailmgrError:
    told = from_os(f"jail {jail.full_name}", error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        told.code, told.hint = "full", "Free some space on the host, or delete images and jails that are not needed."
    return told
