"""How many CPUs each tenant's jails keep busy, from one look at them to the next."""

from __future__ import annotations

import time

LOOK_SECONDS = 0.2
"""CPU time of less than that makes no mean."""


class CpuMeter:
    """By tenant: when its CPU time was last looked at (monotonic), the time, and the mean number of CPUs then."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, int, float | None]] = {}

    def mean(self, tenant: str, cpu_ns: int) -> float | None:
        """Number of CPUs it kept busy since somebody looked, a moment ago or more; None where nobody has.

        The group may be older than this engine: its whole CPU time is no difference.
        """
        now = time.monotonic()
        at, before, mean = self._seen.setdefault(tenant, (now, cpu_ns, None))
        if now - at >= LOOK_SECONDS:
            mean = round(max(0, cpu_ns - before) / 1e9 / (now - at), 2)
            self._seen[tenant] = (now, cpu_ns, mean)
        return mean

    def forget(self, tenant: str) -> None:
        self._seen.pop(tenant, None)
