"""A connection to the supervisor: one request, and what follows from it until either side is done."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import struct
import termios
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jailmgr import __version__
from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime import apparmor, archive, cgroups, enter, lxcfs, process, protocol, spawn
from jailmgr.runtime.child import Child, told
from jailmgr.runtime.jail import KILL_SECONDS, STUCK, Jail
from jailmgr.runtime.loop import Timer
from jailmgr.runtime.pty import fs_type

if TYPE_CHECKING:
    from jailmgr.runtime.supervisor import Supervisor

_NULL = os.makedev(1, 3)
_OF_INIT = {"TERM", "GLIBC_TUNABLES"}
"""Variables of init's that are not for what is exec'd: the console's terminal, a template's tuning of process 1."""
_PIPEFS_MAGIC = 0x50495045
ADMITTED_MAX = 64
"""Sessions of users in one jail: each costs the supervisor a descriptor, and some memory."""
ADMITTED_SECONDS = 10.0
"""For a user's session to begin something: whether he may was asked when he was admitted, and is not asked again."""


class Session:
    """A client. `closed` is called once, when nothing of it is left."""

    def __init__(self, supervisor: Supervisor, sock: socket.socket, closed: Callable[[Session], None]) -> None:
        self.supervisor = supervisor
        self.sock = sock
        self._closed = closed
        self._open = True
        self.child: Child | None = None
        self.console_of: Jail | None = None
        self.admitted: dict[str, str] | None = None
        """For a user who is not root: the one jail, and its directory, that all requests are about."""
        self._unused: Timer | None = None
        self.stops = ""
        """Name of the jail whose end is waited for."""
        self._on_close: Callable[[], None] | None = None
        sock.setblocking(False)
        supervisor.loop.watch(sock.fileno(), lambda _: self._ready())

    @property
    def steady(self) -> bool:
        """Whether all that it waits for can be told to another release."""
        return self._on_close is None and (self.child is None or self.child.steady)

    def admit(self, jail: dict[str, str], used: bool = False) -> None:
        """Take requests about this jail only, and one that begins something: who may make it was asked a moment ago."""
        self.admitted = jail
        if not used:
            self._unused = self.supervisor.loop.after(ADMITTED_SECONDS, self.close)

    @property
    def used(self) -> bool:
        """Whether a user has begun with it what it was for."""
        return self._unused is None

    def tell(self, body: dict[str, Any], fds: list[int] | None = None) -> None:
        """Answer; a client that has gone or doesn't read is let go."""
        if self._open:
            try:
                protocol.send(self.sock, body, fds)
            except OSError:
                self.close()

    def finish(self, body: dict[str, Any]) -> None:
        """The last word of a program's session."""
        self.child = None
        self._on_close = None
        self.tell(body)

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self.supervisor.loop.forget(self.sock.fileno())
        self.sock.close()
        if self._unused is not None:
            self._unused.cancel()
        if self.child is not None:
            self.child.signal(signal.SIGHUP)
            self.child.signal(signal.SIGCONT)
        if self._on_close is not None:
            self._on_close()
        self._closed(self)

    def _ready(self) -> None:
        try:
            # From a user's relay come none: an fd of his would be ours to close, and we wait as long as he likes.
            message = protocol.receive(self.sock, protocol.FDS_MAX if self.admitted is None else 0)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            message = None
        if message is None:
            self.close()
            return
        try:
            operation = self._operation(message.body)
            spoken = message.body.get("v") == protocol.VERSION or operation in (Session._hello, Session._reexec)
            if operation is None or not spoken:
                raise JailmgrError("supervisor", f"does not know {message.body.get('op')!r}", "", "invalid")
            operation(self, message.body, message.fds)
        except JailmgrError as error:
            self.tell(told(error))
        except OSError as error:
            self.tell(told(from_os("supervisor", error)))
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            self.tell(told(JailmgrError("request", f"malformed ({error!r})", "", "invalid")))
        finally:
            protocol.close_all(message.fds)

    def _operation(self, body: dict[str, Any]) -> Callable[[Session, dict[str, Any], list[int]], None] | None:
        name = str(body.get("op"))
        if self.admitted is None:
            return _OPERATIONS.get(name)
        body |= self.admitted
        if name in _OF_USERS:
            if self.used:
                raise JailmgrError(
                    f"jail {self.supervisor.host.full_name(self.admitted['jail'])}",
                    "this session has been used",
                    "Try again.",
                    "denied",
                )
            assert self._unused is not None
            self._unused.cancel()
            self._unused = None
        return _OPERATIONS[name] if name in (*_OF_USERS, *_AFTERWARDS) else None

    def _hello(self, body: dict[str, Any], fds: list[int]) -> None:
        about = {"release": __version__, "snapshot": protocol.SNAPSHOT}
        self.tell({"v": protocol.VERSION, "pid": os.getpid(), **about})

    def _status(self, body: dict[str, Any], fds: list[int]) -> None:
        running = {name: jail.state._asdict() for name, jail in self.supervisor.jails.items() if jail.state}
        self.tell({"pid": os.getpid(), "jails": running})

    def _start(self, body: dict[str, Any], fds: list[int]) -> None:
        name, supervisor = body["jail"], self.supervisor
        jail = supervisor.jail(name)
        if jail is not None and jail.running:
            raise _busy(jail)
        if jail is None:
            jail = Jail(supervisor.host, name, body["lib"])
            jail.start(bundle=jail.bundle)
        else:
            jail.start()
        assert jail.state is not None
        if not (body.get("wait") and jail.bundle.notify):
            self.tell({"state": jail.state._asdict()})
            return
        started = jail
        timer = supervisor.loop.after(float(body.get("timeout", 120)), lambda: self._not_up(started))

        def up() -> None:
            timer.cancel()
            self.tell({"state": started.state._asdict() if started.state else {}})

        def ended(ending: dict[str, Any]) -> None:
            if up in started.ready_waiters or started.state is None:
                timer.cancel()
                self.tell(
                    told(
                        JailmgrError(
                            f"jail {supervisor.host.full_name(name)}", f"ended before it was up ({ending['kind']})"
                        )
                    )
                )

        jail.ready_waiters.append(up)
        jail.waiters.append(ended)

        def gone() -> None:
            timer.cancel()
            started.ready_waiters[:] = [waiter for waiter in started.ready_waiters if waiter is not up]
            started.waiters[:] = [waiter for waiter in started.waiters if waiter is not ended]

        self._on_close = gone

    def _not_up(self, jail: Jail) -> None:
        why = "its init has not told that the system is up; the jail runs on"
        self.tell(told(JailmgrError(f"jail {jail.full_name}", why, f"See: jailmgr logs {jail.full_name}")))

    def _stop(self, body: dict[str, Any], fds: list[int]) -> None:
        jail = self.supervisor.jail(body["jail"])
        if jail is None or not jail.alive:
            raise JailmgrError(f"jail {self.supervisor.host.full_name(body['jail'])}", "is not running", "", "conflict")
        self.wait_for_end(jail)
        number = body.get("signal") or jail.bundle.stop_signal
        by = "host" if body.get("by") == "host" else "admin"
        jail.stop(number, float(body.get("timeout", 30)), bool(body.get("force")), by)

    def wait_for_end(self, jail: Jail) -> None:
        """Tell how it ended, once it has."""
        self.stops = jail.name
        jail.waiters.append(self._tell_end)

    def _tell_end(self, ending: dict[str, Any]) -> None:
        name, self.stops = self.stops, ""
        if ending["kind"] == STUCK:
            why = f"it has not ended {KILL_SECONDS:.0f} s after SIGKILL; left: {' '.join(map(str, ending['pids']))}"
            hint = "Its processes wait in the kernel, for a disk or a file server perhaps. Try again later."
            self.tell(told(JailmgrError(f"jail {self.supervisor.host.full_name(name)}", why, hint)))
            return
        self.tell({"last": ending})

    def _admit(self, body: dict[str, Any], fds: list[int]) -> None:
        """A connection that the engine has let a user make, to enter one jail and no other."""
        admitted = {"jail": str(body["jail"]), "lib": str(body["lib"])}
        (sock,) = fds
        if sum(session.admitted == admitted for session in self.supervisor.sessions) >= ADMITTED_MAX:
            why = f"{ADMITTED_MAX} sessions of users are open in it"
            raise JailmgrError(
                f"jail {self.supervisor.host.full_name(admitted['jail'])}", why, "End some of them.", "unavailable"
            )
        self.supervisor.add_session(socket.socket(fileno=os.dup(sock))).admit(admitted)
        self.tell({})

    def _reexec(self, body: dict[str, Any], fds: list[int]) -> None:
        """Become another release of the supervisor, as soon as nothing is half done (runtime/reexec.py)."""
        argv = [str(word) for word in body["argv"]]
        if not argv or not argv[0].startswith("/"):
            raise ValueError("a program by its path")
        self.tell({"pid": os.getpid()})
        self.supervisor.reexec_when_steady(argv)

    def _renew_lxcfs(self, body: dict[str, Any], fds: list[int]) -> None:
        """Another lxcfs is mounted: its files go into every jail that runs."""
        running = [jail for jail in self.supervisor.jails.values() if jail.running and not jail.once]
        jails = {jail.name: (jail.pidfd, jail.bundle) for jail in running}
        failed = lxcfs.renew(jails, self.supervisor.host.hierarchies, str(body["mounted"]))
        self.tell({"failed": failed})

    def _run(self, body: dict[str, Any], fds: list[int]) -> None:
        """A jail for one program, with the caller's pipes; it is killed when the caller goes."""
        name, supervisor = body["jail"], self.supervisor
        if name in supervisor.jails or len(fds) != 3:
            raise JailmgrError(f"jail {supervisor.host.full_name(name)}", "is already running", "", "conflict")
        _check_stdio(fds)
        jail = Jail(supervisor.host, name, body["lib"])
        jail.start(stdio=spawn.Stdio(*fds))
        jail.waiters.append(lambda ending: self.finish({"last": ending}))
        self._on_close = lambda: jail.stop("SIGKILL", 0, True)

    def _exec(self, body: dict[str, Any], fds: list[int]) -> None:
        supervisor = self.supervisor
        jail = supervisor.find(body["jail"])
        _check_not_paused(jail, supervisor.host.hierarchies)
        base = {name: value for name, value in jail.bundle.env.items() if name not in _OF_INIT}
        command = enter.read_command(body, base)
        ends = ("r", "w") if body.get("joined") else ("r", "w", "w")
        far = [] if command.tty else self._make_pipes(fds, *ends)
        try:
            if not command.tty:
                if self.admitted is not None and len(ends) == 2:
                    fds.append(os.dup(fds[1]))
                _check_stdio(fds)
                _give_pipes(fds, jail.bundle.idmap_base)
            bundle, bpf = jail.bundle, supervisor.host.filter(jail.bundle.seccomp)
            work = lambda sock, proc: enter.run(sock, proc, command, fds, bundle, bpf)  # noqa: E731
            enterer, control = enter.enter(jail.pidfd, bundle, supervisor.host.hierarchies, fds, work)
            self.child = Child(self, enterer, control)
            self._give_far(fds, far)
        finally:
            protocol.close_all(far)

    def _make_pipes(self, fds: list[int], *ends: str) -> list[int]:
        """Of a user's session: pipes, whose ends in the jail go into `fds`, and the far ends, for him. Else nothing."""
        far: list[int] = []
        if self.admitted is not None:
            for end in ends:
                ear, mouth = os.pipe()
                fds.append(ear if end == "r" else mouth)
                far.append(mouth if end == "r" else ear)
        return far

    def _give_far(self, fds: list[int], far: list[int]) -> None:
        """Ours go first: whoever has the far end of a pipe can have the last close of the near one wait for him."""
        if far:
            protocol.close_all(fds)
            fds.clear()
            self.tell({"pipes": len(far)}, far)

    def _signal(self, body: dict[str, Any], fds: list[int]) -> None:
        if self.child is not None:
            self.child.signal(process.signal_number(str(body["signal"])))

    def _archive(self, body: dict[str, Any], fds: list[int]) -> None:
        """`cp`: in a running jail by entering it, in a stopped one by a process 1 of our own in its place."""
        path, outward = body["path"], bool(body["out"])
        far = self._make_pipes(fds, "w" if outward else "r")
        try:
            if not path.startswith("/") or "\0" in path or len(fds) != 1:
                raise ValueError("an absolute path and one pipe")
            _check_stdio(fds)
            self._copy(body, path, fds, archive.send if outward else archive.receive)
            self._give_far(fds, far)
        finally:
            protocol.close_all(far)

    def _copy(self, body: dict[str, Any], path: str, fds: list[int], do: Callable[[str, int], None]) -> None:
        stream = fds[0]

        def copy() -> None:
            do(path, stream)

        supervisor = self.supervisor
        jail = supervisor.jail(body["jail"])
        if jail is not None and jail.once:
            raise _busy(jail)
        if jail is not None and jail.running:
            hierarchies = supervisor.host.hierarchies
            _check_not_paused(jail, hierarchies)
            bundle, bpf = jail.bundle, supervisor.host.filter(jail.bundle.seccomp)

            def work(_: socket.socket, proc: int) -> None:
                process.become(bundle.capabilities, bpf)
                apparmor.at_once(bundle.apparmor, proc)
                copy()

            enterer, control = enter.enter(jail.pidfd, bundle, hierarchies, fds, work)
            self.child = Child(self, enterer, control)
            return
        if jail is not None:
            raise _busy(jail)
        visitor = Jail(supervisor.host, body["jail"], body["lib"])
        visitor.visit(spawn.Payload(copy, fds))
        visitor.waiters.append(lambda _: self.finish(visitor.visit_result()))
        self._on_close = lambda: visitor.stop("SIGKILL", 0, True)

    def _console(self, body: dict[str, Any], fds: list[int]) -> None:
        """A stream of what the console shows; with `typed`, what is sent on it is typed. A user's: see `_type`."""
        jail = self.supervisor.find(body["jail"])
        ours, theirs = socket.socketpair()
        try:
            mark = jail.log.mark()
            jail.watch_console(ours, bool(body.get("typed")) and self.admitted is None)
            self.console_of = jail
            self.tell({"inode": mark[0], "size": mark[1]}, [theirs.fileno()])
        except JailmgrError:
            ours.close()
            raise
        finally:
            theirs.close()

    def _type(self, body: dict[str, Any], fds: list[int]) -> None:
        """Type at the console, bytes as latin-1. By a stream of the user's own he could send us fds."""
        if self.console_of is not None and self.console_of.console is not None:
            self.console_of.console.type(str(body["text"]).encode("latin-1"))

    def _window(self, body: dict[str, Any], fds: list[int]) -> None:
        """The size of the terminal in front of the console (TIOCSWINSZ)."""
        if self.console_of is not None and self.console_of.console is not None:
            size = struct.pack("HHHH", _cells(body["rows"]), _cells(body["columns"]), 0, 0)
            fcntl.ioctl(self.console_of.console.master, termios.TIOCSWINSZ, size)


def _cells(number: Any) -> int:
    """Rows or columns as struct winsize takes them (TIOCSWINSZ(2const))."""
    if not isinstance(number, int) or not 0 <= number <= 0xFFFF:
        raise ValueError(f"{number!r:.40} is no number of rows or columns")
    return number


_OPERATIONS: dict[str, Callable[[Session, dict[str, Any], list[int]], None]] = {
    "hello": Session._hello,
    "reexec": Session._reexec,
    "renew_lxcfs": Session._renew_lxcfs,
    "status": Session._status,
    "start": Session._start,
    "stop": Session._stop,
    "run": Session._run,
    "exec": Session._exec,
    "signal": Session._signal,
    "archive": Session._archive,
    "console": Session._console,
    "window": Session._window,
    "type": Session._type,
    "admit": Session._admit,
}
_OF_USERS, _AFTERWARDS = ("exec", "archive", "console"), ("hello", "signal", "window", "type")


def _give_pipes(fds: list[int], base: int) -> None:
    """Pipes become its root's, so that /dev/stdout and its like can be opened in the jail."""
    for fd in fds:
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, base, base)


def _busy(jail: Jail) -> JailmgrError:
    if jail.once:
        why = "something is being copied to or from it"
        return JailmgrError(f"jail {jail.full_name}", why, "Try again when that is done.", "conflict")
    if not jail.running:
        # It would be forgotten when that which now takes its place has ended.
        why, hint = "is about to be started again", f"Stop it first: jailmgr stop {jail.full_name}"
        return JailmgrError(f"jail {jail.full_name}", why, hint, "conflict")
    return JailmgrError(f"jail {jail.full_name}", "is already running", "", "conflict")


def _check_not_paused(jail: Jail, hierarchies: cgroups.Hierarchies) -> None:
    """Who enters a frozen group waits until it is thawed."""
    if cgroups.is_frozen(hierarchies, jail.bundle.cgroup):
        raise JailmgrError(
            f"jail {jail.full_name}", "is paused", f"Resume it: jailmgr resume {jail.full_name}", "conflict"
        )


def _check_stdio(fds: list[int]) -> None:
    """Only anonymous pipes and /dev/null go into a jail. A file of the host, a named FIFO too, could be read, truncated
    or reopened there; a terminal, directory, device or socket is a way out of the jail."""
    for fd in fds:
        status = os.fstat(fd)
        if not (
            (stat.S_ISFIFO(status.st_mode) and fs_type(fd) == _PIPEFS_MAGIC)
            or (stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL)
        ):
            raise JailmgrError("exec", "only pipes and /dev/null can be passed into a jail", "", "invalid")
