"""Bounds over all that guests make together: cgroups, and the numbers of processes.

A guest makes groups below its `payload` (cgroup-v2.rst, "Delegation"), and each group costs the host two things that no
limit of the jail counts. Where the host has pressure stall information, a trigger that the guest's root writes to a
pressure file of its group gets a real-time kernel thread (kernel/sched/psi.c: one `psimon` for each group, for writers
with CAP_SYS_RESOURCE in any user namespace). On a host with cgroup v2 alone, a group with the memory controller takes
one of the kernel's 65,535 ids of memory groups (mm/memcontrol.c). cgroup.max.descendants bounds both: for a jail, for
the jails of a tenant, and for all jails.

Processes are numbered up to kernel.pid_max on the whole host. Jails together may not have all of these numbers.
Standard library only.
"""

from __future__ import annotations

from jailmgr.runtime.cgroup_hierarchies import SYSTEMD, Hierarchies, directory, read, write

JAIL_GROUPS = 256
"""Measured: 8 groups in an idle Debian 12, 10 in a Debian 13, and 6 more for each user with a systemd of his own. So a
guest has room for 20 such users and as many nested containers that boot systemd."""
TENANT_GROUPS = 32768
"""Half of the memory groups' ids, which 120 jails can use up that all make as many groups as they may."""
ALL_GROUPS = 57344
"""Seven eighths of these ids: the rest is the host's."""

RESERVE_LEAST = 1024
"""Processes and threads that the host has to itself."""


def hold(path: str, name: str, value: int) -> None:
    """Write a bound of a group, unless it is there already. Raises OSError."""
    if read(f"{path}/{name}") != str(value):
        write(f"{path}/{name}", str(value))


def tasks_max() -> int:
    """Number of processes and threads that all jails together may have: the kernel's most, less an eighth."""
    most = min(int(read("/proc/sys/kernel/pid_max")), int(read("/proc/sys/kernel/threads-max")))
    return max(most - max(most // 8, RESERVE_LEAST), 1)


def hold_processes(h: Hierarchies, root_name: str) -> None:
    """Bound the processes of all jails. Nothing is done with systemd, where it is the scope's TasksMax=, or without a
    pids controller. Raises OSError.
    """
    path = directory(h, "pids", root_name)
    if path is not None and not SYSTEMD:
        hold(path, "pids.max", tasks_max())
