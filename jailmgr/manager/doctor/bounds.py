"""How much is in use of what a host has once for all jails, against the kernel's bound of it.

What counts per tenant is not here (fs.inotify.*, user.max_*): a tenant that uses it up is the only one without.
"""

from __future__ import annotations

from jailmgr.manager.doctor.check import Check, check, read
from jailmgr.runtime import apparmor, cgroups
from jailmgr.runtime.cgroup_bounds import JAIL_GROUPS

PROC = "/proc"
MUCH = 0.75
"""Share of a bound from which on there is a warning."""
MEMORY_GROUPS = 65535
"""Ids of memory groups that a kernel has (mm/memcontrol.c, MEM_CGROUP_ID_MAX)."""


def bounds_checks() -> list[Check]:
    return [_pressure(), *_terminals(), *_processes(), *_keys(), *_memory_groups()]


def _pressure() -> Check:
    """Pressure stall information: a trigger costs a real-time kernel thread for each group that has one."""
    if not read(f"{PROC}/pressure/cpu"):
        return check("pressure", True, "no pressure stall information")
    detail = f"on: a guest can have {JAIL_GROUPS} real-time threads of the kernel"
    if apparmor.enabled():
        return check("pressure", True, "on, and denied to guests by AppArmor")
    return check("pressure", False, detail, "Boot with psi=0, or with AppArmor (apparmor=1).", "warning")


def _terminals() -> list[Check]:
    used, most, kept = (_number(f"sys/kernel/pty/{name}") for name in ("nr", "max", "reserve"))
    if used is None or most is None:
        return []
    # The host's own devpts has `kept` that no jail gets.
    return [_use("terminals", used, most - (kept or 0), "for all jails", "sysctl -w kernel.pty.max={more}", most)]


def _processes() -> list[Check]:
    most = min(filter(None, (_number("sys/kernel/pid_max"), _number("sys/kernel/threads-max"))), default=None)
    _, _, threads = read(f"{PROC}/loadavg").partition("/")
    if most is None or not threads:
        return []
    return [_use("processes", int(threads.split()[0]), most, "on the host", "sysctl -w kernel.pid_max={more}", most)]


def _keys() -> list[Check]:
    """Keys of each user, a jail's root being one (proc_keys(5), /proc/key-users)."""
    near = []
    for line in read(f"{PROC}/key-users").splitlines():
        user, _, rest = line.strip().partition(":")
        for pair in rest.split()[2:4]:
            used, _, most = pair.partition("/")
            if int(used) >= MUCH * int(most):
                near.append(f"uid {user} {used} of {most}")
    detail = f"much used: {', '.join(near[:8])}" if near else "no user is near the bounds"
    remedy = "sysctl -w kernel.keys.maxkeys=2000 kernel.keys.maxbytes=2000000, or what the jail's services need"
    return [check("keys", not near, detail, remedy, "warning")]


def _memory_groups() -> list[Check]:
    """Only v2 lets guests make such groups; removed ones keep their id while memory of theirs is in use."""
    h = cgroups.discover()
    if "memory" not in h.v2:
        return []
    stat = read(f"{h.unified}/cgroup.stat")
    fields = dict(line.split() for line in stat.splitlines())
    names = ("nr_subsys_memory", "nr_dying_subsys_memory")
    if names[0] not in fields:  # before Linux 6.13, all groups
        names = ("nr_descendants", "nr_dying_descendants")
    used = sum(int(fields.get(name, "0")) for name in names)
    return [_use("memory groups", used, MEMORY_GROUPS, "on the host", "Stop jails whose guests make many groups.", 0)]


def _use(name: str, used: int, most: int, whose: str, remedy: str, now: int) -> Check:
    """`now`: the sysctl's value, of which the remedy is twice as much."""
    enough = used < MUCH * most
    return check(name, enough, f"{used} of {most} {whose} in use", remedy.format(more=2 * now), "warning")


def _number(name: str) -> int | None:
    text = read(f"{PROC}/{name}")
    return int(text) if text.isdigit() else None
