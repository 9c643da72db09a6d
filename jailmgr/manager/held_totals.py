"""What each tenant's group was last held to."""

from __future__ import annotations

from jailmgr.runtime import cgroups
from jailmgr.runtime.cgroups import Hierarchies, Limits


class HeldTotals:
    """A group that was made again is held to nothing."""

    def __init__(self) -> None:
        self._by_tenant: dict[str, tuple[Limits, int]] = {}
        """The limits, and the group's identity."""

    def __contains__(self, tenant: object) -> bool:
        return tenant in self._by_tenant

    def are(self, tenant: str, limits: Limits, hierarchies: Hierarchies, group: str) -> bool:
        return self._by_tenant.get(tenant) == (limits, cgroups.identity(hierarchies, group))

    def put(self, tenant: str, limits: Limits, hierarchies: Hierarchies, group: str) -> None:
        self._by_tenant[tenant] = (limits, cgroups.identity(hierarchies, group))

    def doubt(self, tenant: str) -> None:
        """Have the limits set again, whatever they are."""
        self._by_tenant[tenant] = (Limits(), 0)

    def forget(self, tenant: str) -> None:
        self._by_tenant.pop(tenant, None)
