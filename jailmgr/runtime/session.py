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

from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime import archive, cgroups, enter, process, protocol, spawn
from jailmgr.runtime.jail import Jail, signal_number
from jailmgr.runtime.pty import check_master, fs_type

if TYPE_CHECKING:
    from jailmgr.runtime.supervisor import Supervisor

_NULL = os.makedev(1, 3)
_OF_INIT = {"TERM", "GLIBC_TUNABLES"}
"""Variables of init's that are not for what is exec'd: the console's terminal, a template's tuning of process 1."""
_PIPEFS_MAGIC = 0x50495045


class Child:
    """A program in a jail that belongs to a session: its control socket, and its pidfd once it is known."""

    def __init__(self, session: Session, enterer: int, control: socket.socket) -> None:
        self._session = session
        self._control: socket.socket | None = control
        self._enterer = os.pidfd_open(enterer)
        self._pidfd = -1
        self._signalled = False
        self._failed: dict[str, Any] | None = None
        self._loop = session.supervisor.loop
        self._loop.watch(self._enterer, lambda _: self._entered())
        self._loop.watch(control.fileno(), self._control_ready)

    def signal(self, number: int) -> None:
        """Before there is a program the enterer takes it: a guest that has frozen `.exec` would keep that for ever."""
        self._signalled = True
        target = self._pidfd if self._pidfd >= 0 else self._enterer
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
        if self._pidfd >= 0:
            return
        self._session.supervisor.strays.look()
        if self._signalled and self._failed is None and info is not None and info.si_code != os.CLD_EXITED:
            self._session.finish({"exit": {"signal": info.si_status}})
        else:
            self._session.finish(self._failed or _error(JailmgrError("exec", "the jail ended")))

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
        elif "pid" in said.body and self._pidfd < 0:
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
        self._pidfd = pidfd
        self._loop.watch(pidfd, lambda _: self._ended())

    def _offer_terminal(self, fds: list[int]) -> None:
        try:
            check_master(fds[0])
            self._session.tell({"tty": True}, fds[:1])
        except JailmgrError as error:
            self._failed = _error(error)
        finally:
            protocol.close_all(fds)

    def _ended(self) -> None:
        while self._heard():
            pass
        self._loop.forget(self._pidfd)
        info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)
        self._pidfd = -1
        if self._failed is not None:
            self._session.finish(self._failed)
        elif info is not None:
            kind = "code" if info.si_code == os.CLD_EXITED else "signal"
            self._session.finish({"exit": {kind: info.si_status}})


class Session:
    """A client. `closed` is called once, when nothing of it is left."""

    def __init__(self, supervisor: Supervisor, sock: socket.socket, closed: Callable[[Session], None]) -> None:
        self.supervisor = supervisor
        self._sock = sock
        self._closed = closed
        self._open = True
        self._child: Child | None = None
        self._jail: Jail | None = None
        self._on_close: Callable[[], None] | None = None
        sock.setblocking(False)
        supervisor.loop.watch(sock.fileno(), lambda _: self._ready())

    def tell(self, body: dict[str, Any], fds: list[int] | None = None) -> None:
        """Answer; a client that has gone or doesn't read is let go."""
        if self._open:
            try:
                protocol.send(self._sock, body, fds)
            except OSError:
                self.close()

    def finish(self, body: dict[str, Any]) -> None:
        """The last word of a program's session."""
        self._child = None
        self._on_close = None
        self.tell(body)

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self.supervisor.loop.forget(self._sock.fileno())
        self._sock.close()
        if self._child is not None:
            self._child.signal(signal.SIGHUP)
            self._child.signal(signal.SIGCONT)
        if self._on_close is not None:
            self._on_close()
        self._closed(self)

    def _ready(self) -> None:
        try:
            message = protocol.receive(self._sock)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            message = None
        if message is None:
            self.close()
            return
        try:
            operation = _OPERATIONS.get(str(message.body.get("op")))
            if operation is None or message.body.get("v") != protocol.VERSION:
                raise JailmgrError("supervisor", f"does not know {message.body.get('op')!r}", "", "invalid")
            operation(self, message.body, message.fds)
        except JailmgrError as error:
            self.tell(_error(error))
        except OSError as error:
            self.tell(_error(from_os("supervisor", error)))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            self.tell(_error(JailmgrError("request", f"malformed ({error!r})", "", "invalid")))
        finally:
            protocol.close_all(message.fds)

    def _hello(self, body: dict[str, Any], fds: list[int]) -> None:
        self.tell({"v": protocol.VERSION, "pid": os.getpid()})

    def _status(self, body: dict[str, Any], fds: list[int]) -> None:
        running = {name: jail.state._asdict() for name, jail in self.supervisor.jails.items() if jail.state}
        self.tell({"pid": os.getpid(), "jails": running})

    def _start(self, body: dict[str, Any], fds: list[int]) -> None:
        name, supervisor = body["jail"], self.supervisor
        jail = supervisor.jails.get(name)
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
                self.tell(_error(JailmgrError(f"jail {name}", f"ended before it was up ({ending['kind']})")))

        jail.ready_waiters.append(up)
        jail.waiters.append(ended)

        def gone() -> None:
            timer.cancel()
            started.ready_waiters[:] = [waiter for waiter in started.ready_waiters if waiter is not up]
            started.waiters[:] = [waiter for waiter in started.waiters if waiter is not ended]

        self._on_close = gone

    def _not_up(self, jail: Jail) -> None:
        why = "its init has not told that the system is up; the jail runs on"
        self.tell(_error(JailmgrError(f"jail {jail.name}", why, f"See: jailmgr logs {jail.name}")))

    def _stop(self, body: dict[str, Any], fds: list[int]) -> None:
        jail = self.supervisor.jails.get(body["jail"])
        if jail is None or not jail.alive:
            raise JailmgrError(f"jail {body['jail']}", "is not running", "", "conflict")
        jail.waiters.append(lambda ending: self.tell({"last": ending}))
        number = body.get("signal") or jail.bundle.stop_signal
        by = "host" if body.get("by") == "host" else "admin"
        jail.stop(number, float(body.get("timeout", 30)), bool(body.get("force")), by)

    def _run(self, body: dict[str, Any], fds: list[int]) -> None:
        """A jail for one program, with the caller's pipes; it is killed when the caller goes."""
        name, supervisor = body["jail"], self.supervisor
        if name in supervisor.jails or len(fds) != 3:
            raise JailmgrError(f"jail {name}", "is already running", "", "conflict")
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
        if not command.tty:
            _check_stdio(fds)
            _give_pipes(fds, jail.bundle.idmap_base)
        bundle, bpf = jail.bundle, supervisor.host.filter(jail.bundle.seccomp)
        work = lambda sock: enter.run(sock, command, fds, bundle, bpf)  # noqa: E731
        enterer, control = enter.enter(jail.pidfd, bundle, supervisor.host.hierarchies, fds, work)
        self._child = Child(self, enterer, control)

    def _signal(self, body: dict[str, Any], fds: list[int]) -> None:
        if self._child is not None:
            self._child.signal(signal_number(str(body["signal"])))

    def _archive(self, body: dict[str, Any], fds: list[int]) -> None:
        """`cp`: in a running jail by entering it, in a stopped one by a process 1 of our own in its place."""
        path, outward = body["path"], bool(body["out"])
        if not path.startswith("/") or "\0" in path or len(fds) != 1:
            raise ValueError("an absolute path and one pipe")
        _check_stdio(fds)
        stream = fds[0]

        def copy() -> None:
            (archive.write_tar if outward else archive.read_tar)(path, stream)

        supervisor = self.supervisor
        jail = supervisor.jails.get(body["jail"])
        if jail is not None and jail.once:
            raise _busy(jail)
        if jail is not None and jail.running:
            hierarchies = supervisor.host.hierarchies
            _check_not_paused(jail, hierarchies)
            bundle, bpf = jail.bundle, supervisor.host.filter(jail.bundle.seccomp)

            def work(_: socket.socket) -> None:
                process.become(bundle.capabilities, bpf)
                copy()

            enterer, control = enter.enter(jail.pidfd, bundle, hierarchies, fds, work)
            self._child = Child(self, enterer, control)
            return
        visitor = Jail(supervisor.host, body["jail"], body["lib"])
        visitor.visit(spawn.Payload(copy, fds))
        visitor.waiters.append(lambda _: self.finish(visitor.visit_result()))
        self._on_close = lambda: visitor.stop("SIGKILL", 0, True)

    def _console(self, body: dict[str, Any], fds: list[int]) -> None:
        """A stream of what the console shows; with `typed`, what is sent on it is typed."""
        jail = self.supervisor.find(body["jail"])
        ours, theirs = socket.socketpair()
        try:
            mark = jail.log.mark()
            jail.watch_console(ours, bool(body.get("typed")))
            self._jail = jail
            self.tell({"inode": mark[0], "size": mark[1]}, [theirs.fileno()])
        except JailmgrError:
            ours.close()
            raise
        finally:
            theirs.close()

    def _window(self, body: dict[str, Any], fds: list[int]) -> None:
        """The size of the terminal in front of the console (TIOCSWINSZ)."""
        if self._jail is not None and self._jail.console is not None:
            size = struct.pack("HHHH", int(body["rows"]), int(body["columns"]), 0, 0)
            fcntl.ioctl(self._jail.console.master, termios.TIOCSWINSZ, size)


_OPERATIONS: dict[str, Callable[[Session, dict[str, Any], list[int]], None]] = {
    "hello": Session._hello,
    "status": Session._status,
    "start": Session._start,
    "stop": Session._stop,
    "run": Session._run,
    "exec": Session._exec,
    "signal": Session._signal,
    "archive": Session._archive,
    "console": Session._console,
    "window": Session._window,
}


def _error(error: JailmgrError) -> dict[str, Any]:
    return {"error": error.as_dict()}


def _give_pipes(fds: list[int], base: int) -> None:
    """Pipes become its root's, so that /dev/stdout and its like can be opened in the jail; a named FIFO stays."""
    for fd in fds:
        if stat.S_ISFIFO(os.fstat(fd).st_mode) and fs_type(fd) == _PIPEFS_MAGIC:
            os.fchown(fd, base, base)


def _busy(jail: Jail) -> JailmgrError:
    if jail.once:
        why = "something is being copied to or from it"
        return JailmgrError(f"jail {jail.name}", why, "Try again when that is done.", "conflict")
    return JailmgrError(f"jail {jail.name}", "is already running", "", "conflict")


def _check_not_paused(jail: Jail, hierarchies: cgroups.Hierarchies) -> None:
    """Who enters a frozen group waits until it is thawed."""
    if cgroups.is_frozen(hierarchies, jail.bundle.cgroup):
        raise JailmgrError(f"jail {jail.name}", "is paused", f"Resume it: jailmgr resume {jail.name}", "conflict")


def _check_stdio(fds: list[int]) -> None:
    """Only pipes, regular files and /dev/null go into a jail: a terminal, directory, device or socket of the host is
    a way out of it."""
    for fd in fds:
        status = os.fstat(fd)
        if not (
            stat.S_ISFIFO(status.st_mode)
            or stat.S_ISREG(status.st_mode)
            or (stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL)
        ):
            raise JailmgrError("exec", "only pipes, files and /dev/null can be passed into a jail", "", "invalid")
