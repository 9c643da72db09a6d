"""The manager: one instance's store, pool, networks and locks, which every use case is given.

The use cases are plain functions over it, a module for each verb. All are synchronous and may be called from any
thread; two on the same jail wait for each other, others don't.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING

from jailmgr import claims
from jailmgr.config import Root
from jailmgr.errors import JailmgrError, full_name
from jailmgr.manager.batches import Batches
from jailmgr.model import Jail
from jailmgr.runtime import cgroups
from jailmgr.storage.pool import Pool, close_pool, is_made, open_pool
from jailmgr.storage.volume import keep_ready
from jailmgr.store import READY, Row, Store

if TYPE_CHECKING:
    from jailmgr.manager.accounting import Accountant
    from jailmgr.manager.disk_guard import DiskGuard
    from jailmgr.manager.images import Building
    from jailmgr.manager.strangers import Stranger
    from jailmgr.manager.watch import Watcher
    from jailmgr.model import JailView

AHEAD_SECONDS = 1.0
"""Without a new jail, before volumes are made ahead: each commits a transaction, for which a `create` waits."""
ENDED_SECONDS = 0.2
"""Without a jail's end, before flows are ended: each look goes through the host's whole table."""
ADOPT = "Take it back into the store: jailmgr engine stop (jails run on), then jailmgr doctor --fix --adopt."
"""The hint about a jail that is there and that the store does not know (manager/strangers.py)."""


class Manager:
    """An instance of jailmgr. `open` first; one process at a time (the engine holds run/engine.lock)."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.store = Store(root.store)
        self.network_lock = threading.RLock()
        """Over bridges, nftables and DNS, which are changed by reading and writing back."""
        self.image_lock = threading.Lock()
        """Over the choice of an image and its removal."""
        self.opened_at = time.monotonic()
        self.lxcfs_lock = threading.Lock()
        """Over the start of lxcfs."""
        self.lxcfs_ends: list[float] = []
        """When it died lately, of time.monotonic()."""
        self.lxcfs_tries = 0
        """How often its files have been given anew, since it began, without all jails having them."""
        self.lxcfs_lack: list[str] = []
        """Tenants of those jails; empty before all were asked."""
        self.boot_lock = threading.Lock()
        """Over the start of what starts with the host."""
        self.buildings: dict[str, Building] = {}
        self.networks_up: set[int] = set()
        self.totals: dict[str, tuple[cgroups.Limits, int]] = {}
        """By tenant, what its group was last held to, and the group's identity."""
        self.cpu_seen: dict[str, tuple[float, int, float | None]] = {}
        """By tenant: when its CPU time was last looked at (monotonic), the time, and the mean number of CPUs then."""
        self.pins: dict[tuple[str, str], str] = {}
        """The CPUs of running jails that have not all of them (manager/pinning.py), by tenant and name."""
        self.pins_lock = threading.Lock()
        self.claimed: set[str] = set()
        """Keys of what this process has claimed on the host."""
        self._pool: Pool | None = None
        self._pool_lock = threading.Lock()
        self._locks: dict[tuple[str, str], tuple[threading.RLock, int]] = {}
        self._locks_lock = threading.Lock()
        self.stopped_views: dict[int, tuple[Row, int | None, JailView]] = {}
        """By id, the last view of each jail that didn't run, and what it was made from: it changes with that only."""
        self.strangers: dict[tuple[str, str], Stranger] = {}
        """Jails that are there and that the store does not know, by tenant and name, as the engine opened."""
        self.watcher: Watcher | None = None
        self.disk_guard: DiskGuard | None = None
        self.accountant: Accountant | None = None
        self.ahead: Batches[str] | None = None
        """Makes volumes ahead, over these layers."""
        self.ended: Batches[tuple[str, str]] | None = None
        """Ends the flows of jails that have ended, by tenant and name."""

    def open(self, autostart: bool = True) -> None:
        """Open the store, finish or undo what a crash left, find the jails that run and watch over them.

        `autostart`: the first time after a boot of the host, start the jails that want it.
        Raises JailmgrError where the store can't be read, or is gone while its jails are there.
        """
        from jailmgr.manager.accounting import Accountant
        from jailmgr.manager.disk_guard import DiskGuard
        from jailmgr.manager.networks import end_flows_of
        from jailmgr.manager.reconcile import reconcile
        from jailmgr.manager.strangers import refuse_blank_store
        from jailmgr.manager.watch import Watcher

        refuse_blank_store(self.root, self.store)
        for directory in (self.root.lib, self.root.run):
            os.makedirs(directory, mode=0o700, exist_ok=True)
        claims.claim_mark(self.root)
        self.store.open(copy=False)
        try:
            self.watcher = Watcher(self)
            self.accountant = Accountant(self)
            reconcile(self)
            self.store.renew_copy()
            self.disk_guard = DiskGuard(self)
            self.disk_guard.start()
            self.ahead = Batches("ahead", AHEAD_SECONDS, self._make_ahead)
            self.ahead.start()
            self.ended = Batches("ended", ENDED_SECONDS, partial(end_flows_of, self))
            self.ended.start()
            if self.pool_if_open is not None:
                for image in self.store.images():
                    self.make_ahead(image.fingerprint)
            self.accountant.start()
            self.watcher.start(autostart)
        except BaseException:
            self._shut()
            raise

    def close(self) -> None:
        """Stop watching. Where no jail runs, all that is ours goes off the host; else it stays. Idempotent."""
        from jailmgr.manager.reconcile import take_down

        if self.watcher is None:
            return
        self.watcher.stop()
        if self.disk_guard is not None:
            self.disk_guard.stop()
        self._stop_batches()
        if self.accountant is not None:
            self.accountant.stop()
        try:
            take_down(self)
        finally:
            self._shut()

    def _shut(self) -> None:
        if self.watcher is not None:
            self.watcher.stop()
            self.watcher = None
        if self.disk_guard is not None:
            self.disk_guard.stop()
            self.disk_guard = None
        self._stop_batches()
        if self.accountant is not None:
            self.accountant.stop()
            self.accountant = None
        self.store.close()

    def _stop_batches(self) -> None:
        for batches in (self.ahead, self.ended):
            if batches is not None:
                batches.stop()
        self.ahead = self.ended = None

    def check_disk(self) -> None:
        """JailmgrError `full` where the host's disk has no room for anything that writes."""
        if self.disk_guard is not None:
            self.disk_guard.check()

    def make_ahead(self, image: str) -> None:
        """Have what takes long of the next jail of an image made before somebody waits for it; returns at once."""
        if self.ahead is not None:
            self.ahead.add(f"{self.root.image(image)}/rootfs")

    def _make_ahead(self, layers: set[str]) -> None:
        if not self.disk_is_full():
            for layer in layers:
                keep_ready(self.pool, [layer])

    def end_flows(self, jail: Jail) -> None:
        """Have the connections of a jail that has ended ended; returns at once. Nothing after `close`."""
        if self.ended is not None:
            self.ended.add((jail.tenant, jail.name))

    def disk_is_full(self) -> bool:
        return self.disk_guard is not None and self.disk_guard.full

    def check_known(self, tenant: str, name: str) -> None:
        """Refuse to touch a jail of which the store has another's row. JailmgrError `conflict`."""
        if (stranger := self.strangers.get((tenant, name))) is not None:
            why = f"what is there of that name is another jail (id {stranger.on_disk.id}) than the store knows"
            raise JailmgrError(f"jail {full_name(tenant, name)}", why, ADOPT, "conflict")

    @property
    def pool(self) -> Pool:
        """The storage pool, opened (and on first use made) when it is first asked for."""
        with self._pool_lock:
            if self._pool is None:
                if not is_made(self.root) and (jails := self.store.jails()):
                    raise JailmgrError(
                        f"pool {self.root.pool}",
                        f"it is gone, with the volumes of {len(jails)} jails in it",
                        "Put it back from a backup, or delete the jails (jailmgr delete --force --all) to begin anew.",
                    )
                self._pool = open_pool(self.root)
            return self._pool

    @property
    def pool_if_open(self) -> Pool | None:
        return self._pool

    def shut_pool(self) -> None:
        """Unmount the pool; it is opened again when asked for."""
        with self._pool_lock:
            close_pool(self.root)
            self._pool = None

    @cached_property
    def hierarchies(self) -> cgroups.Hierarchies:
        return cgroups.discover()

    @contextmanager
    def jail(self, tenant: str, name: str) -> Iterator[Jail]:
        """A ready jail, locked. JailmgrError `missing`, or `conflict` while it is made, renamed or deleted."""
        self.store.jail(tenant, name)
        self.check_known(tenant, name)
        with self._locked(tenant, name):
            yield self.store.jail(tenant, name)

    @contextmanager
    def tenant(self, name: str) -> Iterator[None]:
        """A tenant's totals and the limits of its jails, locked together; taken after a jail's lock, never before."""
        with self._locked(name, ""):
            yield

    @contextmanager
    def jail_of_any_state(self, tenant: str, name: str) -> Iterator[Row]:
        """A jail, locked, whatever a failure left it in. JailmgrError `missing`, `conflict`."""
        if self.store.find_row(tenant, name) is None:
            self.store.jail(tenant, name)
        self.check_known(tenant, name)
        with self._locked(tenant, name):
            row = self.store.find_row(tenant, name)
            yield row or Row(self.store.jail(tenant, name), READY)

    @contextmanager
    def _locked(self, tenant: str, name: str) -> Iterator[None]:
        key = (tenant, name)
        with self._locks_lock:
            lock, users = self._locks.get(key, (threading.RLock(), 0))
            self._locks[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._locks_lock:
                lock, users = self._locks[key]
                if users == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = (lock, users - 1)
