"""Volumes made ahead: a thread makes what the next jails of an image will take, so that no `create` waits for it."""

from __future__ import annotations

import logging
import os
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from jailmgr.errors import JailmgrError
from jailmgr.storage.volume import keep_ready

if TYPE_CHECKING:
    from jailmgr.manager.host import Manager

QUIET = 1.0
"""Seconds without a new jail before any is made: each commits a transaction, for which a `create` or `start` waits."""

log = logging.getLogger(__name__)


class Ahead:
    """Makes what it is asked for, from `start` to `stop`."""

    def __init__(self, m: Manager) -> None:
        self._m = m
        self._asked = SimpleQueue[str | None]()
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End with what is being made. Idempotent."""
        self._asked.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def want(self, layer: str) -> None:
        """Have volumes over the layer made ahead; returns at once."""
        self._asked.put(layer)

    def _run(self) -> None:
        wanted: set[str] = set()
        while True:
            try:
                layer = self._asked.get(timeout=QUIET if wanted else None)
            except Empty:
                self._make(wanted)
                wanted.clear()
                continue
            if layer is None:
                return
            wanted.add(layer)

    def _make(self, layers: set[str]) -> None:
        if self._m.disk_is_full():
            return
        for layer in filter(os.path.isdir, layers):  # an image may have been deleted meanwhile
            try:
                keep_ready(self._m.pool, [layer])
            except (JailmgrError, OSError) as error:
                log.warning("%s", error)
