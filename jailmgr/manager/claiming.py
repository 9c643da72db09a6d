"""A tenant's uid and a jail's id range, claimed on the host before they are used.

Claims live in /run and are lost when the host boots. Nothing on disk depends on either (owners are 0-based), so what
another instance has taken meanwhile is chosen anew, unless jails run with it.
"""

from __future__ import annotations

import msgspec

from jailmgr import claims
from jailmgr.errors import JailmgrError
from jailmgr.keys import IDS
from jailmgr.manager.context import Context
from jailmgr.model import Jail
from jailmgr.runtime.state import running_jails


def idmap_key(jail: Jail) -> str:
    """The key of a jail's id range: a rename doesn't change it."""
    return f"jail/{jail.id}"


def idmap_size(jail: Jail) -> int:
    """The number of ids that the jail's next start gives it."""
    return int(jail.config.get("security.idmap.size", IDS))


class Claims:
    """What this process has claimed on the host."""

    def __init__(self, m: Context) -> None:
        self._m = m
        self._claimed: set[str] = set()
        """Keys."""

    def uid(self, tenant: str) -> int:
        """The host uid that makes the tenant's user namespaces, kept in the store when it had to be another."""
        uid, key = self._m.store.tenant(tenant).uid, f"uid/{tenant}"
        if key not in self._claimed:
            try:
                claims.claim_uid(self._m.root, tenant, uid)
            except JailmgrError as error:
                if error.code != "conflict" or running_jails(self._m.root, tenant):
                    raise
                uid = claims.claim_uid(self._m.root, tenant)
                self._m.store.set_tenant_uid(tenant, uid)
            self._claimed.add(key)
        return uid

    def idmap(self, jail: Jail, resize: bool = True) -> Jail:
        """Claim an id range for a jail that doesn't run; return the jail with it. The store keeps what has changed.

        `resize`: give the range the size that the jail's key asks for. The range of a jail that a supervisor is about
        to start again stays as it is in config.json. A jail that the default has no room for keeps its size.
        Raises JailmgrError `full`.
        """
        size = idmap_size(jail) if resize else jail.idmap_size
        if idmap_key(jail) in self._claimed and jail.idmap_size == size:
            return jail
        try:
            base = self._claim(jail, size)
        except JailmgrError as error:
            if error.code != "full" or not jail.idmap_base or "security.idmap.size" in jail.config:
                raise
            size = jail.idmap_size
            base = self._claim(jail, size)
        if (base, size) != (jail.idmap_base, jail.idmap_size):
            jail = msgspec.structs.replace(jail, idmap_base=base, idmap_size=size)
            self._m.store.update(jail)
        self._claimed.add(idmap_key(jail))
        return jail

    def _claim(self, jail: Jail, size: int) -> int:
        """The first id of a range of that size, where the jail's own begins if there is room."""
        try:
            return claims.claim_idmap(self._m.root, idmap_key(jail), jail.idmap_base or None, size, jail.idmap_size)
        except JailmgrError as error:
            if error.code != "conflict":
                raise
            return claims.claim_idmap(self._m.root, idmap_key(jail), None, size)

    def release(self, jail: Jail) -> None:
        """Give a jail's id range back."""
        self._claimed.discard(idmap_key(jail))
        claims.release(self._m.root, "idmap", idmap_key(jail))

    def forget_uid(self, tenant: str) -> None:
        """The tenant is deleted; its claim is given back elsewhere."""
        self._claimed.discard(f"uid/{tenant}")
