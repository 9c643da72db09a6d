"""Work that nobody waits for, done in a thread once no more of it has come for a while: much of it costs as one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Generic, TypeVar

from jailmgr.errors import JailmgrError

T = TypeVar("T")

LATEST = 10.0
"""Times `quiet`: the first item waits no longer, however many come."""

log = logging.getLogger(__name__)


class Batches(Generic[T]):
    """Calls `act` with what `add` was given, `quiet` seconds after the last of it, from `start` to `stop`."""

    def __init__(self, name: str, quiet: float, act: Callable[[set[T]], None]) -> None:
        self._quiet = quiet
        self._act = act
        self._added = SimpleQueue[T | None]()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End with what is being done; what waits is dropped. Idempotent."""
        self._added.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def add(self, item: T) -> None:
        """Have it done; returns at once."""
        self._added.put(item)

    def _run(self) -> None:
        items: set[T] = set()
        latest = 0.0
        while True:
            try:
                wait = max(0.0, min(self._quiet, latest - monotonic())) if items else None
                item = self._added.get(timeout=wait)
            except Empty:
                self._do(items)
                items = set()
                continue
            if item is None:
                return
            if not items:
                latest = monotonic() + LATEST * self._quiet
            items.add(item)

    def _do(self, items: set[T]) -> None:
        try:
            self._act(items)
        except (JailmgrError, OSError) as error:
            log.warning("%s", error)
