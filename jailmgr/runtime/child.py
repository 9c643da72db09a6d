"""A program in a jail that belongs to a session: from the enterer that brings it there to its exit status."""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING, Any

from jailmgr.errors import JailmgrError
from jailmgr.runtime import protocol
from jailmgr.runtime.process import pid_of
from jailmgr.runtime.pty import check_master
from jailmgr.runtime.reaper import Exit

if TYPE_CHECKING:
    from jailmgr.runtime.session import Session


KILL_SECONDS = 5.0
"""For an enterer that is to be killed, to report its program's pid first."""
HELD_SECONDS = 5.0
"""For a tracer in the jail to let go of a program that has ended."""


def told(error: JailmgrError) -> dict[str, Any]:
    """An error as an answer."""
    return {"error": error.as_dict()}


def _send_signal(pidfd: int, number: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return


class Child:
    """Its control socket, and its pidfd once it is known."""

    def __init__(self, session: Session, enterer: int, control: socket.socket) -> None:
        self._session = session
        self._control: socket.socket | None = control
        self._enterer, self._enterer_pid = os.pidfd_open(enterer), enterer
        self.pidfd, self._pid = -1, 0
        self.signalled = False
        self._early_signals: list[int] = []
        """They came before the program's pid; each number once."""
        self._failed: dict[str, Any] | None = None
        self._finished = False
        self._early: Exit | None = None
        """How the program ended, where that was before its pid was known here."""
        self._loop, self._reaper = session.supervisor.loop, session.supervisor.host.reaper
        self._reaper.is_new(enterer)
        self._loop.watch(self._enterer, lambda _: self._entered())
        self._loop.watch(control.fileno(), self._control_ready)

    @classmethod
    def of_program(cls, session: Session, pidfd: int, signalled: bool) -> Child:
        """A program that runs, begun by the release before (runtime/reexec.py)."""
        child = cls.__new__(cls)
        child._session, child._control, child._enterer, child._early = session, None, -1, None
        child._finished, child._early_signals = False, []
        child._loop, child._reaper = session.supervisor.loop, session.supervisor.host.reaper
        child.pidfd, child._pid, child.signalled, child._failed = pidfd, pid_of(pidfd), signalled, None
        child._loop.watch(pidfd, lambda _: child._ended())
        return child

    @property
    def steady(self) -> bool:
        """The program runs, and nothing is on its way between it and us."""
        return self.pidfd >= 0 and self._enterer < 0 and self._control is None and self._failed is None

    def signal(self, number: int) -> None:
        """Before there is a program the enterer takes it: a guest that has frozen `.exec` would keep that for ever.

        The program may run already: the enterer blocks signals from before it makes the program until it has reported
        the pid, and then the program gets those that came too early. SIGKILL cannot be blocked.
        """
        self.signalled = True
        if self.pidfd >= 0:
            _send_signal(self.pidfd, number)
            return
        if self._enterer < 0:
            return
        if number not in self._early_signals:
            self._early_signals.append(number)
        if number == signal.SIGKILL:
            _send_signal(self._enterer, signal.SIGTERM)
            _send_signal(self._enterer, signal.SIGCONT)  # where it was stopped
            self._loop.after(KILL_SECONDS, self._kill_enterer)
        else:
            _send_signal(self._enterer, number)

    def _kill_enterer(self) -> None:
        """The guest has frozen it before it reported the pid."""
        if self._enterer >= 0 and self.pidfd < 0:
            _send_signal(self._enterer, signal.SIGKILL)

    def _entered(self) -> None:
        """The enterer has ended: what it said is there to read."""
        self._loop.forget(self._enterer)
        how = self._reaper.collect(self._enterer_pid)
        os.close(self._enterer)
        self._enterer = -1
        while self._control is not None and self._heard():
            pass
        if self.pidfd >= 0:
            return
        if self._early is None and self.signalled and how is not None and how.code != os.CLD_EXITED:
            killed = signal.SIGKILL in self._early_signals
            self._early = Exit(os.CLD_KILLED, signal.SIGKILL) if killed else how
        self._finish(self._early)

    def _control_ready(self, _: int) -> None:
        self._heard()

    def _heard(self) -> bool:
        if self._control is None:
            return False
        try:
            said = protocol.receive(self._control)
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            said = None
        if said is None:
            self._loop.forget(self._control.fileno())
            self._control.close()
            self._control = None
            return False
        if "error" in said.body:
            self._failed = said.body
        elif "tty" in said.body and said.fds:
            self._offer_terminal(said.fds)
        elif "pid" in said.body and self.pidfd < 0:
            self._take_program(int(said.body["pid"]))
        else:
            protocol.close_all(said.fds)
        return True

    def _take_program(self, pid: int) -> None:
        """Watch the program. A process that is no child of ours is not what it says, and no signal goes there."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._early = self._reaper.collect(pid)
            return
        self._reaper.is_new(pid)  # one that has a pidfd has not been reaped
        if not self._reaper.has(pid):
            os.close(pidfd)
            self._failed = told(JailmgrError("exec", f"process {pid} is no child of the supervisor"))
            return
        self.pidfd, self._pid = pidfd, pid
        self._loop.watch(pidfd, lambda _: self._ended())
        for number in self._early_signals:
            _send_signal(pidfd, number)

    def _offer_terminal(self, fds: list[int]) -> None:
        try:
            check_master(fds[0])
            self._session.tell({"tty": True}, fds[:1])
        except JailmgrError as error:
            self._failed = told(error)
        finally:
            protocol.close_all(fds)

    def _ended(self) -> None:
        while self._heard():
            pass
        self._loop.forget(self.pidfd)
        self._reaper.report(self._pid, self._reaped, HELD_SECONDS)

    def _reaped(self, how: Exit | None) -> None:
        os.close(self.pidfd)
        self.pidfd = -1
        if how is None:
            why = "its exit status is not known: a process in the jail traced it"
            self._failed = self._failed or told(JailmgrError("exec", why))
        self._finish(how)

    def _finish(self, how: Exit | None) -> None:
        """The last word: an error, else how the program ended; None where it was never begun. Once: both ends of it,
        the enterer's and the program's, may come in one round of events.
        """
        if self._finished:
            return
        self._finished = True
        if self._failed is not None:
            self._session.finish(self._failed)
        elif how is None:
            self._session.finish(told(JailmgrError("exec", "the jail ended")))
        else:
            self._session.finish({"exit": {"code" if how.code == os.CLD_EXITED else "signal": how.status}})
