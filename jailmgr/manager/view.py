"""What users are shown: jails, images, networks, as `list` and `info` tell them (cli.md)."""

from __future__ import annotations

from typing import Any

import msgspec

from jailmgr.manager.host import Manager
from jailmgr.manager.plan import cpus_of, disk_of, limits_of
from jailmgr.manager.ports import ports_of
from jailmgr.model import (
    DEFAULT_TENANT,
    Ending,
    Image,
    ImageInfo,
    ImageView,
    Jail,
    JailInfo,
    JailView,
    Usage,
)
from jailmgr.runtime import apparmor, cgroups
from jailmgr.runtime.state import State, read_last, read_state, running_jails, supervisor_process
from jailmgr.storage.volume import committed_usage, volume_usage
from jailmgr.store import DELETING, READY, RENAMING, Row
from jailmgr.times import rfc3339


def list_jails(m: Manager, tenant: str | None = None) -> list[JailView]:
    """Jails by tenant and name. A stopped one costs a row and its part of the list of quota groups, no more."""
    if tenant not in (None, DEFAULT_TENANT):
        m.store.tenant(tenant)
    running: dict[str, set[str]] = {}
    pool = m.pool_if_open
    stopped = committed_usage(pool) if pool is not None else {}
    views = []
    for row in m.store.rows(tenant):
        if row.state not in (READY, DELETING, RENAMING):
            continue
        jail = row.jail
        if jail.tenant not in running:
            running[jail.tenant] = set(running_jails(m.root, jail.tenant))
        state = read_state(m.root, jail.tenant, jail.name) if jail.name in running[jail.tenant] else None
        view = _stopped_view(m, row, stopped.get(jail.id))
        views.append(view if state is None else msgspec.structs.replace(view, **_live(m, jail, state)))
    return views


def _stopped_view(m: Manager, row: Row, disk: int | None) -> JailView:
    known = m.stopped_views.get(row, disk)
    if known is not None:
        return known
    return m.stopped_views.put(row, disk, JailView(**_fields(row.jail, row.state), usage=Usage(disk_bytes=disk)))


def info(m: Manager, tenant: str, name: str) -> JailInfo:
    """All there is to tell of one jail. JailmgrError `missing`."""
    row = m.store.find_row(tenant, name)
    jail = row.jail if row is not None and row.state in (DELETING, RENAMING) else m.store.jail(tenant, name)
    state = read_state(m.root, tenant, name)
    fields = _fields(jail, row.state if row else READY)
    fields |= _live(m, jail, state) if state is not None else {"usage": Usage(disk_bytes=_disk(m, jail))}
    lib = m.root.jail_lib(tenant, name)
    fields |= {
        "rootfs": m.root.volume(tenant, name),
        "log": f"{lib}/console.log",
        "pool": m.root.pool,
        "idmap": f"0 {jail.idmap_base} {jail.idmap_size}",
        "uuid": m.store.uuid(jail),
        "last_ended": _ending(m, tenant, name),
    }
    if state is not None:
        pid, watching = state.pid, supervisor_process(m.root, tenant)
        fields |= {
            "supervisor_pid": watching.pid if watching else None,
            "netns": f"/proc/{pid}/ns/net",
            "cgroups": cgroups.directories(m.hierarchies, m.root.jail_cgroup(tenant, name)),
            "rootfs": f"/proc/{pid}/root",
            "apparmor": apparmor.label_of(pid),
            "started_at": rfc3339(state.started_at),
            "restarts": state.restarts,
        }
    return JailInfo(**fields)


def limits_view(jail: Jail) -> dict[str, Any]:
    limits = limits_of(jail.config)
    return {
        "memory_bytes": limits.memory,
        "cpu": cpus_of(limits),
        "processes": limits.processes,
        "disk_bytes": disk_of(jail.devices),
    }


def image_view(image: Image, jails: int) -> ImageView:
    return ImageView(
        fingerprint=image.fingerprint,
        aliases=image.aliases,
        template=image.template,
        size_bytes=image.size_bytes,
        created_at=rfc3339(image.created_at),
        architecture=image.architecture,
        jails=jails,
    )


def image_info(image: Image, jails: int) -> ImageInfo:
    view = {field: getattr(seen, field) for seen in [image_view(image, jails)] for field in seen.__struct_fields__}
    files = [file.path for file in image.files]
    return ImageInfo(**view, packages=image.packages, recipe=image.recipe, files=files, key=image.key)


def _fields(jail: Jail, row_state: str) -> dict[str, Any]:
    """What a JailView says of a jail that doesn't run, but for its `usage`."""
    nic = jail.nics[0] if jail.nics else None
    config = jail.config
    if "size" in (root := jail.devices.get("root", {})):
        config = config | {"limits.disk": root["size"]}
    return {
        "name": jail.name,
        "tenant": jail.tenant,
        "status": "Stopped" if row_state == READY else "Error",
        "init_pid": None,
        "ipv4": nic.ipv4 if nic else "",
        "ipv6": nic.ipv6 if nic else "",
        "image": jail.image,
        "created_at": rfc3339(jail.created_at),
        "limits": limits_view(jail),
        "config": config,
        "devices": jail.devices,
        "project": jail.tenant,
        "source": jail.source,
        "ports": ports_of(jail),
    }


def _live(m: Manager, jail: Jail, state: State) -> dict[str, Any]:
    """What differs from that while it runs."""
    cgroup = m.root.jail_cgroup(jail.tenant, jail.name)
    return {
        "status": "Frozen" if cgroups.is_frozen(m.hierarchies, cgroup) else "Running",
        "init_pid": state.pid,
        "usage": Usage(*cgroups.usage(m.hierarchies, cgroup), _disk(m, jail)),
    }


def _disk(m: Manager, jail: Jail) -> int | None:
    pool = m.pool_if_open
    return volume_usage(pool, jail.id) if pool is not None else None


def _ending(m: Manager, tenant: str, name: str) -> Ending | None:
    last = read_last(m.root, tenant, name)
    if last is None:
        return None
    try:
        return msgspec.convert(last, Ending)
    except msgspec.ValidationError:
        return None
