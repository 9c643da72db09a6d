"""Which tenants a user of the host may use: those that name them, or a group they are in, in `users` and `groups`."""

from __future__ import annotations

import grp
import pwd

import msgspec

from jailmgr.manager.host import Manager
from jailmgr.model import Tenant
from jailmgr.tenant_keys import parse_list


class Caller(msgspec.Struct, frozen=True):
    """Who is at the other end of a connection, as the kernel told when it was made (unix(7), SO_PEERCRED)."""

    uid: int
    gids: tuple[int, ...]


def tenants_of(m: Manager, caller: Caller) -> list[str]:
    """The tenants the caller may use now, by name. Names are looked up each time: accounts come and go."""
    tenants = [tenant for tenant in m.store.tenants() if shared(tenant)]
    if not tenants:
        return []
    user, groups = _user_name(caller.uid), {_group_name(gid) for gid in caller.gids}
    return [
        tenant.name
        for tenant in tenants
        if user in parse_list(tenant.config.get("users", ""))
        or not groups.isdisjoint(parse_list(tenant.config.get("groups", "")))
    ]


def shared(tenant: Tenant) -> bool:
    """Whether others than root may use it."""
    return bool(parse_list(tenant.config.get("users", "")) or parse_list(tenant.config.get("groups", "")))


def is_shared(m: Manager) -> bool:
    """Whether there is a tenant that others than root may use."""
    return any(shared(tenant) for tenant in m.store.tenants())


def _user_name(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _group_name(gid: int) -> str | None:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None
