"""Children of the supervisor that it never heard of: an enterer killed between its clone and its word on it.

The kernel does that in a jail at its memory limit. The zombie of such a child must be reaped, for process 1 of a pid
namespace ends after all others in it are gone, so that the jail could not be stopped (pid_namespaces(7)).
"""

from __future__ import annotations

import os
import signal

from jailmgr.runtime.loop import Loop

_SECONDS = 0.5


class Strays:
    """`look` when an enterer has failed: who is unknown at two looks in a row is killed and reaped."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._seen: set[int] = set()
        self._looking = False

    def look(self) -> None:
        if not self._looking:
            self._looking = True
            self._loop.after(_SECONDS, self._sweep)

    def _sweep(self) -> None:
        self._looking = False
        unknown = _children() - _known()
        for pid in unknown & self._seen:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
            except (ProcessLookupError, ChildProcessError):
                continue
        self._seen = unknown
        if unknown:
            self.look()


def _children() -> set[int]:
    """proc_pid_task(5), `children`: needs CONFIG_PROC_CHILDREN, which distributions have."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return {int(child) for child in file.read().split()}
    except FileNotFoundError:
        return set()


def _known() -> set[int]:
    """The processes we hold pidfds of (proc_pid_fdinfo(5)): every child has one from the time that it is known."""
    found: set[int] = set()
    for fd in os.listdir("/proc/self/fdinfo"):
        try:
            with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            continue
        found.update(int(line[4:]) for line in lines if line.startswith(b"Pid:"))
    return found
