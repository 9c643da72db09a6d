"""Which CPUs a jail with `limits.cpu` has: as many as that says, of the host's those that the fewest such jails have.

Kept in memory, by what starts and ends; the bundle of a jail that runs has them too, for a reboot and the next engine.
"""

from __future__ import annotations

import threading
from collections import Counter

from jailmgr.errors import JailmgrError
from jailmgr.manager.context import Context
from jailmgr.model import Jail
from jailmgr.runtime.bundle import load_bundle
from jailmgr.runtime.cgroup_cpuset import format_cpus, parse_cpus
from jailmgr.runtime.cgroups import host_cpus
from jailmgr.runtime.state import read_state


class Pins:
    """The CPUs of running jails that have not all of them, by tenant and name."""

    def __init__(self, m: Context) -> None:
        self._m = m
        self._lock = threading.Lock()
        self._cpus: dict[tuple[str, str], str] = {}

    def of(self, jail: Jail) -> str | None:
        """Return the CPUs that a jail has now; None is all."""
        return self._cpus.get((jail.tenant, jail.name))

    def choose(self, jail: Jail) -> str | None:
        """Choose the CPUs of a jail that runs or is about to, in the form of Limits.cpus; None is all.

        A jail without `limits.cpu`, or with one of as many CPUs as the host has, gets all. A jail keeps its CPUs while
        their number is the same.
        """
        key, wanted = (jail.tenant, jail.name), int(jail.config.get("limits.cpu", 0))
        with self._lock:
            has = self._cpus.get(key)
            if has is not None and len(parse_cpus(has)) == wanted:
                return has
            self._cpus.pop(key, None)
            there = host_cpus(self._m.hierarchies, self._m.root.cgroup) if wanted else []
            if wanted >= len(there):
                return None
            self._cpus[key] = choose_cpus(there, list(self._cpus.values()), wanted)
            return self._cpus[key]

    def follow(self, tenant: str, name: str) -> None:
        """Take the CPUs that the bundle of a running jail names; free those of a jail that has ended."""
        row = self._m.store.find_row(tenant, name)
        cpus = None
        if row is not None and "limits.cpu" in row.jail.config and read_state(self._m.root, tenant, name) is not None:
            try:
                cpus = load_bundle(self._m.root.jail_lib(tenant, name)).limits.cpus
            except JailmgrError:
                cpus = None  # being deleted
        with self._lock:
            if cpus is None:
                self._cpus.pop((tenant, name), None)
            else:
                self._cpus[tenant, name] = cpus

    def forget(self, jail: Jail) -> None:
        """Free the CPUs of a jail that could not be started."""
        with self._lock:
            self._cpus.pop((jail.tenant, jail.name), None)


def choose_cpus(there: list[int], taken: list[str], number: int) -> str:
    """So many of those there, by how many have them."""
    users = Counter(cpu for cpus in taken for cpu in parse_cpus(cpus))
    return format_cpus(sorted(there, key=lambda cpu: (users[cpu], cpu))[:number])
