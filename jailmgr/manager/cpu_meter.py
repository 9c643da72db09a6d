"""How many CPUs each tenant's jails keep busy, from one look at them to the next."""

from __future__ import annotations

import time

LOOK_SECONDS = 0.2
"""CPU time of less than that makes no mean."""


class CpuMeter:
    """Each tenant's mean is from one look to the next."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, int, float | None]] = {}
        """By tenant: time of the last look (monotonic), CPU time then, and the mean number of CPUs then."""

    def mean(self, tenant: str, cpu_ns: int) -> float | None:
        """Return the number of CPUs that a tenant kept busy since the last look; None where there was none.

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
