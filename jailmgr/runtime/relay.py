"""`exec`, `shell` and `console` from the caller's side: its terminal, signals and fds, joined to a jail's.

The caller's own terminal never goes into the jail: with a tty the jail has a pty of its own devpts, whose master is
relayed to here. On the way of `exec`: `_signal` and lists of what to undo, for `signal` and `contextlib` cost more.
"""

from __future__ import annotations

import fcntl
import os
import select
import termios

from jailmgr.errors import JailmgrError, from_dict, full_name
from jailmgr.runtime import protocol, pump
from jailmgr.runtime.attach import Supervisor, connect_running

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from typing import Any

    from jailmgr.config import Root

    Undo = list[Callable[[], object]]
else:
    import _signal

CANNOT, NOT_FOUND = 126, 127
_FORWARDED = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGUSR1, _signal.SIGUSR2)
_ENOENT = 2
_DRAIN = 64
"""Reads of what a terminal still holds when the command has ended; one gives 4 KiB at most."""
_DETACH = b"\x1d\x1d\x1d"
"""ctrl-] three times."""


class CannotRunError(JailmgrError):
    """The command itself could not be run; `exit_status` is 126, or 127 where there is none of that name."""

    def __init__(self, error: JailmgrError, exit_status: int) -> None:
        super().__init__(error.what, error.why, error.hint, error.code)
        self.exit_status = exit_status


def exec_(
    root: Root,
    tenant: str,
    jail: str,
    argv: list[str],
    *,
    user: str | None = None,
    cwd: str | None = None,
    env: dict[str, str] | None = None,
    tty: bool | None = None,
    login: bool = False,
) -> int:
    """Run a command in a jail to its end: its exit status, or 128+N for signal N.

    `tty` None: when stdin and stdout are terminals. Raises CannotRunError, or JailmgrError where jailmgr failed.
    """
    tty = os.isatty(0) and os.isatty(1) if tty is None else tty
    request: dict[str, Any] = {"jail": jail, "args": argv, "env": dict(env or {}), "user": user, "cwd": cwd}
    request |= {"tty": tty, "login": login}
    if tty:
        request["env"].setdefault("TERM", os.environ.get("TERM", "linux"))
    undo: Undo = []
    with connect_running(root, tenant, jail) as supervisor:
        try:
            relay = _Relay(supervisor, undo)
            if not tty:
                return relay.pump(request)
            supervisor.tell("exec", [], **request)
            relay.forward_signals()
            return relay.run()
        finally:
            _take_back(undo)


def _take_back(undo: Undo) -> None:
    while undo:
        undo.pop()()


class _Relay:
    """Copies between our fds and the jail's until the supervisor reports that the command has ended."""

    def __init__(self, supervisor: Supervisor, undo: Undo) -> None:
        self._supervisor = supervisor
        self._undo = undo
        self._routes: dict[int, int] = {}
        self._master = -1
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        undo.append(lambda: protocol.close_all([self._woken, self._wake]))

    def forward_signals(self) -> None:
        """Signals to us go to the command; the wake-up fd takes them out of handlers (signal(3), set_wakeup_fd)."""
        old_fd = _signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._undo.append(lambda: _signal.set_wakeup_fd(old_fd))
        for number in (*_FORWARDED, _signal.SIGWINCH):
            before = _signal.signal(number, lambda *_: None)
            self._undo.append(lambda number=number, before=before: _signal.signal(number, before))  # type: ignore[misc]

    def run(self) -> int:
        """With a terminal: its master comes from the jail."""
        control, done = self._supervisor.sock.fileno(), None
        poll = select.poll()
        poll.register(control, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while done is None:
            for fd, _ in poll.poll():
                if fd == control:
                    said = self._supervisor.hear_any()
                    if "exit" in said.body or "error" in said.body:
                        done = said.body
                        poll.unregister(control)
                    elif said.fds:
                        self._take_terminal(said.fds[0], poll)
                elif fd == self._woken:
                    self._signalled(os.read(self._woken, 64))
                elif not _copy(fd, self._routes[fd]):
                    poll.unregister(fd)
                    del self._routes[fd]
        self._drain()
        return _exit_status(done)

    def pump(self, request: dict[str, Any]) -> int:
        """Without one: through pipes."""
        if self._supervisor.admitted:
            self._supervisor.tell("exec", [], joined=pump.is_joined(), **request)
            self.forward_signals()
            answer = self._supervisor.hear_any()
            if "pipes" not in answer.body:
                return _exit_status(answer.body)
            return _exit_status(pump.run(self._supervisor, pump.users(answer.fds), self._woken, self._signalled))
        stdio = pump.Stdio(self._woken)
        self._undo.append(stdio.close)
        self._supervisor.tell("exec", stdio.fds, **request)
        stdio.close_passed()
        self.forward_signals()
        return _exit_status(pump.run(self._supervisor, stdio.flows, self._woken, self._signalled))

    def _drain(self) -> None:
        """What a terminal still holds; no more than that, for someone inside may go on writing for ever."""
        if self._master >= 0:
            os.set_blocking(self._master, False)
            for _ in range(_DRAIN):
                if not _copy(self._master, 1):
                    break

    def _take_terminal(self, master: int, poll: select.poll) -> None:
        self._master = master
        os.set_blocking(master, True)
        self._undo.append(lambda: os.close(master))
        self._resize()
        if os.isatty(0):
            raw_terminal(self._undo)
        self._routes[0], self._routes[master] = master, 1
        poll.register(0, select.POLLIN)
        poll.register(master, select.POLLIN)

    def _signalled(self, numbers: bytes) -> None:
        for number in numbers:
            if number == _signal.SIGWINCH:
                self._resize()
            elif number in _FORWARDED:
                self._supervisor.tell("signal", signal=number)

    def _resize(self) -> None:
        if self._master >= 0 and os.isatty(0):
            size = fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8)
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)


def _copy(source: int, target: int) -> bool:
    """Pass on what is there; False at its end, or when nobody takes it."""
    try:
        data = os.read(source, 65536)
        view = memoryview(data)
        while view:
            view = view[os.write(target, view) :]
    except OSError:
        return False
    return bool(data)


def _exit_status(done: dict[str, Any]) -> int:
    if "exit" in done:
        ended = done["exit"]
        return int(ended["code"]) if "code" in ended else 128 + int(ended["signal"])
    error = from_dict(done["error"])
    if "errno" in done:
        raise CannotRunError(error, NOT_FOUND if done["errno"] == _ENOENT else CANNOT)
    raise error


def raw_terminal(undo: Undo) -> None:
    """Our terminal raw until `undo` (termios(3))."""
    import tty

    before = termios.tcgetattr(0)
    undo.append(lambda: termios.tcsetattr(0, termios.TCSADRAIN, before))
    tty.setraw(0, termios.TCSADRAIN)  # what was typed ahead is for the jail


def console(root: Root, tenant: str, jail: str, said: Callable[[str], None]) -> None:
    """The jail's console on our terminal until ctrl-] three times, or the end of the console or of stdin.

    `said` gets words for the user.
    """
    undo: Undo = []
    with connect_running(root, tenant, jail) as supervisor:
        (stream,) = supervisor.ask("console", jail=jail, typed=True).fds
        undo.append(lambda: os.close(stream))
        try:
            said(f"Console of jail {full_name(tenant, jail)}: ctrl-] three times leaves it.")
            if os.isatty(0):
                size = fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8)
                rows, columns = int.from_bytes(size[:2], "little"), int.from_bytes(size[2:4], "little")
                supervisor.tell("window", rows=rows, columns=columns)
                raw_terminal(undo)
            _join_console(stream, lambda typed: _type(supervisor, stream, typed))
        finally:
            _take_back(undo)


def _type(supervisor: Supervisor, stream: int, typed: bytes) -> None:
    if supervisor.admitted:
        supervisor.tell("type", text=typed.decode("latin-1"))
        return
    while typed:
        typed = typed[os.write(stream, typed) :]


def _join_console(stream: int, type_: Callable[[bytes], None]) -> None:
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(stream, select.POLLIN)
    last = b""
    while True:
        for fd, _ in poll.poll():
            if fd != 0:
                if not _copy(fd, 1):
                    return
                continue
            typed = os.read(0, 4096)
            last = (last + typed)[-len(_DETACH) :]
            if last == _DETACH:
                return
            if not typed:
                return
            type_(typed)
