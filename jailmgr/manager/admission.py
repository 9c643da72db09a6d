"""Whether a tenant may have what is asked for: its totals against what its jails were promised, and what is restricted.

`admit` is called in the transaction that has written what was asked for, so a check and the row that takes the place
are one, and a refusal takes the row back. A jail without a limit of its own was promised nothing: it shares what the
tenant's total, which the kernel holds, leaves.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from jailmgr.errors import JailmgrError, full_name
from jailmgr.keys import Config
from jailmgr.manager.claiming import idmap_size
from jailmgr.manager.host import Manager
from jailmgr.manager.plan import cpus_of, disk_of, limits_of
from jailmgr.manager.ports import ports_of
from jailmgr.model import Amounts, Image, Jail, Port, Tenant
from jailmgr.storage.volume import nests
from jailmgr.template.recipe import Build
from jailmgr.tenant_keys import IDS_OF_USERS, may_be_used, may_overcommit, parse_list, parse_ports
from jailmgr.units import format_size, parse_size

KEYS = {
    "instances": "limits.instances",
    "memory_bytes": "limits.memory",
    "cpu": "limits.cpu",
    "processes": "limits.processes",
    "disk_bytes": "limits.disk",
    "networks": "limits.networks",
    "snapshots": "limits.snapshots",
    "ports": "limits.ports",
    "ids": "limits.ids",
}
"""Of each resource, the key that its total is set by."""

COUNTED = ("instances", "networks", "snapshots", "ports", "ids")
"""The kernel doesn't know these: they are never overcommitted."""

PRIVILEGED = 1024
"""Ports below are root's, as everywhere (ip_unprivileged_port_start, ip-sysctl)."""


class Promise(msgspec.Struct, frozen=True):
    """What one jail was promised; 0 where it has no limit of its own."""

    memory_bytes: int = 0
    memory_min_bytes: int = 0
    cpu: float = 0.0
    processes: int = 0
    disk_bytes: int = 0
    ports: int = 0
    ids: int = 0


def promise_of(jail: Jail) -> Promise:
    """What a jail is promised."""
    return _promise(
        tuple(jail.config.items()), tuple(jail.devices.get("root", {}).items()), len(ports_of(jail)), idmap_size(jail)
    )


@lru_cache(maxsize=4096)
def _promise(config: tuple[tuple[str, str], ...], root: tuple[tuple[str, str], ...], ports: int, ids: int) -> Promise:
    limits = limits_of(dict(config))
    return Promise(
        limits.memory or 0,
        limits.memory_min or 0,
        cpus_of(limits) or 0.0,
        limits.processes or 0,
        disk_of({"root": dict(root)}) or 0,
        ports,
        ids,
    )


def totals_of(config: Config) -> Amounts:
    """A tenant's totals; None where it has none."""

    def count(key: str) -> int | None:
        return int(config[key]) if key in config else None

    limits = limits_of(config)
    return Amounts(
        instances=count("limits.instances"),
        memory_bytes=limits.memory,
        cpu=cpus_of(limits),
        processes=limits.processes,
        disk_bytes=parse_size(config["limits.disk"]) if "limits.disk" in config else None,
        networks=count("limits.networks"),
        snapshots=count("limits.snapshots"),
        ports=count("limits.ports"),
        ids=IDS_OF_USERS if may_be_used(config) and "limits.ids" not in config else count("limits.ids"),
    )


def allocated(m: Manager, tenant: str) -> Amounts:
    """What a tenant's jails were promised, all together, and how many of what is counted there are."""
    return _sum(m, tenant, [promise_of(row.jail) for row in m.store.rows(tenant)])


def _sum(m: Manager, tenant: str, promises: list[Promise]) -> Amounts:
    return Amounts(
        instances=len(promises),
        memory_bytes=sum(promise.memory_bytes for promise in promises),
        cpu=round(sum(promise.cpu for promise in promises), 3),
        processes=sum(promise.processes for promise in promises),
        disk_bytes=sum(promise.disk_bytes for promise in promises),
        networks=len(m.store.networks(tenant)),
        snapshots=0,
        ports=sum(promise.ports for promise in promises),
        ids=sum(promise.ids for promise in promises),
    )


def admit(m: Manager, jail: Jail, before: Jail | None = None) -> None:
    """Refuse a jail, just written to the store, that its tenant has no room for; `before` is what it was, if it was.

    Raises JailmgrError `full`, with what is used and what was asked.
    """
    tenant = m.store.find_tenant(jail.tenant)
    if tenant is None or totals_of(tenant.config) == Amounts():
        return
    old, new = promise_of(before) if before else Promise(), promise_of(jail)
    asked = Amounts(
        instances=0 if before else 1,
        memory_bytes=new.memory_bytes - old.memory_bytes,
        cpu=round(new.cpu - old.cpu, 3),
        processes=new.processes - old.processes,
        disk_bytes=new.disk_bytes - old.disk_bytes,
        ports=new.ports - old.ports,
        ids=new.ids - old.ids,
    )
    _compare(m, tenant, asked)


def admit_network(m: Manager, tenant_name: str) -> None:
    """The same for a network that has just been written."""
    tenant = m.store.find_tenant(tenant_name)
    if tenant is not None and "limits.networks" in tenant.config:
        _compare(m, tenant, Amounts(networks=1))


def admit_totals(m: Manager, tenant: Tenant) -> None:
    """Refuse totals, just written to the store, that are below what was promised. JailmgrError `conflict`."""
    _compare(m, tenant, None)


def _compare(m: Manager, tenant: Tenant, asked: Amounts | None) -> None:
    totals, overcommit = totals_of(tenant.config), may_overcommit(tenant.config)
    promises = [promise_of(row.jail) for row in m.store.rows(tenant.name)]
    sums = _sum(m, tenant.name, promises)
    for resource in KEYS:
        total, sum_ = getattr(totals, resource), getattr(sums, resource)
        wanted = getattr(asked, resource) or 0 if asked is not None else None
        if total is None or sum_ <= total or (wanted is not None and wanted <= 0):
            continue
        if resource in COUNTED or not overcommit or (resource == "disk_bytes" and not _nests(m)):
            raise _refusal(tenant, resource, total, sum_, wanted)
    if totals.memory_bytes is not None:
        kept = sum(promise.memory_min_bytes for promise in promises)
        if kept > totals.memory_bytes:
            why = f"its jails' limits.memory.min are {format_size(kept)} together"
            why += f", its limits.memory is {format_size(totals.memory_bytes)}"
            raise JailmgrError(f"tenant {tenant.name}", why, "What is kept for them must fit.", "full")
    if totals.disk_bytes is not None and not _nests(m):
        _sized(m, tenant)


def _nests(m: Manager) -> bool:
    """Whether the pool can hold a total over a tenant's volumes; where there is none yet, by what it would be."""
    return nests(m.pool_if_open or m.pool)


def _sized(m: Manager, tenant: Tenant) -> None:
    """Project quotas hold each volume by itself, so that they hold the total each must have a size."""
    for row in m.store.rows(tenant.name):
        if not promise_of(row.jail).disk_bytes:
            why = "it has no limits.disk, which every jail of a tenant with one needs in this pool"
            raise JailmgrError(
                f"jail {full_name(tenant.name, row.jail.name)}", why, "Give it a size: --disk 5GiB", "full"
            )


def _refusal(tenant: Tenant, resource: str, total: float, sum_: float, wanted: float | None) -> JailmgrError:
    key, counted = KEYS[resource], resource in COUNTED
    word, hint = "used" if counted else "promised", f"Raise it (jailmgr tenant set {tenant.name} {key}=…)"
    if wanted is None:
        why = f"{key} would be {_told(resource, total)}, {_told(resource, sum_)} {_are(sum_)} {word} already"
        return JailmgrError(f"tenant {tenant.name}", why, "Take something from its jails first.", "conflict")
    have = sum_ - wanted
    why = f"{key} is {_told(resource, total)}: {_told(resource, have)} {_are(have)} {word}"
    why += f", {_told(resource, wanted)} more {'was' if wanted == 1 else 'were'} asked for"
    if counted:
        hint += ", or delete what isn't needed."
    else:
        hint += ", ask for less, or set limits.overcommit=true: the total holds all the same."
    return JailmgrError(f"tenant {tenant.name}", why, hint, "full")


def _are(amount: float) -> str:
    return "is" if amount == 1 else "are"


def _told(resource: str, amount: float) -> str:
    return format_size(int(amount)) if resource.endswith("_bytes") else f"{amount:.12g}"


def check_restricted(m: Manager, jail: Jail, before: Jail | None = None) -> None:
    """Refuse what the tenant's jails may not be given, and `before` has not. JailmgrError `denied`."""
    tenant = m.store.find_tenant(jail.tenant)
    if tenant is None:
        return
    had = ports_of(before) if before else []
    _check_ports(tenant, [port for port in ports_of(jail) if port not in had])
    network = _network(jail)
    if "restricted.networks.access" in tenant.config and (before is None or network != _network(before)):
        allowed = parse_list(tenant.config["restricted.networks.access"])
        if network not in allowed:
            raise _denied(tenant.name, f"network {network}", "restricted.networks.access", allowed)


def _network(jail: Jail) -> str:
    return jail.devices.get("eth0", {}).get("network", "default")


def _check_ports(tenant: Tenant, ports: list[Port]) -> None:
    if "restricted.ports" in tenant.config:
        allowed = parse_ports(tenant.config["restricted.ports"])
    elif may_be_used(tenant.config):
        allowed = [(PRIVILEGED, 65535)]
    else:
        return
    for port in ports:
        if not any(first <= port.host_port <= last for first, last in allowed):
            told = ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in allowed) or "none"
            raise JailmgrError(
                f"port {port.host_port}/{port.protocol}",
                f"tenant {port.tenant} may not publish it",
                f"It may publish {told} (restricted.ports).",
                "denied",
            )


def check_source_allowed(tenant: Tenant | None, found: Image | Build) -> None:
    """Refuse a template or image that the tenant may not use, by whatever name it was asked for. JailmgrError `denied`.

    `found`: as find_source has it.
    """
    if tenant is None or "restricted.images" not in tenant.config:
        return
    allowed = parse_list(tenant.config["restricted.images"])
    names = [found.source] if isinstance(found, Build) else [found.template, found.fingerprint, *found.aliases]
    if not any(name == word or name.startswith(f"{word}/") for name in names for word in allowed):
        raise _denied(tenant.name, f"source {names[0]}", "restricted.images", allowed)


def _denied(tenant: str, what: str, key: str, allowed: list[str]) -> JailmgrError:
    told = ", ".join(allowed) or "none"
    return JailmgrError(what, f"tenant {tenant} may not use it", f"It may use {told} ({key}).", "denied")
