"""uvicorn, as the engine wants it: for root only, and idle when nobody asks.

Its own main loop wakes ten times a second to look at the clock and at signals; ours waits for an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from array import array
from collections.abc import Callable, Iterator

import h11
import msgspec
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from jailmgr.engine.answers import answer, error_content, refused
from jailmgr.errors import JailmgrError

CONNECTIONS_MAX = 512
"""At a time, since each costs a descriptor. What more connections ask for is refused (status 503)."""

log = logging.getLogger(__name__)


class Protocol(H11Protocol):
    """HTTP for peers that are root, which the kernel vouches for."""

    allowed = frozenset({0})
    """uids; the socket's mode keeps others out already."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.let_in(transport.get_extra_info("socket"))
        if len(self.connections) > CONNECTIONS_MAX:
            log.warning("refused a connection: there are %d", len(self.connections))
            self.app = crowded

    def let_in(self, sock: socket.socket) -> None:
        """Decide what application the peer gets."""
        uid = peer_uid(sock)
        if uid not in self.allowed:
            log.warning("refused a connection of uid %d", uid)
            self.app = forbidden

    def send_400_response(self, msg: str) -> None:
        """As the API tells errors: what came is not HTTP."""
        error = JailmgrError("request", msg.rstrip("."), "", "invalid")
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=msgspec.json.encode(error_content(error))),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def peer_uid(sock: socket.socket) -> int:
    """The uid at the other end when it connected (SO_PEERCRED, unix(7))."""
    credentials = array("I")
    credentials.frombytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 3 * credentials.itemsize))
    return credentials[1]


async def forbidden(scope: Scope, receive: Receive, send: Send) -> None:
    """The application that peers other than root get."""
    error = JailmgrError("engine", "only root may use it", "Run the command as root.", "denied")
    await refused(error)(scope, receive, send)


async def crowded(scope: Scope, receive: Receive, send: Send) -> None:
    """The application that one connection too many gets. uvicorn's own answer is a text, and the API's are JSON."""
    why = f"it has {CONNECTIONS_MAX} connections already"
    hint = "Try again. Whose they are: ss -xp | grep engine.sock"
    content = error_content(JailmgrError("engine", why, hint, "unavailable"))
    await answer(503, content, {"connection": "close"})(scope, receive, send)


class Server(uvicorn.Server):
    """Calls `serves` once it does, and goes on until `leave` is set. Signals are the caller's business."""

    def __init__(self, app: ASGIApp, serves: Callable[[], None], protocol: type[Protocol] = Protocol) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        self._serves = serves
        self.leave = asyncio.Event()

    async def main_loop(self) -> None:
        self._serves()
        await self.leave.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
