"""Tenants: made, listed, deleted. `default` is made when it is first used."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack

from jailmgr import claims
from jailmgr.errors import JailmgrError
from jailmgr.keys import PREFIXES, check_name, find_key
from jailmgr.manager.host import DEFAULT_TENANT, Manager
from jailmgr.manager.networks import claim_key, take_down_one
from jailmgr.model import Tenant
from jailmgr.runtime import cgroups
from jailmgr.storage.pool import is_made
from jailmgr.storage.volume import forget_tenant


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
    """A new tenant with a host uid of its own. JailmgrError `exists`, `invalid`."""
    check_name(name, "tenant")
    for key in config:
        if not key.startswith("user."):
            find_key(key)
            raise JailmgrError(
                f"key {key!r}", "a tenant has no such key", f"It takes {', '.join(PREFIXES)[-5:]}*.", "invalid"
            )
    if m.store.find_tenant(name) is not None:
        raise JailmgrError(f"tenant {name}", "there is one of that name already", "", "exists")
    return m.store.add_tenant(name, config, claims.claim_uid(m.root, name))


def list_tenants(m: Manager) -> list[Tenant]:
    return m.store.tenants()


def get_tenant(m: Manager, name: str) -> Tenant:
    """JailmgrError `missing`."""
    return ensure_tenant(m, name) if name == DEFAULT_TENANT else m.store.tenant(name)


def delete_tenant(m: Manager, name: str) -> None:
    """A tenant without jails, its networks with it. JailmgrError `conflict`, `missing`."""
    tenant = m.store.tenant(name)
    if m.store.rows(name):
        raise JailmgrError(f"tenant {name}", "it has jails", "Delete them first.", "conflict")
    networks = m.store.networks(name)
    for network in networks:
        take_down_one(m, network)
    m.store.remove_tenant(name)
    m.claimed.discard(f"uid/{name}")
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
