"""Users who are not root: how much of the engine each may take.

Nobody's share depends on what another does: requests and operations are counted for each uid (connections are the
doorkeeper's to count), and all of theirs together use a pool of threads of their own, so that root's requests never
wait for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from jailmgr.errors import JailmgrError

REQUESTS_EACH, THREADS = 4, 16
OPERATIONS_EACH = 16
"""Begun by a uid and not ended."""


class Shares:
    """What each uid has of the engine now. For the event loop's thread only."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(THREADS, "user")
        self._requests: dict[int, tuple[asyncio.Semaphore, int]] = {}

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
