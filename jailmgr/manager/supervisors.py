"""Replace supervisors that die while jails of their tenant run; keep a supervisor without jails for a while."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.manager.watch import Watcher
from jailmgr.runtime import attach
from jailmgr.runtime.proc import open_process
from jailmgr.runtime.state import read_state, running_jails, supervisor_process, waiting_jails

HOLD_SECONDS = 5.0
"""How long a supervisor without jails is kept for the next start: 30 ms saved."""

log = logging.getLogger(__name__)


class Supervisors:
    """It watches the supervisors of tenants that were given to `watch`."""

    def __init__(self, root: Root, watcher: Watcher) -> None:
        self.on_replaced: list[Callable[[], None]] = []
        self._root = root
        self._watcher = watcher
        self._lock = threading.Lock()
        self._watched: set[str] = set()
        self._held: dict[str, tuple[attach.Supervisor, float]] = {}

    def watch(self, tenant: str) -> None:
        """Watch over a tenant's jails and its supervisor from now on. Idempotent. JailmgrError, OSError."""
        self._watcher.watch_tenant(tenant)
        with self._lock:
            if not self._watcher.is_open or tenant in self._watched:
                return
            process = supervisor_process(self._root, tenant)
            pidfd = open_process(process) if process is not None else None
            if pidfd is None:
                return
            self._watched.add(tenant)
        self._watcher.watch_pidfd(pidfd, partial(self._ended, tenant))

    def connect(self, tenant: str) -> attach.Supervisor:
        """Return a connection to the tenant's supervisor: the one that is kept, if it answers. JailmgrError."""
        held = self._take(tenant)
        if held is not None:
            try:
                held.ask("hello", within=attach.ANSWER_SECONDS)
                return held
            except JailmgrError:
                held.close()
        return attach.connect(self._root, tenant)

    def hold(self, link: attach.Supervisor, tenant: str) -> None:
        """Keep a tenant's supervisor, jails or not, for `HOLD_SECONDS` from now, by an idle connection to it."""
        with self._lock:
            old, _ = self._held.pop(tenant, (None, 0.0))
            if self._watcher.is_open:
                self._held[tenant] = (link, time.monotonic() + HOLD_SECONDS)
            else:
                link.close()
        if old is not None:
            old.close()
        self._watcher.after(HOLD_SECONDS, partial(self._expire, tenant))

    def release(self, tenant: str) -> None:
        """Close the connection that keeps a supervisor without jails."""
        link = self._take(tenant)
        if link is not None:
            link.close()

    def stop(self) -> None:
        """Close all connections, after the watcher has stopped."""
        with self._lock:
            links = [link for link, _ in self._held.values()]
            self._held.clear()
            self._watched.clear()
        for link in links:
            link.close()

    def _take(self, tenant: str) -> attach.Supervisor | None:
        with self._lock:
            return self._held.pop(tenant, (None, 0.0))[0]

    def _expire(self, tenant: str) -> None:
        with self._lock:
            _, until = self._held.get(tenant, (None, float("inf")))
        if until <= time.monotonic():
            self.release(tenant)

    def _ended(self, tenant: str) -> None:
        with self._lock:
            self._watched.discard(tenant)
        try:
            runs = any(read_state(self._root, tenant, name) for name in running_jails(self._root, tenant))
            if runs or waiting_jails(self._root, tenant):
                log.warning("the supervisor of tenant %s ended while its jails run: a new one adopts them", tenant)
                attach.connect(self._root, tenant).close()
                self.watch(tenant)
                for follow in self.on_replaced:
                    follow()
        except (JailmgrError, OSError) as error:
            log.error("tenant %s has no supervisor: %s", tenant, error)
