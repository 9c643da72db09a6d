"""A tenant's uid and a jail's id range, claimed on the host before they are used.

Claims live in /run and are lost when the host boots. Nothing on disk depends on either (owners are 0-based), so what
another instance has taken meanwhile is chosen anew, unless jails run with it.
"""

from __future__ import annotations

import msgspec

from jailmgr import claims
from jailmgr.errors import JailmgrError
from jailmgr.manager.host import Manager
from jailmgr.model import Jail
from jailmgr.runtime.state import running_jails


def idmap_key(jail: Jail) -> str:
    """The key of a jail's id range: a rename doesn't change it."""
    return f"jail/{jail.id}"


def claim_uid(m: Manager, tenant: str) -> int:
    """The host uid that makes the tenant's user namespaces, kept in the store when it had to be another."""
    uid, key = m.store.tenant(tenant).uid, f"uid/{tenant}"
    if key not in m.claimed:
        try:
            claims.claim_uid(m.root, tenant, uid)
        except JailmgrError as error:
            if error.code != "conflict" or running_jails(m.root, tenant):
                raise
            uid = claims.claim_uid(m.root, tenant)
            m.store.set_tenant_uid(tenant, uid)
        m.claimed.add(key)
    return uid


def claim_idmap(m: Manager, jail: Jail) -> Jail:
    """A jail that doesn't run, with an id range that is its own; kept in the store when it had to be another."""
    if idmap_key(jail) in m.claimed:
        return jail
    try:
        base = claims.claim_idmap(m.root, idmap_key(jail), jail.idmap_base or None)
    except JailmgrError as error:
        if error.code != "conflict":
            raise
        base = claims.claim_idmap(m.root, idmap_key(jail))
    if base != jail.idmap_base:
        jail = msgspec.structs.replace(jail, idmap_base=base)
        m.store.update(jail)
    m.claimed.add(idmap_key(jail))
    return jail


def release(m: Manager, jail: Jail) -> None:
    """Give a jail's id range back."""
    m.claimed.discard(idmap_key(jail))
    claims.release(m.root, "idmap", idmap_key(jail))
