"""Connections of users who are not root: who they are, and how much of the engine each may take.

Nobody's share depends on what another does: connections, threads and operations are counted for each uid, and all of
theirs together use a pool of threads of their own, so that root's requests never wait for them.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from array import array
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from jailmgr.errors import JailmgrError
from jailmgr.manager.access import Caller

SO_PEERGROUPS = 59
"""asm-generic/socket.h; the socket module has no name for it."""
CONNECTIONS_EACH, CONNECTIONS_ALL = 32, 384
REQUESTS_EACH, THREADS = 4, 16
OPERATIONS_EACH = 16
"""Begun by a uid and not ended."""


def caller_of(sock: socket.socket) -> Caller:
    """The peer's uid and all of its groups when it connected. Raises OSError."""
    _, uid, gid = struct.unpack("3I", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    size = 256
    while True:
        try:
            others = array("I", sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, size * 4))
        except OSError as error:
            # It is in more of them than that.
            if error.errno != errno.ERANGE or size > 65536:
                raise
            size *= 4
            continue
        return Caller(uid, tuple(sorted({gid, *others})))


class Shares:
    """What each uid has of the engine now. For the event loop's thread only."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(THREADS, "user")
        self.connections: Counter[int] = Counter()
        self._requests: dict[int, tuple[asyncio.Semaphore, int]] = {}

    def connect(self, uid: int) -> bool:
        """Whether one more connection of this uid fits; it is counted then."""
        if self.connections[uid] >= CONNECTIONS_EACH or self.connections.total() >= CONNECTIONS_ALL:
            return False
        self.connections[uid] += 1
        return True

    def leave(self, uid: int) -> None:
        self.connections[uid] -= 1
        if self.connections[uid] <= 0:
            del self.connections[uid]

    @asynccontextmanager
    async def request(self, uid: int) -> AsyncIterator[None]:
        """Wait until fewer than REQUESTS_EACH of the uid's are being worked on."""
        slots, users = self._requests.get(uid, (asyncio.Semaphore(REQUESTS_EACH), 0))
        self._requests[uid] = (slots, users + 1)
        try:
            async with slots:
                yield
        finally:
            slots, users = self._requests[uid]
            if users > 1:
                self._requests[uid] = (slots, users - 1)
            else:
                del self._requests[uid]


def denied(what: str) -> JailmgrError:
    """The error of what is root's alone."""
    return JailmgrError(what, "only root may do this", "Ask who looks after this host.", "denied")
