"""A tenant's totals in the kernel: its group's limits, the quota over its volumes, and on v1 its jails' CPU quotas."""

from __future__ import annotations

from contextlib import ExitStack

from jailmgr.errors import JailmgrError
from jailmgr.manager.host import Manager
from jailmgr.manager.plan import cpus_of, kernel_limits, limits_of, tenant_limits, write_bundle
from jailmgr.manager.running import is_up, running
from jailmgr.model import Jail, Tenant
from jailmgr.runtime import cgroups
from jailmgr.runtime.cgroups import Limits
from jailmgr.storage.pool import is_made
from jailmgr.storage.volume import hold_tenant, limit_tenant, nests
from jailmgr.units import parse_size


def group_of(m: Manager, tenant: str) -> str:
    return f"{m.root.cgroup}/{tenant}"


def ensure_totals(m: Manager, name: str) -> None:
    """Before a jail of the tenant starts: its group is there and held. Cheap where it is already. JailmgrError."""
    limits = tenant_limits(m, m.store.tenant(name))
    if limits == Limits() and name not in m.totals:
        return
    group = group_of(m, name)
    if m.totals.are(name, limits, m.hierarchies, group):
        return
    cgroups.tenant_group(m.hierarchies, m.root.cgroup, name)
    cgroups.set_limits(m.hierarchies, group, limits)
    m.totals.put(name, limits, m.hierarchies, group)


def renew_totals(m: Manager, name: str) -> None:
    """Of a tenant with running jails: have the kernel say what the store says, whatever a crash in between has left.

    On v1 neither the tenant's nor a jail's CPU quota may come first in every case: the jails' are tried where it is not
    the tenant's. Raises JailmgrError.
    """
    with m.tenant(name):
        tenant = m.store.tenant(name)
        m.totals.doubt(name)
        try:
            ensure_totals(m, name)
        except JailmgrError as error:
            if error.code != "conflict":
                raise
            _hold_jails(m, tenant)
            ensure_totals(m, name)
        _hold_jails(m, tenant)
        if m.pool_if_open is not None and nests(m.pool):
            disk = tenant.config.get("limits.disk")
            hold_tenant(m.pool, tenant.id, parse_size(disk) if disk else None)


def _hold_jails(m: Manager, tenant: Tenant) -> None:
    """What depends on the tenant's totals: CPU quotas on v1, in the kernel and in what a jail reboots with."""
    for jail in _running(m, tenant.name) if "cpu" in m.hierarchies.v1 else []:
        if limits_of(jail.config).cpu_quota is not None:
            cgroup = m.root.jail_cgroup(jail.tenant, jail.name)
            cgroups.set_limits(m.hierarchies, cgroup, kernel_limits(m, jail, tenant))
            write_bundle(m, jail)


def hold_volumes(m: Manager, tenant: Tenant) -> None:
    """As a volume of the tenant is made: all of them are held to its total, where the pool can."""
    if "limits.disk" in tenant.config and nests(m.pool):
        hold_tenant(m.pool, tenant.id, parse_size(tenant.config["limits.disk"]))


def change_totals(m: Manager, old: Tenant, new: Tenant, undo: ExitStack) -> None:
    """Hold the tenant's jails to other totals than before, at once. The tenant is locked.

    Raises JailmgrError: `conflict` where more memory is used and can't be given back, `full` where more disk is,
    `unavailable`; what was changed by then is taken back by `undo`.
    """
    before, after = tenant_limits(m, old), tenant_limits(m, new)
    cgroups.check_limits(m.hierarchies, group_of(m, new.name), after)
    if before != after:
        if _ratio(after) < _ratio(before):
            _limit_jails(m, old, new, undo)
            _limit_group(m, new.name, before, after, undo)
        else:
            _limit_group(m, new.name, before, after, undo)
            _limit_jails(m, old, new, undo)
    was, wanted = old.config.get("limits.disk"), new.config.get("limits.disk")
    if was != wanted and is_made(m.root) and nests(m.pool):
        undo.callback(limit_tenant, m.pool, new.name, new.id, parse_size(was) if was else None)
        limit_tenant(m.pool, new.name, new.id, parse_size(wanted) if wanted else None)


def rewrite_bundles(m: Manager, old: Tenant, new: Tenant) -> None:
    """The configurations that jails reboot with, or are about to be started with, where the new totals, now in the
    store, change them.
    """
    for jail in m.store.jails(new.name):
        if is_up(m, jail) and kernel_limits(m, jail, old) != kernel_limits(m, jail, new):
            write_bundle(m, jail)


def _ratio(limits: Limits) -> float:
    return cpus_of(limits) or float("inf")


def _limit_group(m: Manager, name: str, before: Limits, after: Limits, undo: ExitStack) -> None:
    group = group_of(m, name)
    if cgroups.identity(m.hierarchies, group):
        undo.callback(cgroups.set_limits, m.hierarchies, group, before)
        cgroups.set_limits(m.hierarchies, group, after)
    undo.callback(m.totals.forget, name)
    m.totals.forget(name)


def _limit_jails(m: Manager, old: Tenant, new: Tenant, undo: ExitStack) -> None:
    """On v1 a jail's quota may at no time be above its tenant's."""
    for jail in _running(m, new.name):
        before, after = kernel_limits(m, jail, old), kernel_limits(m, jail, new)
        if before != after:
            group = m.root.jail_cgroup(jail.tenant, jail.name)
            undo.callback(cgroups.set_limits, m.hierarchies, group, before)
            cgroups.set_limits(m.hierarchies, group, after)


def _running(m: Manager, tenant: str) -> list[Jail]:
    return [jail for jail in m.store.jails(tenant) if running(m, jail)]
