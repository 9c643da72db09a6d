"""Tenants: made, changed, deleted. `default` is made when it is first used."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
from collections.abc import Mapping
from contextlib import ExitStack

import msgspec

from jailmgr import claims
from jailmgr.errors import JailmgrError
from jailmgr.keys import check_name
from jailmgr.manager.admission import admit_totals
from jailmgr.manager.host import Manager
from jailmgr.manager.kept import renew as renew_kept
from jailmgr.manager.networks import claim_key, limit_total_connections, take_down_one, total_connections
from jailmgr.manager.plan import tenant_limits
from jailmgr.manager.shaping import apply_tenant_rates, take_down_tenant
from jailmgr.manager.strangers import check_tenant_free
from jailmgr.manager.totals import change_totals, group_of, rewrite_bundles
from jailmgr.model import DEFAULT_TENANT, Tenant
from jailmgr.network.shaping import rates_of
from jailmgr.runtime import cgroups
from jailmgr.storage.pool import is_made
from jailmgr.storage.volume import forget_tenant
from jailmgr.tenant_keys import check_tenant_config, find_tenant_key, parse_list

_DATABASE = {"users": "passwd", "groups": "group"}


def check_tenant(m: Manager, name: str) -> None:
    """Refuse a tenant there is not and `ensure_tenant` would not make. JailmgrError `missing`."""
    if name != DEFAULT_TENANT:
        m.store.tenant(name)


def ensure_tenant(m: Manager, name: str) -> Tenant:
    """The tenant of that name; `default` is made if need be. JailmgrError `missing` for any other."""
    found = m.store.find_tenant(name)
    if found is not None:
        return found
    check_tenant(m, name)
    try:
        return create_tenant(m, name, {})
    except JailmgrError as error:
        if error.code != "exists":
            raise
        return m.store.tenant(name)


def create_tenant(m: Manager, name: str, config: dict[str, str]) -> Tenant:
    """A new tenant with a host uid of its own. JailmgrError `exists`, `invalid`, `unavailable`."""
    check_name(name, "tenant")
    if m.store.find_tenant(name) is not None:
        raise JailmgrError(f"tenant {name}", "there is one of that name already", "", "exists")
    check_tenant_free(m, name)
    _check(m, Tenant(0, name, 0.0, 0, config))
    return m.store.add_tenant(name, config, claims.claim_uid(m.root, name))


def set_tenant(m: Manager, name: str, changes: Mapping[str, str | None]) -> Tenant:
    """Set keys, and unset those given as None; all of them hold at once. Returns the tenant as it is then.

    Raises JailmgrError, with nothing changed: `missing`, `invalid`, `conflict` (below what was promised, or what is
    used and can't be given back), `full` (less disk than is used), `unavailable`.
    """
    ensure_tenant(m, name)
    with m.tenant(name):
        old = m.store.tenant(name)
        config = dict(old.config)
        for key, value in changes.items():
            find_tenant_key(key)
            if value is None:
                config.pop(key, None)
            else:
                config[key] = value
        new = msgspec.structs.replace(old, config=config)
        _check(m, new)
        with ExitStack() as undo:
            with m.store.transaction():
                m.store.set_tenant_config(name, config)
                admit_totals(m, new)
            undo.callback(rewrite_bundles, m, new, old)
            if rates := rates_of(old.config) != rates_of(new.config):
                undo.callback(apply_tenant_rates, m, name)
            undo.callback(_renew_kept, m, name)
            undo.callback(m.store.set_tenant_config, name, old.config)
            change_totals(m, old, new, undo)
            _renew_kept(m, name)
            rewrite_bundles(m, old, new)
            if rates:
                apply_tenant_rates(m, name)
            if (total := total_connections(new)) != (before := total_connections(old)):
                undo.callback(limit_total_connections, m, new, before)
                limit_total_connections(m, new, total)
            undo.pop_all()
    return new


def _renew_kept(m: Manager, name: str) -> None:
    for jail in m.store.jails(name):
        renew_kept(m, jail)


def _check(m: Manager, tenant: Tenant) -> None:
    check_tenant_config(tenant.config)
    for kind, find in (("users", pwd.getpwnam), ("groups", grp.getgrnam)):
        for account in parse_list(tenant.config.get(kind, "")):
            try:
                find(account)
            except KeyError:
                why = f"this host has no {kind[:-1]} of that name"
                raise JailmgrError(f"{kind}={account}", why, f"See getent {_DATABASE[kind]}.", "invalid") from None
    cgroups.check_limits(m.hierarchies, group_of(m, tenant.name), tenant_limits(m, tenant))


def delete_tenant(m: Manager, name: str) -> None:
    """A tenant without jails, its networks with it. JailmgrError `conflict`, `missing`."""
    tenant = m.store.tenant(name)
    if m.store.rows(name):
        raise JailmgrError(f"tenant {name}", "it has jails", "Delete them first.", "conflict")
    check_tenant_free(m, name)
    networks = m.store.networks(name)
    for network in networks:
        take_down_one(m, network)
    take_down_tenant(m, tenant)
    limit_total_connections(m, tenant, None)
    m.store.remove_tenant(name)
    m.claims.forget_uid(name)
    m.totals.forget(name)
    m.cpu_meter.forget(name)
    with ExitStack() as rest:
        rest.callback(claims.release, m.root, "uid", tenant.name)
        if is_made(m.root):
            rest.callback(forget_tenant, m.pool, name, tenant.id)
        for network in networks:
            rest.callback(claims.release, m.root, "subnet", claim_key(network))
        rest.callback(cgroups.remove, m.hierarchies, f"{m.root.cgroup}/{name}")
        for directory in (m.root.tenant_run(name), f"{m.root.lib}/jails/{name}"):
            if os.path.isdir(directory):
                rest.callback(shutil.rmtree, directory)
