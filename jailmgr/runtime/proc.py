"""Processes that can't be taken for another: by pid and start time, and by pidfd. On the way of `exec`."""

from __future__ import annotations

import os
from typing import NamedTuple

from jailmgr.runtime.plainfile import read_bytes


class Process(NamedTuple):
    """Pid, and start time in clock ticks since boot (proc_pid_stat(5))."""

    pid: int
    starttime: int


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None when there is no such process, or only its zombie."""
    try:
        fields = read_bytes(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def open_process(process: Process) -> int | None:
    """A pidfd of just this process, None when it has ended (pidfd_open(2))."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if start_time(process.pid) != process.starttime:
        os.close(pidfd)
        return None
    return pidfd
