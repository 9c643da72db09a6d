"""The way in for users who are not root: sockets of their own, there while a tenant names any of them.

Over HTTP they get the engine's API as far as engine/app.py lets them. A session (exec, console, cp) begins at the
second socket with the jail's name: who may enter it is handed on, connection and all, to the tenant's supervisor, which
takes it for that jail only; none of what is typed passes through the engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import suppress
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from jailmgr.config import Root
from jailmgr.engine.answers import refused
from jailmgr.engine.callers import Shares, caller_of
from jailmgr.engine.protocol import Protocol, Server
from jailmgr.errors import JailmgrError, from_os
from jailmgr.manager.access import Caller, tenants_of
from jailmgr.manager.host import Manager
from jailmgr.runtime import attach, protocol

HANDSHAKE_SECONDS = 5.0
"""A user has to say which jail a session is of."""

log = logging.getLogger(__name__)


class Door:
    """Opened and closed as tenants come to name users, and no longer do. For the event loop's thread."""

    def __init__(self, root: Root, manager: Manager) -> None:
        self._root = root
        self._manager = manager
        self.shares = Shares()
        self.app: ASGIApp = _crowded
        self._given: dict[str, socket.socket] = {}
        self._server: Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._sessions: socket.socket | None = None
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
        os.makedirs(self._root.users, mode=0o755, exist_ok=True)
        http = self._given.get("users/engine.sock") or listen(self._root.user_socket, socket.SOCK_STREAM)
        sessions = self._given.get(f"users/{protocol.SESSIONS}")
        self._sessions = sessions or listen(f"{self._root.users}/{protocol.SESSIONS}", socket.SOCK_SEQPACKET)
        self._sessions.listen(128)
        self._sessions.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._sessions.fileno(), self._accept)
        served = asyncio.Event()
        self._server = Server(self.app, served.set, self._protocol())
        self._serving = asyncio.create_task(self._server.serve([http]))
        await served.wait()
        log.info("users who are not root are served at %s", self._root.user_socket)

    async def _close(self) -> None:
        if not self._given:
            # Those of an engine that was killed, too.
            for name in ("engine.sock", protocol.SESSIONS):
                with suppress(FileNotFoundError):
                    os.unlink(f"{self._root.users}/{name}")
            with suppress(OSError):
                os.rmdir(self._root.users)
        if self._server is None or self._serving is None or self._sessions is None:
            return
        asyncio.get_running_loop().remove_reader(self._sessions.fileno())
        self._sessions.close()
        self._server.leave.set()
        await self._serving
        for task in self._tasks:
            task.cancel()
        self._server = self._serving = self._sessions = None

    def _protocol(self) -> type[Protocol]:
        shares = self.shares

        class UserProtocol(Protocol):
            """HTTP for whoever the kernel says is there."""

            _counted: int | None = None

            def let_in(self, sock: socket.socket) -> None:
                try:
                    caller = caller_of(sock)
                except OSError:
                    self.app = _crowded
                    return
                if shares.connect(caller.uid):
                    self._counted = caller.uid
                    self.app = _Known(caller, self.app)
                else:
                    self.app = _crowded

            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                if self._counted is not None:
                    shares.leave(self._counted)
                    self._counted = None

        return UserProtocol

    def _accept(self) -> None:
        assert self._sessions is not None
        try:
            sock, _ = self._sessions.accept()
        except OSError:
            return
        task = asyncio.get_running_loop().create_task(self._session(sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _session(self, sock: socket.socket) -> None:
        """Hear which jail it is, and give the connection to that jail's supervisor; what is wrong is told."""
        with sock:
            try:
                caller = caller_of(sock)
            except OSError:
                return
            if not self.shares.connect(caller.uid):
                return
            try:
                if await _readable(sock):
                    async with self.shares.request(caller.uid):
                        work = partial(_hand_on, self._manager, caller, sock)
                        await asyncio.get_running_loop().run_in_executor(self.shares.threads, work)
            finally:
                self.shares.leave(caller.uid)


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


async def _crowded(scope: Scope, receive: Receive, send: Send) -> None:
    error = JailmgrError("engine", "you have too many connections to it", "Close some of them.", "unavailable")
    await refused(error)(scope, receive, send)


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
                supervisor.ask("admit", [sock.fileno()], jail=jail, lib=lib)
        except JailmgrError as error:
            protocol.send(sock, {"error": error.as_dict()})
    except (OSError, ValueError) as error:
        log.info("a session of uid %d did not begin: %s", caller.uid, error)


def listen(path: str, kind: socket.SocketKind) -> socket.socket:
    """A socket that everybody may connect to, in place of one that a killed engine left; nobody listens on it yet."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        sock.bind(path)
        # Not by umask, which is that of all threads; the directory is root's.
        os.chmod(path, 0o666)
    except OSError as error:
        sock.close()
        raise from_os(f"socket {path}", error) from error
    return sock
