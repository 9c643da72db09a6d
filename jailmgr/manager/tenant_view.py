"""Tenants as users are shown them: limit, promise and use of each resource (cli.md, `tenant list`)."""

from __future__ import annotations

from typing import Any

from jailmgr.manager.admission import allocated, totals_of
from jailmgr.manager.host import Manager
from jailmgr.manager.metering import Amounts as UsedInSpan
from jailmgr.manager.metering import UsageRecord
from jailmgr.manager.tenants import ensure_tenant
from jailmgr.manager.totals import group_of
from jailmgr.model import DEFAULT_TENANT, Amounts, JailBilled, Tenant, TenantBilled, TenantView, Used
from jailmgr.runtime import cgroups
from jailmgr.runtime.state import running_jails, supervisor_process
from jailmgr.storage.volume import tenant_usage
from jailmgr.tenant_keys import parse_list
from jailmgr.times import rfc3339


def list_tenants(m: Manager) -> list[TenantView]:
    """All tenants, by name."""
    return [_view(m, tenant) for tenant in m.store.tenants()]


def get_tenant(m: Manager, name: str) -> TenantView:
    """JailmgrError `missing`."""
    return _view(m, ensure_tenant(m, name) if name == DEFAULT_TENANT else m.store.tenant(name))


def billed(m: Manager, tenants: list[str] | None, since: float, until: float) -> list[TenantBilled]:
    """What tenants (None: all) have used between two times, in seconds since the epoch, deleted ones too.

    JailmgrError `invalid` for a span that ends before it begins; `missing` for a tenant that isn't there and of which
    nothing is known.
    """
    there = {tenant.id: tenant for tenant in m.store.tenants()}
    records = (
        m.accountant.usage(None, since, until)
        if tenants is None
        else [record for tenant in tenants for record in m.accountant.usage(tenant, since, until)]
    )
    for name in {*(tenants or ())} - {record.tenant for record in records}:
        get_tenant(m, name)
    return [_tenant_billed(m, record, there.get(record.tenant_id), since, until) for record in records]


def _tenant_billed(m: Manager, record: UsageRecord, tenant: Tenant | None, since: float, until: float) -> TenantBilled:
    seconds = max(1.0, until - max(since, tenant.created_at if tenant else since))
    gone = {"limits": Amounts(), "allocated": Amounts(), "users": [], "supervisor_pid": None}
    return TenantBilled(
        **_bill(record),
        tenant=record.tenant,
        since=rfc3339(since),
        until=rfc3339(until),
        **(_standing(m, tenant) if tenant else gone),
        used=Used(
            cpu=round(record.cpu_ns / 1e9 / seconds, 2),
            memory_bytes=round(record.memory_byte_seconds / seconds),
            disk_bytes=round(record.disk_byte_seconds / seconds),
            cpu_ns=record.cpu_ns,
        ),
        jails=[JailBilled(**_bill(jail), jail=jail.jail) for jail in record.jails],
    )


def _bill(used: UsedInSpan) -> dict[str, Any]:
    return {
        "cpu_seconds": round(used.cpu_ns / 1e9, 3),
        "memory_byte_hours": round(used.memory_byte_seconds / 3600),
        "disk_byte_hours": round(used.disk_byte_seconds / 3600),
        "received_bytes": used.received_bytes,
        "sent_bytes": used.sent_bytes,
        "running_hours": round(used.running_seconds / 3600, 4),
    }


def _standing(m: Manager, tenant: Tenant) -> dict[str, Any]:
    """What every view of a tenant has: totals, promises, users, supervisor."""
    watching = supervisor_process(m.root, tenant.name)
    return {
        "limits": totals_of(tenant.config),
        "allocated": allocated(m, tenant.name),
        "users": parse_list(tenant.config.get("users", "")),
        "supervisor_pid": watching.pid if watching else None,
    }


def _view(m: Manager, tenant: Tenant) -> TenantView:
    standing = _standing(m, tenant)
    return TenantView(
        tenant=tenant.name,
        name=tenant.name,
        description=tenant.config.get("user.description", ""),
        created_at=rfc3339(tenant.created_at),
        **standing,
        used=_used(m, tenant, standing["allocated"]),
        groups=parse_list(tenant.config.get("groups", "")),
        config=tenant.config,
    )


def _used(m: Manager, tenant: Tenant, promised: Amounts) -> Used:
    group = group_of(m, tenant.name)
    in_jails = cgroups.memory_of_jails(m.hierarchies, group) or 0
    whole, cpu_ns, processes = cgroups.usage(m.hierarchies, group)
    # The jails are counted one after the other, and may add up to more than they had at any moment.
    memory = min(in_jails, whole or 0)
    pool = m.pool_if_open
    return Used(
        instances=len(running_jails(m.root, tenant.name)),
        memory_bytes=memory,
        cpu=m.cpu_meter.mean(tenant.name, cpu_ns or 0),
        processes=processes or 0,
        disk_bytes=(tenant_usage(pool, tenant.name, tenant.id) if pool is not None else None) or 0,
        networks=promised.networks,
        snapshots=promised.snapshots,
        ports=promised.ports,
        ids=promised.ids,
        cpu_ns=cpu_ns or 0,
        cache_bytes=(whole or 0) - memory,
    )
