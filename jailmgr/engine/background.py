"""Operations: what takes longer than a request. Each has a thread; clients ask, wait and cancel by its id.

The shape is LXD's (doc/rest-api: operations), with `error` beside `err` for hint and code.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from jailmgr.engine.answers import as_jailmgr_error
from jailmgr.errors import STATUS, JailmgrError
from jailmgr.progress import Cancelled, CancelledError, Progress
from jailmgr.times import rfc3339

KEPT_SECONDS = 300.0
"""How long an operation can be asked for after its end."""
KEPT_MAX = 1000
RUNNING_MAX, RUNNING_OF_USERS = 512, 256
"""Of all, and of those who are not root: they may fill their part and leave root his."""
TOLD_MAX = 2000
"""Characters of each part of what is told of an operation."""

STATUS_CODE = {"Running": 103, "Cancelling": 104, "Success": 200, "Failure": 400, "Cancelled": 401}
"""LXD's codes."""

Work = Callable[[Progress, Cancelled], Any]
"""Done in a thread; what it gives becomes the operation's result."""

log = logging.getLogger(__name__)


class Operation:
    """One of them. Its thread only writes `progress`; all else belongs to the event loop."""

    def __init__(
        self, description: str, resources: dict[str, list[str]], may_cancel: bool, tenant: str, uid: int
    ) -> None:
        self.tenant = tenant
        """Whose it is; empty where it is root's affair alone."""
        self.uid = uid
        """Who began it."""
        self.id = str(uuid.uuid4())
        self.description = description
        self.resources = resources
        self.may_cancel = may_cancel
        self.created_at = self.updated_at = time.time()
        self.status = "Running"
        self.progress: tuple[str, int, int] | None = None
        self.result: Any = None
        self.error: JailmgrError | None = None
        self.ended = asyncio.Event()
        self.cancel_wanted = threading.Event()

    @property
    def path(self) -> str:
        return f"/1.0/operations/{self.id}"

    def tell(self, step: str, done: int, total: int) -> None:
        """A Progress of the manager's; called from the operation's thread."""
        self.progress = (step, done, total)
        self.updated_at = time.time()

    def view(self) -> dict[str, Any]:
        """As LXD tells of an operation. `metadata` has `progress` while there is some, and at the end `result`."""
        metadata: dict[str, Any] = {}
        if self.progress is not None:
            metadata["progress"] = dict(zip(("step", "done", "total"), self.progress, strict=True))
        if self.result is not None:
            metadata["result"] = self.result
        return {
            "id": self.id,
            "class": "task",
            "description": self.description,
            "created_at": rfc3339(self.created_at),
            "updated_at": rfc3339(self.updated_at),
            "status": self.status,
            "status_code": STATUS_CODE[self.status],
            "resources": self.resources,
            "metadata": metadata,
            "may_cancel": self.may_cancel and self.status == "Running",
            "err": str(self.error) if self.error else "",
            "err_code": STATUS[self.error.code] if self.error else 0,
            "error": self.error.as_dict() if self.error else None,
        }


class Operations:
    """All of an engine's operations: those that run and, for a while, those that have ended."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._running: dict[str, Operation] = {}
        self._ended: dict[str, Operation] = {}
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(
        self,
        description: str,
        work: Work,
        resources: dict[str, list[str]] | None = None,
        may_cancel: bool = False,
        tenant: str = "",
        uid: int = 0,
    ) -> Operation:
        """Start `work` in a thread of its own. JailmgrError `unavailable` when too many run or we are stopping."""
        if self._closed:
            raise JailmgrError(description, "the engine is stopping", "Try again.", "unavailable")
        of_users = sum(bool(other.uid) for other in self._running.values()) if uid else 0
        if len(self._running) >= RUNNING_MAX or of_users >= RUNNING_OF_USERS:
            why = f"{len(self._running)} operations are under way"
            raise JailmgrError(description, why, "Wait for some to end.", "unavailable")
        description = _short(description)
        operation = Operation(description, resources or {}, may_cancel, tenant, uid)
        thread = threading.Thread(target=self._run, args=(operation, work), name=description, daemon=True)
        self._running[operation.id] = operation
        self._idle.clear()
        try:
            thread.start()
        except RuntimeError as error:
            self._leave(operation)
            raise JailmgrError(description, str(error), "The host is short of threads.", "unavailable") from error
        return operation

    def _run(self, operation: Operation, work: Work) -> None:
        result: Any = None
        failure: JailmgrError | None = None
        try:
            result = work(operation.tell, operation.cancel_wanted.is_set)
        except Exception as error:  # noqa: BLE001  a thread has nobody above it to tell
            failure = as_jailmgr_error(error, operation.description)
        self._loop.call_soon_threadsafe(self._end, operation, result, failure)

    def _end(self, operation: Operation, result: Any, failure: JailmgrError | None) -> None:
        if failure is None:
            operation.status = "Success"
        else:
            operation.status = "Cancelled" if isinstance(failure, CancelledError) else "Failure"
        if failure is not None:
            what, why, hint = (_short(text) for text in (failure.what, failure.why, failure.hint))
            failure = JailmgrError(what, why, hint, failure.code)
        operation.result, operation.error = result, failure
        operation.updated_at = time.time()
        took = operation.updated_at - operation.created_at
        log.info("%s: %s after %.3f s", operation.description, failure or "done", took)
        self._ended[operation.id] = operation
        if len(self._ended) > KEPT_MAX:
            del self._ended[next(iter(self._ended))]
        self._loop.call_later(KEPT_SECONDS, self._ended.pop, operation.id, None)
        operation.ended.set()
        self._leave(operation)

    def _leave(self, operation: Operation) -> None:
        del self._running[operation.id]
        if not self._running:
            self._idle.set()

    def get(self, id_: str) -> Operation:
        """JailmgrError `missing` for one never begun, or ended a while ago."""
        operation = self._running.get(id_) or self._ended.get(id_)
        if operation is None:
            raise no_such(id_)
        return operation

    def running(self) -> list[Operation]:
        return list(self._running.values())

    def all(self) -> list[Operation]:
        return [*self._running.values(), *self._ended.values()]

    def cancel(self, operation: Operation) -> None:
        """Ask it to give up; what it has done is undone first. JailmgrError `conflict` where that can't be."""
        if operation.ended.is_set():
            raise JailmgrError(operation.description, "it has ended already", "", "conflict")
        if not operation.may_cancel:
            raise JailmgrError(operation.description, "this operation can't be cancelled", "", "conflict")
        operation.status = "Cancelling"
        operation.cancel_wanted.set()

    async def close(self, within: float) -> bool:
        """Begin nothing more, cancel what can be, wait for the rest. False where some run on after `within` seconds."""
        self._closed = True
        for operation in self._running.values():
            if operation.may_cancel:
                self.cancel(operation)
        return await wait(self._idle, within)


def _short(text: str) -> str:
    """In one line and of bounded length: a client may have given it, and it is kept, and written to the log."""
    text = text if len(text) <= TOLD_MAX else f"{text[:TOLD_MAX]} …"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def no_such(id_: str) -> JailmgrError:
    return JailmgrError(f"operation {id_}", "there is none, or it ended a while ago", "", "missing")


async def wait(event: asyncio.Event, seconds: float) -> bool:
    """Whether it was set in time; a negative time is without end."""
    try:
        await asyncio.wait_for(event.wait(), None if seconds < 0 else seconds)
    except TimeoutError:
        return False
    return True
