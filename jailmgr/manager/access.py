"""What users of the host may do.

They use the tenants that name them, or a group of theirs, in `users` and `groups`. They set all of a jail's keys and
devices but those that are root's.
"""

from __future__ import annotations

import grp
import pwd

import msgspec

from jailmgr.devices import TYPES
from jailmgr.errors import JailmgrError
from jailmgr.keys import find_key
from jailmgr.manager.host import Manager
from jailmgr.model import Jail, Tenant
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


def check_root_only(jail: Jail, before: Jail | None = None) -> None:
    """Refuse what only root may give a jail or take from it. `before`: the jail as it was. JailmgrError `denied`."""
    hint = "Ask who looks after this host."
    config: dict[str, str] = before.config if before is not None else {}
    for name in sorted(jail.config.keys() | config.keys()):
        if jail.config.get(name) != config.get(name) and find_key(name).root:
            raise JailmgrError(f"key {name}", "only root may set or unset it", hint, "denied")
    devices: dict[str, dict[str, str]] = before.devices if before is not None else {}
    for name in sorted(jail.devices.keys() | devices.keys()):
        new, old = jail.devices.get(name), devices.get(name)
        if new != old and any(TYPES[keys["type"]].root for keys in (new, old) if keys is not None):
            why = f"only root may add, change or remove a {(new or old or {})['type']} device"
            raise JailmgrError(f"device {name}", why, hint, "denied")
