"""The supervisor of a tenant: parent of its jails' inits, keeper of their consoles, door for `exec`.

Standard library only, one thread, one event loop. It needs neither the engine nor the store: a jail is started from
its config.json, and what runs is told by RUN/JAIL.json. Killed, its jails live on and the next one adopts them.
It ends when it has no jail and nobody is connected.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from jailmgr import __version__
from jailmgr.errors import JailmgrError
from jailmgr.runtime import cgroups, process, protocol, reexec, scope
from jailmgr.runtime import syscalls as kernel
from jailmgr.runtime.adopt import adopt_all, adopt_late
from jailmgr.runtime.bundle import FILES_MAX
from jailmgr.runtime.host import Host
from jailmgr.runtime.jail import Jail
from jailmgr.runtime.loop import Loop
from jailmgr.runtime.proc import Process, start_time
from jailmgr.runtime.protocol import SOCKET
from jailmgr.runtime.session import Session
from jailmgr.runtime.standard_fds import open_closed
from jailmgr.runtime.state import LOCK, SUPERVISOR_LOG

LOG_MAX = 256 * 1024


class Supervisor:
    """The listening socket, its sessions and the jails."""

    def __init__(self, run: str, listener: socket.socket, lock: int) -> None:
        self.lock = lock
        """Held while there is something to supervise (flock(2)): who has it is the tenant's supervisor."""
        self.loop = Loop()
        self.host = Host(self.loop, run, cgroups.discover(), self._changed)
        self.jails: dict[str, Jail] = {}
        self.listener = listener
        self.sessions: set[Session] = set()
        self._asked = False
        self._successor: list[str] = []
        self.loop.watch(listener.fileno(), lambda _: self._accept())

    def run(self) -> None:
        """Until there is nothing to supervise."""
        self.loop.after(5.0, self._end_if_idle)
        self.loop.run()
        self.listener.close()
        # Links whose namespace something else holds; the next supervisor need not wait for the 20 ms of each.
        os.close(self.lock)
        self.host.detach_now()

    def find(self, name: str) -> Jail:
        """Return a jail that runs. Raises JailmgrError `conflict`."""
        jail = self.jail(name)
        if jail is None or not jail.running or jail.once:
            raise JailmgrError(
                f"jail {self.host.full_name(name)}",
                "is not running",
                f"Start it: jailmgr start {self.host.full_name(name)}",
                "conflict",
            )
        return jail

    def jail(self, name: str) -> Jail | None:
        """Return a jail that is alive."""
        if name not in self.jails:
            adopt_late(self.host, self.jails, name)
        return self.jails.get(name)

    def _accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        if protocol.peer_uid(sock) != 0:
            sock.close()
            return
        self._asked = True
        self.add_session(sock)

    def add_session(self, sock: socket.socket) -> Session:
        session = Session(self, sock, self._closed)
        self.sessions.add(session)
        return session

    def reexec_when_steady(self, argv: list[str]) -> None:
        """Become `argv` (reexec.argv_of) once nothing is half done; looked at after each event."""
        self._successor = argv
        self.loop.idle = self._reexec_if_steady

    def _reexec_if_steady(self) -> None:
        if reexec.steady(self):
            self.loop.idle = None
            note(f"goes over to {self._successor[-2]}")
            self.host.detach_now()
            try:
                reexec.replace(self, self._successor)
            except OSError as error:
                note(f"stays: {error}")

    def _closed(self, session: Session) -> None:
        self.sessions.discard(session)
        self._end_if_idle()

    def _changed(self, jail: Jail) -> None:
        if not jail.alive:
            self.jails.pop(jail.name, None)
        else:
            self.jails[jail.name] = jail
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if not self.jails and not self.sessions:
            self.loop.stop()


def start(run: str, ready: Callable[[], None]) -> None:
    """Take the tenant's lock, listen, adopt what runs, supervise."""
    lock = os.open(f"{run}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    pid = os.getpid()
    me = Process(pid, start_time(pid) or 0)
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(me._asdict()).encode(), 0)
    supervisor = Supervisor(run, protocol.listen(run, SOCKET), lock)
    adopt_all(supervisor.host, supervisor.jails)
    ready()
    supervisor.run()


def resume(run: str, memfd: int) -> None:
    """Go on where the release before left off, in the same process; with -1 for `memfd`, see that all is there to."""
    if memfd < 0:
        return
    content = reexec.load(memfd)
    _settle_in()
    supervisor = Supervisor(run, socket.socket(fileno=content["listener"]), content["lock"])
    reexec.restore(supervisor, content)
    note(f"release {__version__} goes on with {len(supervisor.jails)} jails")
    supervisor.run()


def _settle_in() -> None:
    """Set what a process of ours is, and raise the limits that jails begin with.

    The kernel asks for CAP_SYS_RESOURCE in the host's user namespace (setrlimit(2)): a process in a jail's can keep
    limits but raise none, so it would have those of the shell that the engine was started from.
    """
    process.set_limits([("RLIMIT_NOFILE", FILES_MAX, FILES_MAX)])
    kernel.set_name("jailmgr-super")
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    gc.collect()
    gc.freeze()


def main(run: str, ready_fd: int, group: str = "") -> None:
    """Become a daemon; one line on `ready_fd`: empty when it listens, else an error as JSON.

    `group`: the systemd scope's, to be moved to.
    """
    open_closed()
    if os.fork() != 0:
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.umask(0o022)
    kernel.close_all_but(ready_fd)
    _own_stdio(f"{run}/{SUPERVISOR_LOG}")
    process.reset_signals()
    _settle_in()

    def ready() -> None:
        os.write(ready_fd, b"\n")
        os.close(ready_fd)

    try:
        if group:
            scope.enter(group)
        start(run, ready)
    except (JailmgrError, OSError) as error:
        told = error if isinstance(error, JailmgrError) else JailmgrError("supervisor", str(error))
        try:
            os.write(ready_fd, json.dumps(told.as_dict()).encode() + b"\n")
        except OSError:
            raise error from None
        raise


def note(text: str) -> None:
    """A line in the supervisor's log."""
    print(time.strftime("%Y-%m-%dT%H:%M:%S%z"), text, file=sys.stderr, flush=True)


def _own_stdio(log: str) -> None:
    try:
        if os.stat(log).st_size > LOG_MAX:
            os.rename(log, f"{log}.1")
    except FileNotFoundError:
        pass
    null = os.open(os.devnull, os.O_RDWR)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    for target, fd in ((0, null), (1, out), (2, out)):
        os.dup2(fd, target)
    for fd in {null, out} - {0, 1, 2}:
        os.close(fd)
    sys.excepthook = lambda *error: _report(log, *error)


def _report(log: str, *error: Any) -> None:
    """A traceback in the log, which is turned over when it is long: what is wrong may be wrong again and again."""
    sys.__excepthook__(*error)
    sys.stderr.flush()
    if os.fstat(2).st_size > LOG_MAX:
        _own_stdio(log)


def status_of(jails: dict[str, Jail]) -> dict[str, Any]:
    """What `status` answers."""
    return {name: jail.state._asdict() for name, jail in jails.items() if jail.state is not None}
