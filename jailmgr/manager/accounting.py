"""What jails use, sampled once a minute for a hoster's bills: CPU, memory, disk and network, by the hour.

Counters begin anew with each run of a jail. What a run used after its last sample its supervisor notes at its end
(runtime/runs.py), engine or no engine. A sample looks who runs first, then counts the runs that have ended, then those
that go on: so no run is taken for new before the one before it was counted to its end.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from jailmgr.database import COPY_SECONDS
from jailmgr.errors import JailmgrError
from jailmgr.manager.context import Context
from jailmgr.manager.metering import (
    Addition,
    Clock,
    Seen,
    Subject,
    Track,
    UsageRecord,
    begin,
    count_disk,
    count_ended,
    count_running,
)
from jailmgr.manager.usage_store import UsageStore
from jailmgr.model import Jail
from jailmgr.runtime import cgroups, netlink, runs
from jailmgr.runtime.proc import start_time
from jailmgr.runtime.state import State, host_boot_id, load_state, running_jails
from jailmgr.storage.volume import committed_usage, volume_usage
from jailmgr.store import CREATING

SAMPLE_SECONDS = 60.0

log = logging.getLogger(__name__)


class _Running(NamedTuple):
    """A jail's state file: what is in it, and which one it was."""

    state: State
    file: tuple[int, int]
    """Inode and time of last change."""


class Accountant:
    """Samples from `start` to `stop`, and whenever it is asked to. All calls may come from any thread."""

    def __init__(self, m: Context, every: float = SAMPLE_SECONDS) -> None:
        self._m = m
        self._every = every
        self.path = m.root.usage
        self._store = UsageStore(self.path)
        self._boot = host_boot_id()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="accounting", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End. What is used from here on the next engine counts. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._store.close()

    def sample(self, tenant: str | None = None) -> None:
        """Count all jails, or a tenant's, up to now. Raises JailmgrError, OSError; the next sample makes up for it."""
        with self._lock:
            rows, pool = self._m.store.rows(tenant), self._m.pool_if_open
            self._count(
                [row.jail for row in rows if row.state != CREATING],
                committed_usage(pool) if pool is not None else None,
            )
            if tenant is None:
                strange = {one.on_disk.id for one in self._m.strangers.values() if one.on_disk.id is not None}
                self._store.tidy({row.jail.id for row in rows} | strange, time.time())

    def settle(self, jail: Jail) -> None:
        """Count a jail that is about to be deleted for the last time. What fails is logged: it goes all the same.

        Nothing waits for the disk: the log is deleted after this, so a power cut may lose what it told, not double it.
        """
        try:
            with self._lock:
                pool = self._m.pool_if_open
                held = volume_usage(pool, jail.id) if pool is not None else None
                self._count([jail], None if held is None else {jail.id: held}, lasting=False)
        except (JailmgrError, OSError) as error:
            log.error("the last usage of %s/%s could not be counted: %s", jail.tenant, jail.name, error)

    def usage(self, tenant: str | None, since: float, until: float) -> list[UsageRecord]:
        """What each tenant's jails (None: all tenants') have used between two times, up to now; deleted ones too.

        Times are seconds since the epoch. Tenants without any are left out. Raises JailmgrError where it can't be read.
        """
        if since > until:
            raise JailmgrError("usage", "its span ends before it begins", "", "invalid")
        self.sample(tenant)
        with self._lock:
            return self._store.usage(tenant, since, until)

    def _run(self) -> None:
        while not self._stopping.wait(self._every):
            try:
                self.sample()
            except (JailmgrError, OSError) as error:
                log.error("usage could not be sampled: %s", error)
            # Not accounting, but the thread that comes by once a minute and that nobody waits for.
            self._m.store.renew_copy(COPY_SECONDS)

    def _count(self, jails: list[Jail], disks: dict[int, int] | None, lasting: bool = True) -> None:
        """`disks`: bytes of each jail's volume by its id; None where they can't be known now."""
        tenants = {tenant.name: tenant.id for tenant in self._m.store.tenants()}
        jails = [jail for jail in jails if jail.tenant in tenants]
        subjects = {jail.id: Subject(tenants[jail.tenant], jail.tenant, jail.id, jail.name) for jail in jails}
        running = self._running(jails)
        behind = self._count_ended(jails, subjects, lasting)
        now = self._now()
        seen = self._look(jails, running)
        tracks = self._store.tracks()
        counted: dict[int, Track] = {}
        additions: list[Addition] = []
        for jail in jails:
            if jail.id in behind or (jail.id in running and jail.id not in seen):
                continue
            track = tracks.get(jail.id) or begin(jail.created_at, now)
            if jail.id in seen:
                track, addition = count_running(track, subjects[jail.id], seen[jail.id], now)
                additions.append(addition)
            held = None if disks is None else disks.get(jail.id, 0)
            counted[jail.id], addition = count_disk(track, subjects[jail.id], held, now)
            additions.append(addition)
        self._store.write(counted, additions, lasting)

    def _count_ended(self, jails: list[Jail], subjects: dict[int, Subject], lasting: bool) -> set[int]:
        """Count the runs that have been noted; ids of the jails of which not all could be.

        In two rounds, since a file that was taken before and not dropped comes before the one there is now.
        """
        behind: set[int] = set()
        for _ in range(2):
            taken = self._take(jails, behind)
            if not taken:
                break
            now, tracks = self._now(), self._store.tracks()
            counted: dict[int, Track] = {}
            additions: list[Addition] = []
            jails = [jail for jail in jails if jail.id in taken]
            for jail in jails:
                ended, track = taken[jail.id], tracks.get(jail.id) or begin(jail.created_at, now)
                if ended and ended[-1].run != track.taken:
                    for run in ended:
                        track, addition = count_ended(track, subjects[jail.id], run)
                        additions.append(addition)
                    counted[jail.id] = track._replace(taken=ended[-1].run)
            self._store.write(counted, additions, lasting)
            for jail in jails:
                with self._told(jail, behind):
                    runs.drop(self._lib(jail), lasting)
        return behind

    def _take(self, jails: list[Jail], behind: set[int]) -> dict[int, list[runs.Run]]:
        found = {}
        for jail in jails:
            with self._told(jail, behind):
                ended = runs.take(self._lib(jail))
                if ended is not None:
                    found[jail.id] = ended
        return found

    @contextmanager
    def _told(self, jail: Jail, behind: set[int]) -> Iterator[None]:
        """One jail's trouble is not the others'; it waits for the next sample."""
        try:
            yield
        except BlockingIOError:
            behind.add(jail.id)
        except OSError as error:
            log.error("what %s/%s has used could not be counted: %s", jail.tenant, jail.name, error)
            behind.add(jail.id)

    def _running(self, jails: list[Jail]) -> dict[int, _Running]:
        """Those that run, by id."""
        root, found = self._m.root, {}
        names = {tenant: set(running_jails(root, tenant)) for tenant in {jail.tenant for jail in jails}}
        for jail in jails:
            if jail.name in names[jail.tenant]:
                file = self._file(jail)
                state = load_state(root.tenant_run(jail.tenant), jail.name)
                if file is not None and state is not None and not state.once and state.boot_id == self._boot:
                    found[jail.id] = _Running(state, file)
        return found

    def _look(self, jails: list[Jail], running: dict[int, _Running]) -> dict[int, Seen]:
        """What those have used, by id: without any that has ended meanwhile, of which the numbers may be the next's."""
        if not running:
            return {}
        links = netlink.link_counters(self._m.root.link_prefix)
        found = {}
        for jail in jails:
            if jail.id not in running:
                continue
            state, file = running[jail.id]
            alive = start_time(state.pid) == state.starttime
            memory, cpu_ns, _ = cgroups.usage(self._m.hierarchies, self._m.root.jail_cgroup(jail.tenant, jail.name))
            if not alive or (self._file(jail) != file and not self._same(jail, state)):
                continue
            received, sent = runs.total([links.get(nic.veth) for nic in jail.nics])
            found[jail.id] = Seen(runs.identity(state), runs.age(state), memory or 0, cpu_ns or 0, received, sent)
        return found

    def _same(self, jail: Jail, state: State) -> bool:
        now = load_state(self._m.root.tenant_run(jail.tenant), jail.name)
        return now is not None and runs.identity(now) == runs.identity(state)

    def _file(self, jail: Jail) -> tuple[int, int] | None:
        try:
            status = os.stat(f"{self._m.root.tenant_run(jail.tenant)}/{jail.name}.json")
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _lib(self, jail: Jail) -> str:
        return self._m.root.jail_lib(jail.tenant, jail.name)

    def _now(self) -> Clock:
        return Clock(self._boot, time.time(), time.monotonic())
