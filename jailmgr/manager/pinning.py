"""Which CPUs a jail with `limits.cpu` has: as many as that says, of the host's those that the fewest such jails have.

Kept in memory, by what starts and ends; the bundle of a jail that runs has them too, for a reboot and the next engine.
"""

from __future__ import annotations

from collections import Counter

from jailmgr.errors import JailmgrError
from jailmgr.manager.host import Manager
from jailmgr.model import Jail
from jailmgr.runtime.bundle import load_bundle
from jailmgr.runtime.cgroup_cpuset import format_cpus, parse_cpus
from jailmgr.runtime.cgroups import host_cpus
from jailmgr.runtime.state import read_state


def cpus_for(m: Manager, jail: Jail) -> str | None:
    """Those of a jail that runs or is about to, as Limits has them; None is all: it has no `limits.cpu`, or no less.

    It keeps what it has while the number is the same.
    """
    key, wanted = (jail.tenant, jail.name), int(jail.config.get("limits.cpu", 0))
    with m.pins_lock:
        has = m.pins.get(key)
        if has is not None and len(parse_cpus(has)) == wanted:
            return has
        m.pins.pop(key, None)
        there = host_cpus(m.hierarchies, m.root.cgroup) if wanted else []
        if wanted >= len(there):
            return None
        m.pins[key] = choose_cpus(there, list(m.pins.values()), wanted)
        return m.pins[key]


def choose_cpus(there: list[int], taken: list[str], number: int) -> str:
    """So many of those there, by how many have them."""
    users = Counter(cpu for cpus in taken for cpu in parse_cpus(cpus))
    return format_cpus(sorted(there, key=lambda cpu: (users[cpu], cpu))[:number])


def follow_pin(m: Manager, tenant: str, name: str) -> None:
    """A jail has been started, found or has ended: what its bundle says is taken, or free again."""
    row = m.store.find_row(tenant, name)
    cpus = None
    if row is not None and "limits.cpu" in row.jail.config and read_state(m.root, tenant, name) is not None:
        try:
            cpus = load_bundle(m.root.jail_lib(tenant, name)).limits.cpus
        except JailmgrError:
            cpus = None  # being deleted
    with m.pins_lock:
        if cpus is None:
            m.pins.pop((tenant, name), None)
        else:
            m.pins[tenant, name] = cpus


def forget_pin(m: Manager, tenant: str, name: str) -> None:
    """It could not be started."""
    with m.pins_lock:
        m.pins.pop((tenant, name), None)
