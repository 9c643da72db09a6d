"""The way in for users who are not root: sockets of their own, there while a tenant names any of them.

No user ever connects to the engine: a doorkeeper listens (runtime/doorkeeper.py), which the engine begins anew where it
ends. Each connection comes to here with who is there, as the end of a socket that a relay holds.

Over HTTP users get the engine's API as far as engine/app.py lets them. A session (exec, console, cp) begins at the
second socket with the jail's name: for who may enter it the relay's socket is handed on to the tenant's supervisor,
which takes it for that jail only; none of what is typed passes through the engine.
"""

from __future__ import annotations

import array
import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine
from contextlib import ExitStack, suppress
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from jailmgr.config import Root
from jailmgr.engine.callers import Shares
from jailmgr.engine.protocol import Protocol, Server, forbidden
from jailmgr.errors import JailmgrError, from_os
from jailmgr.manager.access import Caller, tenants_of
from jailmgr.manager.host import Manager
from jailmgr.runtime import attach, doorkeeper, protocol
from jailmgr.runtime.notify import refuse_fds

HANDSHAKE_SECONDS = 5.0
"""A user has to say which jail a session is of."""
IDLE_SECONDS = 60.0
"""A user's connection over which no request comes, or not the rest of one, is closed."""
LISTEN_SECONDS = 10.0
"""The doorkeeper has until it listens."""
END_SECONDS = 5.0
"""The same to end."""
PAUSE_SECONDS = 1.0
"""Between two doorkeepers, where the first ended so soon."""
GROUPS_MAX = 4096
"""uint32s in the doorkeeper's message, and more than it ever says."""
_DOORKEEPER = "import sys; sys.path.insert(0, sys.argv[1]); from jailmgr.runtime.doorkeeper import main; main()"

log = logging.getLogger(__name__)


class Door:
    """Opened and closed as tenants come to name users, and no longer do. For the event loop's thread."""

    def __init__(self, root: Root, manager: Manager) -> None:
        self._root = root
        self._manager = manager
        self.shares = Shares()
        self.app: ASGIApp = forbidden
        self._given: dict[str, socket.socket] = {}
        self._server: Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._keeper: _Keeper | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._settling = asyncio.Lock()

    def give(self, sockets: dict[str, socket.socket]) -> None:
        """Use sockets that systemd listens on in our stead, by name of their file."""
        self._given = sockets

    async def settle(self, wanted: bool) -> None:
        """Open it or close it; fine where it is so already."""
        async with self._settling:
            if wanted or self._given:
                await self._open()
            else:
                await self._close()

    async def close(self) -> None:
        """End it; sessions go on, they are the supervisors'."""
        async with self._settling:
            await self._close()

    async def _open(self) -> None:
        if self._server is not None:
            return
        served = asyncio.Event()
        self._server = Server(self.app, served.set, UserProtocol)
        try:
            await self._hire()
        except JailmgrError:
            self._server = None
            raise
        self._serving = asyncio.create_task(self._server.serve([]))
        await served.wait()
        log.info("users who are not root are served at %s", self._root.user_socket)

    async def _hire(self) -> None:
        """Have a doorkeeper that listens. JailmgrError where it can't begin; where it is lost later, it is replaced."""
        with ExitStack() as held:
            try:
                os.makedirs(self._root.users, mode=0o755, exist_ok=True)
                http = held.enter_context(self._listener("engine.sock", doorkeeper.HTTP))
                sessions = held.enter_context(self._listener(protocol.SESSIONS, doorkeeper.SESSION))
                self._keeper = keeper = _begin_keeper(self._root)
            except OSError as error:
                raise from_os("the doorkeeper", error) from error
            with suppress(OSError):
                socket.send_fds(keeper.control, [b"listen"], [http.fileno(), sessions.fileno()])
            # Closed before anybody can connect: what comes to wait there is the doorkeeper's alone to let go of.
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(loop.sock_recv(keeper.control, 16), LISTEN_SECONDS)
        except (OSError, TimeoutError) as error:
            log.error("the doorkeeper does not listen: %r", error)
            keeper.control.shutdown(socket.SHUT_RDWR)
        loop.add_reader(keeper.control.fileno(), self._arrive)

    def _listener(self, name: str, kind: int) -> socket.socket:
        given = self._given.get(f"users/{name}")
        if given is None:
            return bound(f"{self._root.users}/{name}", socket.SocketKind(doorkeeper.KINDS[kind]))
        refuse_fds(given)
        return given.dup()

    async def _close(self) -> None:
        if not self._given:
            # Those of an engine that was killed, too.
            for name in ("engine.sock", protocol.SESSIONS):
                with suppress(FileNotFoundError):
                    os.unlink(f"{self._root.users}/{name}")
            with suppress(OSError):
                os.rmdir(self._root.users)
        if self._server is None or self._serving is None:
            return
        await self._dismiss()
        self._server.leave.set()
        await self._serving
        for task in self._tasks:
            task.cancel()
        self._server = self._serving = None

    async def _dismiss(self) -> None:
        """End the doorkeeper, which does so by itself once we hang up."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(keeper.control.fileno())
        keeper.control.close()
        await loop.run_in_executor(None, keeper.end)

    async def _replace(self, keeper: _Keeper) -> None:
        """The doorkeeper has ended, and nobody counts the connections that it had let in: they end with it."""
        async with self._settling:
            if self._server is None or self._keeper is not keeper:
                return
            log.warning("the doorkeeper (pid %d) ended: another one begins", keeper.process.pid)
            await self._dismiss()
            for connection in list(self._server.server_state.connections):
                connection.transport.close()
        soon = time.monotonic() - keeper.since < PAUSE_SECONDS
        while not await self._hired(soon):
            soon = True

    async def _hired(self, soon: bool) -> bool:
        """Whether there is a doorkeeper now, or no need for one."""
        if soon:
            await asyncio.sleep(PAUSE_SECONDS)
        async with self._settling:
            if self._server is None or self._keeper is not None:
                return True
            try:
                await self._hire()
            except JailmgrError as error:
                log.error("no doorkeeper: %s", error)
            return self._keeper is not None

    def _arrive(self) -> None:
        """One connection is announced, or the doorkeeper's end."""
        keeper = self._keeper
        assert keeper is not None
        try:
            said, fds, _, _ = socket.recv_fds(keeper.control, GROUPS_MAX * 4, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            said, fds = b"", []
        if not said:
            asyncio.get_running_loop().remove_reader(keeper.control.fileno())
            self._begin(self._replace(keeper))
            return
        kind, uid, *gids = array.array("I", said)
        # Without a descriptor left for it there is none: the relay ends by that.
        for fd in fds:
            sock = socket.socket(fileno=fd)
            sock.setblocking(False)
            caller = Caller(uid, tuple(sorted(set(gids))))
            self._begin(self._http(sock, caller) if kind == doorkeeper.HTTP else self._session(sock, caller))

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _http(self, sock: socket.socket, caller: Caller) -> None:
        server = self._server
        if server is None:
            sock.close()
            return
        await asyncio.get_running_loop().connect_accepted_socket(lambda: UserProtocol.of(caller, server), sock)

    async def _session(self, sock: socket.socket, caller: Caller) -> None:
        """Hear which jail it is, and give the connection to that jail's supervisor; what is wrong is told."""
        with sock:
            if await _readable(sock):
                async with self.shares.request(caller.uid):
                    work = partial(_hand_on, self._manager, caller, sock)
                    await asyncio.get_running_loop().run_in_executor(self.shares.threads, work)


class _Keeper:
    """The doorkeeper's process, and where it tells of connections."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self.process = process
        self.control = control
        self.since = time.monotonic()

    def end(self) -> None:
        """Wait until it has ended."""
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _begin_keeper(root: Root) -> _Keeper:
    """Its command line says whose it is, and is its relays' too. OSError."""
    argv = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _DOORKEEPER, attach.package(), root.users]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    try:
        process = subprocess.Popen(
            argv,
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return _Keeper(process, ours)


class UserProtocol(Protocol):
    """HTTP for whom the doorkeeper says is there. A connection that only waits for its user is closed some time."""

    caller: Caller
    _heard = False

    @classmethod
    def of(cls, caller: Caller, server: Server) -> UserProtocol:
        made = cls(server.config, server.server_state, {})
        made.caller = caller
        return made

    def let_in(self, sock: socket.socket) -> None:
        self.app = _Known(self.caller, self.app)
        self._look = self.loop.call_later(IDLE_SECONDS, self._end_if_idle)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def _end_if_idle(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle
        works = cycle is not None and not cycle.response_complete and not cycle.more_body
        if not self._heard and not works:
            self.transport.close()
            return
        self._heard = False
        self._look = self.loop.call_later(IDLE_SECONDS, self._end_if_idle)


async def _readable(sock: socket.socket) -> bool:
    """Whether it is within HANDSHAKE_SECONDS."""
    sock.setblocking(False)
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sock.fileno(), ready.set)
    try:
        await asyncio.wait_for(ready.wait(), HANDSHAKE_SECONDS)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(sock.fileno())
    return True


class _Known:
    """The application, told who asks."""

    def __init__(self, caller: Caller, app: ASGIApp) -> None:
        self._caller = caller
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["jailmgr.caller"] = self._caller
        await self._app(scope, receive, send)


def _hand_on(m: Manager, caller: Caller, sock: socket.socket) -> None:
    try:
        message = protocol.receive(sock)
        if message is None:
            return
        protocol.close_all(message.fds)
        tenant, jail = str(message.body.get("tenant")), str(message.body.get("jail"))
        try:
            if message.body.get("v") != protocol.VERSION:
                raise JailmgrError("session", "of another version", "Use the jailmgr of this host.", "invalid")
            if tenant not in tenants_of(m, caller):
                raise JailmgrError(f"tenant {tenant}", "there is none of that name", "", "missing")
            m.store.jail(tenant, jail)
            lib = m.root.jail_lib(tenant, jail)
            with attach.connect(m.root, tenant) as supervisor:
                # The answer first: from then on all that is said on the connection is the supervisor's.
                protocol.send(sock, {"v": protocol.VERSION})
                supervisor.ask("admit", [sock.fileno()], attach.ANSWER_SECONDS, jail=jail, lib=lib)
        except JailmgrError as error:
            protocol.send(sock, {"error": error.as_dict()})
    except (OSError, ValueError) as error:
        log.info("a session of uid %d did not begin: %s", caller.uid, error)


def bound(path: str, kind: socket.SocketKind) -> socket.socket:
    """A socket that everybody may connect to, in place of one that a killed engine left; nobody listens on it yet."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        sock.bind(path)
        # Not by umask, which is that of all threads; the directory is root's.
        os.chmod(path, 0o666)
        refuse_fds(sock)
    except OSError as error:
        sock.close()
        raise from_os(f"socket {path}", error) from error
    return sock
