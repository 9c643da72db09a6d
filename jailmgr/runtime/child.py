"""A program in a jail that belongs to a session: from the enterer that brings it there to its exit status."""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING, Any

from jailmgr.errors import JailmgrError
from jailmgr.runtime import protocol
from jailmgr.runtime.pty import check_master

if TYPE_CHECKING:
    from jailmgr.runtime.session import Session


def told(error: JailmgrError) -> dict[str, Any]:
    """An error as an answer."""
    return {"error": error.as_dict()}


class Child:
    """Its control socket, and its pidfd once it is known."""

    def __init__(self, session: Session, enterer: int, control: socket.socket) -> None:
        self._session = session
        self._control: socket.socket | None = control
        self._enterer = os.pidfd_open(enterer)
        self.pidfd = -1
        self.signalled = False
        self._failed: dict[str, Any] | None = None
        self._loop = session.supervisor.loop
        self._loop.watch(self._enterer, lambda _: self._entered())
        self._loop.watch(control.fileno(), self._control_ready)

    @classmethod
    def of_program(cls, session: Session, pidfd: int, signalled: bool) -> Child:
        """A program that runs, begun by the release before (runtime/reexec.py)."""
        child = cls.__new__(cls)
        child._session, child._loop, child._control, child._enterer = session, session.supervisor.loop, None, -1
        child.pidfd, child.signalled, child._failed = pidfd, signalled, None
        child._loop.watch(pidfd, lambda _: child._ended())
        return child

    @property
    def steady(self) -> bool:
        """The program runs, and nothing is on its way between it and us."""
        return self.pidfd >= 0 and self._enterer < 0 and self._control is None and self._failed is None

    def signal(self, number: int) -> None:
        """Before there is a program the enterer takes it: a guest that has frozen `.exec` would keep that for ever."""
        self.signalled = True
        target = self.pidfd if self.pidfd >= 0 else self._enterer
        if target >= 0:
            try:
                signal.pidfd_send_signal(target, number)
            except ProcessLookupError:
                return

    def _entered(self) -> None:
        """The enterer has ended: what it said is there to read."""
        self._loop.forget(self._enterer)
        info = os.waitid(os.P_PIDFD, self._enterer, os.WEXITED)
        os.close(self._enterer)
        self._enterer = -1
        while self._control is not None and self._heard():
            pass
        if self.pidfd >= 0:
            return
        self._session.supervisor.strays.look()
        if self.signalled and self._failed is None and info is not None and info.si_code != os.CLD_EXITED:
            self._session.finish({"exit": {"signal": info.si_status}})
        else:
            self._session.finish(self._failed or told(JailmgrError("exec", "the jail ended")))

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
        """A child of ours, or it is not what it says and no signal goes there: ChildProcessError (waitid(2))."""
        pidfd = os.pidfd_open(pid)
        try:
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            os.close(pidfd)
            raise
        self.pidfd = pidfd
        self._loop.watch(pidfd, lambda _: self._ended())

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
        info = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        os.close(self.pidfd)
        self.pidfd = -1
        if self._failed is not None:
            self._session.finish(self._failed)
        elif info is not None:
            kind = "code" if info.si_code == os.CLD_EXITED else "signal"
            self._session.finish({"exit": {kind: info.si_status}})
