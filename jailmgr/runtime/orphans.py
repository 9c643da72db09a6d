"""Processes that a killed supervisor left on their way into a jail.

`exec`, and the adoption of a jail, fork a child that is born in the jail's cgroup. Where that group is frozen (a paused
jail, or a guest that froze `.exec`), the child stops before its first instruction, with copies of all of the
supervisor's fds: its lock and its listening socket. Those outlive the supervisor then. The next supervisor would wait
for the lock for ever, and clients would connect to a socket that nobody listens at.
"""

from __future__ import annotations

import fcntl
import os
import signal

from jailmgr.runtime.jsonfile import read_json
from jailmgr.runtime.plainfile import read_bytes
from jailmgr.runtime.proc import start_time
from jailmgr.runtime.state import LOCK


def end_orphans(run: str) -> None:
    """Kill every process that holds the tenant's lock and is not the supervisor named in it. Raises OSError.

    The caller keeps other supervisors from being started meanwhile. In v2's freezer, a process can be killed.
    """
    path = f"{run}/{LOCK}"
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        named = read_json(path) or {}
        pid = int(named.get("pid", 0))
        supervisor = pid if start_time(pid) == named.get("starttime") else 0
        for holder in _holders(os.path.realpath(path)):
            if holder not in (supervisor, os.getpid()):
                _kill(holder)
    finally:
        os.close(lock)


def _holders(path: str) -> list[int]:
    """Pids of the processes that share the lock. Those that only read the file have it open without one.

    No file is looked at: one of a hung file system would block.
    """
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _holds(name, path)]


def _holds(pid: str, path: str) -> bool:
    """proc_pid_fdinfo(5): an open file description with a lock has a line `lock:`."""
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(f"/proc/{pid}/fd/{fd}") == path and b"lock:" in read_bytes(f"/proc/{pid}/fdinfo/{fd}"):
                    return True
            except FileNotFoundError:
                continue
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return False


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
