"""How a child ended reaches its owner, and signals reach the child."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytest

from jailmgr.runtime import protocol
from jailmgr.runtime.child import Child
from jailmgr.runtime.loop import Loop
from jailmgr.runtime.reaper import Exit, Reaper
from jailmgr.runtime.session import Session


class Host(NamedTuple):
    reaper: Reaper


class Supervisor(NamedTuple):
    loop: Loop
    host: Host


class Client:
    """A session as far as Child knows it."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.last: dict[str, Any] = {}

    def finish(self, body: dict[str, Any]) -> None:
        self.last = body
        self.supervisor.loop.stop()


def _fork_and_exit(status: int, go: tuple[int, int] | None = None) -> int:
    pid = os.fork()
    if pid == 0:
        if go is not None:
            os.close(go[1])
            os.read(go[0], 1)
        os._exit(status)
    return pid


def _status_of_a_program_with_an_old_pid() -> dict[str, Any]:
    """Run a program and its enterer whose pids are those of children that a guest made, and that were reaped."""
    loop = Loop()
    client = Client(Supervisor(loop, Host(Reaper(loop))))
    go = os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program, enterer = _fork_and_exit(3, go), _fork_and_exit(0)
    os.waitid(os.P_PID, enterer, os.WEXITED | os.WNOWAIT)
    reaper = client.supervisor.host.reaper
    reaper._keep(program, Exit(os.CLD_EXITED, 0))
    reaper._keep(enterer, Exit(os.CLD_KILLED, signal.SIGKILL))
    ours.setblocking(False)
    Child(cast(Session, client), enterer, ours)
    protocol.send(theirs, {"pid": program})
    theirs.close()
    loop.after(0.0, lambda: os.close(go[1]))
    loop.run()
    return client.last


def _status_of_a_program_signalled_early(number: int) -> dict[str, Any]:
    """Signal a program that waits, after its enterer has reported the pid and before that is read."""
    loop = Loop()
    client = Client(Supervisor(loop, Host(Reaper(loop))))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program, enterer = os.fork(), 0
    if program == 0:
        signal.alarm(5)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pause()
        os._exit(3)
    enterer = _fork_and_exit(0)
    os.waitid(os.P_PID, enterer, os.WEXITED | os.WNOWAIT)
    ours.setblocking(False)
    protocol.send(theirs, {"pid": program})
    theirs.close()
    Child(cast(Session, client), enterer, ours).signal(number)
    loop.run()
    return client.last


def _in_a_process(check: Callable[[], bool]) -> bool:
    """Of its own: a reaper takes every child of its process."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        status = 2
        try:
            status = int(not check())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_pid_that_comes_again_brings_no_old_status() -> None:
    """The reaper keeps the ends of 4096 children of a guest, by pid; pids come again after kernel.pid_max."""
    assert _in_a_process(lambda: _status_of_a_program_with_an_old_pid() == {"exit": {"code": 3}})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_before_the_pid_is_known_reaches_the_program(number: int) -> None:
    """The program writes to the caller's pipe itself, so a signal may be there before the pid has been read."""
    assert _in_a_process(lambda: _status_of_a_program_signalled_early(number) == {"exit": {"signal": number}})
