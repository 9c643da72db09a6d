"""What a jail's /proc says of memory and CPUs, and the lxcfs of an instance: for tests here and in the lab VM."""

from __future__ import annotations

import os
import time
from pathlib import Path

from jailmgr.runtime.cgroup_cpuset import parse_cpus
from jailmgr.runtime.lxcfs import FILES, ONLINE
from tests.system.instance import Instance, kill, until

NAMES = [path.removeprefix("proc/") for path in FILES]
"""lxcfs' files in /proc."""
NUMBER = f"nproc; grep -c ^processor /proc/cpuinfo; head -n 1 /{ONLINE}"


def meminfo(host: Instance, name: str, field: str = "MemTotal") -> int:
    """KiB."""
    text = host.exec(name, "cat", "/proc/meminfo").out
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{field}:"))


def cpus(host: Instance, name: str) -> tuple[int, ...]:
    """How many there are by its affinity, its cpuinfo and the list that sysconf(_SC_NPROCESSORS_ONLN) counts."""
    affinity, listed, online = host.sh(name, NUMBER).out.split()
    return int(affinity), int(listed), len(parse_cpus(online))


def began(host: Instance, name: str) -> int:
    """When it was booted, as ps(1) reckons: seconds since 1970."""
    return int(host.sh(name, "grep btime /proc/stat").out.split()[1])


def mounts(host: Instance, name: str) -> list[tuple[str, str]]:
    """Number and point of each mount of a running jail, as the host sees them."""
    text = Path("/proc", str(host.info(name)["init_pid"]), "mountinfo").read_text()
    return [(line.split()[0], line.split()[4]) for line in text.splitlines()]


def covered(host: Instance, name: str) -> list[str]:
    """Paths of its tree that lxcfs' files lie on, one for each time."""
    text = Path("/proc", str(host.info(name)["init_pid"]), "mountinfo").read_text()
    return sorted(line.split()[4].removeprefix("/") for line in text.splitlines() if "fuse.lxcfs" in line)


def lxcfs_pid(host: Instance) -> int:
    """0: it is about to write it."""
    return int(Path(host.root.run, "lxcfs", "pid").read_text() or 0)


def kill_lxcfs(host: Instance) -> int:
    """SIGKILL of the instance's own; its pid."""
    pid = lxcfs_pid(host)
    assert os.fsencode(f"{host.root.run}/") in Path("/proc", str(pid), "cmdline").read_bytes()
    kill(pid)
    return pid


def wait_renewed(host: Instance, old: int) -> None:
    """Until another lxcfs runs and each jail has been given its files."""
    until(
        lambda: lxcfs_pid(host) not in (0, old) and not Path(host.root.run, "lxcfs", "stale").exists(),
        20,
        "another lxcfs runs, and all jails have its files",
    )


def check_view(host: Instance, name: str, mebibytes: int) -> None:
    """A jail with so much memory and all CPUs sees that, and lxcfs' files, each once; when it began is its own."""
    assert covered(host, name) == sorted(FILES)
    assert abs(began(host, name) - time.time()) < 600
    assert meminfo(host, name) == mebibytes << 10
    assert meminfo(host, name, "MemAvailable") <= mebibytes << 10
    for file in FILES:
        host.sh(name, f"cat /{file} >/dev/null")
