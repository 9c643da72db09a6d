"""The store, the pool, the cgroup hierarchies and the locks of one root. It imports no use case.

Two calls on the same jail wait for each other, others don't.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, full_name
from jailmgr.model import Jail, Stranger
from jailmgr.runtime import cgroups
from jailmgr.storage.pool import Pool, close_pool, is_made, open_pool
from jailmgr.store import READY, Row, Store

ADOPT = "Take it back into the store: jailmgr engine stop (jails run on), then jailmgr doctor --fix --adopt."
"""The hint about a jail that is there and that the store does not know (manager/strangers.py)."""


class Context:
    """All use cases take one. Any thread may call its methods."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.store = Store(root.store)
        self.network_lock = threading.RLock()
        """Over bridges, nftables and DNS, which are changed by reading and writing back."""
        self.image_lock = threading.Lock()
        """Over the choice of an image and its removal."""
        self.boot_lock = threading.Lock()
        """Over the start of what starts with the host."""
        self.strangers: dict[tuple[str, str], Stranger] = {}
        """Jails that are there and that the store does not know, by tenant and name, as the engine opened."""
        self._pool: Pool | None = None
        self._pool_lock = threading.Lock()
        self._locks: dict[tuple[str, str], tuple[threading.RLock, int]] = {}
        self._locks_lock = threading.Lock()

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
                        "Put it back from a backup, or delete the jails (jailmgr delete --force --all) to start empty.",
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
