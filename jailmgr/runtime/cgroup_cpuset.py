"""Which CPUs a group's processes run on, so that what counts CPUs (sched_getaffinity(2), nproc) counts these.

On v2 a file of the group (cgroup-v2.rst, "Cpuset Interface Files"). On v1 a hierarchy of its own (cgroup-v1's
cpusets.rst), in which each jail has a group, with all CPUs where it has no such limit. Nothing can join a group of it
before that, and all above it, have CPUs and memory nodes. CPUs are written as the kernel's lists: `0-2,5`. Standard
library only.
"""

from __future__ import annotations

import os

from jailmgr.errors import JailmgrError
from jailmgr.runtime.cgroup_hierarchies import Hierarchies, read, read_or, relative, write
from jailmgr.runtime.cgroup_processes import members

_ROUNDS = 20


def parse_cpus(text: str) -> list[int]:
    """[0, 1, 2, 5] of `0-2,5`. Raises ValueError."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def format_cpus(cpus: list[int]) -> str:
    return ",".join(map(str, sorted(cpus)))


def host_cpus(h: Hierarchies, root_name: str) -> list[int]:
    """The CPUs that groups below our root may have; empty where the host has no cpuset controller for them."""
    if "cpuset" in h.v2:
        for group in (f"{h.unified}/{relative(root_name)}", h.unified):
            if text := read_or(f"{group}/cpuset.cpus.effective", ""):
                return parse_cpus(text)
    return parse_cpus(read_or(f"{h.cpuset}/cpuset.cpus", "")) if h.cpuset else []


def make_cpuset(h: Hierarchies, cgroup: str, cpus: str | None) -> None:
    """For a jail that is about to start: with v1, its group there, with these CPUs or all. Raises OSError.

    CPUs that the host no longer has are left out; with none left it has all.
    """
    if not h.cpuset:
        return
    above, jail = h.cpuset, relative(cgroup)
    path = ""
    for name in jail.split("/"):
        path = f"{path}/{name}".lstrip("/")
        group = f"{h.cpuset}/{path}"
        if not os.path.isdir(group):
            os.makedirs(group, 0o755, exist_ok=True)
        _write(f"{group}/cpuset.mems", read(f"{above}/cpuset.mems"))
        wanted = read(f"{above}/cpuset.cpus")
        if path == jail and cpus is not None:
            wanted = format_cpus([cpu for cpu in parse_cpus(cpus) if cpu in parse_cpus(wanted)]) or wanted
        _write(f"{group}/cpuset.cpus", wanted)
        if path != jail and read(f"{group}/cgroup.clone_children") != "1":
            # A new group gets the CPUs and memory nodes of this one: a write of them costs some milliseconds.
            write(f"{group}/cgroup.clone_children", "1")
        above = group


def pin(h: Hierarchies, cgroup: str, cpus: str | None) -> None:
    """Have a group run on these CPUs, None: on all; also one with processes. Nothing without the controller.

    Raises OSError; JailmgrError `conflict` where processes come faster than they can be moved (v1).
    """
    if "cpuset" in h.v2:
        at = f"{h.unified}/{relative(cgroup)}"
        if cpus is not None or read(f"{at}/cpuset.cpus"):
            # Not emptied again: Debian 12's Linux 6.1 refuses that of a group with processes (ENOSPC).
            _write(f"{at}/cpuset.cpus", cpus or read(f"{os.path.dirname(at)}/cpuset.cpus.effective"))
        return
    group = f"{h.cpuset}/{relative(cgroup)}" if h.cpuset else ""
    if not group:
        return
    if os.path.isdir(group):
        _write(f"{group}/cpuset.cpus", cpus or read(f"{os.path.dirname(group)}/cpuset.cpus"))
    elif cpus is not None:
        make_cpuset(h, cgroup, cpus)
        _move_all(h, cgroup, f"{group}/cgroup.procs")


def _write(path: str, cpus: str) -> None:
    """Where another list is there: a write of the same one has the kernel rebuild its scheduling domains."""
    if parse_cpus(read(path)) != parse_cpus(cpus):
        write(path, cpus)


def _move_all(h: Hierarchies, cgroup: str, procs: str) -> None:
    for _ in range(_ROUNDS):
        inside = {int(line) for line in read(procs).split()}
        outside = [pid for pid in members(h, cgroup) if pid not in inside]
        if not outside:
            return
        for pid in outside:
            try:
                write(procs, str(pid))
            except ProcessLookupError:
                continue
    raise JailmgrError(f"CPUs of {cgroup}", "its processes fork faster than they can be moved", "", "conflict")
