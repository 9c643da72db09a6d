"""The supervisor's children: every one is reaped, whoever made it.

What a program begun by `exec` makes with CLONE_PARENT (clone(2)) is the supervisor's child as well, and nobody else can
reap it. Process 1 of a pid namespace ends only after all others in it have been reaped (pid_namespaces(7)): one zombie
would keep the jail from ending. The same goes for a child whose enterer was killed before it reported the child's pid.

A child may also make the supervisor its tracer (PTRACE_TRACEME, ptrace(2)). It then stops at each signal until its
tracer acts, so the supervisor detaches from it, and the signal takes effect.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from jailmgr.runtime import process
from jailmgr.runtime import syscalls as kernel
from jailmgr.runtime.loop import Loop

_AT_ONCE, _PAUSE = 64, 0.01
"""A guest makes children without end: so many are reaped in that many seconds. Zombies count in its pids cgroup, so
the guest waits, and the supervisor's other jails do not."""
_KEPT = 4096
_ENDS = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)
_OF_TRACING = (signal.SIGTRAP, signal.SIGSTOP)
"""Signals that are sent because of the tracing (execve(2), CLONE_PTRACE), and mean nothing without it."""


class Exit(NamedTuple):
    """How a child ended: CLD_EXITED and its status, or CLD_KILLED or CLD_DUMPED and a signal (waitid(2))."""

    code: int
    status: int

    @property
    def wait_status(self) -> int:
        """As wait(2) reports it."""
        return self.status << 8 if self.code == os.CLD_EXITED else self.status


class Reaper:
    """Reaps at each SIGCHLD. An owner of a child asks `collect` or `report` once the child's pidfd is readable."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._exits: dict[int, Exit] = {}
        self._held: dict[int, Callable[[Exit | None], None]] = {}
        self._last = 0.0
        self._scheduled = False
        self._read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        loop.watch(self._read_end, lambda _: self._woken())
        signal.signal(signal.SIGCHLD, lambda *_: None)  # set_wakeup_fd takes signals that have a handler
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self.look()

    def collect(self, pid: int) -> Exit | None:
        """How a child of ours ended, and reap it; None where it is not one, or has not ended."""
        found = self._exits.pop(pid, None)
        if found is not None:
            return found
        try:
            info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | kernel.WALL)
        except ChildProcessError:
            return None
        return Exit(info.si_code, info.si_status) if info is not None and info.si_code in _ENDS else None

    def report(self, pid: int, callback: Callable[[Exit | None], None], within: float | None = None) -> None:
        """Call `callback` with how a child that has ended ended: at once, or when the child's tracer lets go of it.

        A process that the guest traces is reported to its tracer first, which may keep the zombie (ptrace(2)). None
        where it is no child of ours, or was kept for `within` seconds.
        """
        how = self.collect(pid)
        if how is not None or not self.has(pid):
            callback(how)
            return
        self._held[pid] = callback
        if within is not None:
            self._loop.after(within, lambda: self._give_up(pid, callback))

    def _give_up(self, pid: int, callback: Callable[[Exit | None], None]) -> None:
        if self._held.get(pid) is callback:
            del self._held[pid]
            callback(None)

    def is_new(self, pid: int) -> None:
        """Forget how an earlier child with this pid ended: pids come again, and a guest's own children are kept, too.

        Called while the new child cannot have been reaped yet.
        """
        self._exits.pop(pid, None)

    def has(self, pid: int) -> bool:
        """Whether it is a child of ours that nobody has collected."""
        if pid in self._exits:
            return True
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT | kernel.WALL)
        except ChildProcessError:
            return False
        return True

    def look(self) -> None:
        """Reap what has ended, soon."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.after(max(0.0, self._last + _PAUSE - monotonic()), self._sweep)

    def _woken(self) -> None:
        try:
            while os.read(self._read_end, 4096):
                continue
        except BlockingIOError:
            pass
        self.look()

    def _sweep(self) -> None:
        self._scheduled, self._last = False, monotonic()
        for _ in range(_AT_ONCE):
            try:
                # Stops of those that made us their tracer are reported along with ends.
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | kernel.WALL)
            except ChildProcessError:
                return
            if info is None:
                return
            if info.si_code in _ENDS:
                self._keep(info.si_pid, Exit(info.si_code, info.si_status))
            else:
                number = info.si_status & 0x7F
                kernel.detach_tracee(info.si_pid, 0 if number in _OF_TRACING else number)
        self.look()

    def _keep(self, pid: int, how: Exit) -> None:
        """Give it to its owner, or keep it for the owner, who may not have been called yet. A guest's own has none."""
        if (callback := self._held.pop(pid, None)) is not None:
            callback(how)
            return
        self._exits.pop(pid, None)
        self._exits[pid] = how
        if len(self._exits) > _KEPT:
            del self._exits[next(iter(self._exits))]


def wait_killed(pid: int, seconds: float = 5.0) -> None:
    """Reap a child that was killed, within so many seconds; later the reaper does."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if process.has_ended(pidfd, seconds):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | kernel.WALL)
    except ChildProcessError:
        return
    finally:
        os.close(pidfd)
