"""A thread that sees jails come and go, and supervisors and lxcfs die, as it happens.

A supervisor writes and removes a state file for each jail in its tenant's runtime directory (inotify(7)): published
ports follow it, since a jail that powers itself off or is started again by its restart policy asks nobody. A supervisor
that dies while jails of its tenant run, or are about to (pidfd_open(2)), is replaced, and so is lxcfs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import struct
import threading
import time
from typing import TYPE_CHECKING

from jailmgr.errors import JailmgrError, full_name
from jailmgr.manager import lxcfs
from jailmgr.runtime import attach
from jailmgr.runtime.proc import open_process
from jailmgr.runtime.state import load_state, read_state, running_jails, supervisor_process, waiting_jails
from jailmgr.runtime.syscalls import libc

if TYPE_CHECKING:
    from jailmgr.manager.host import Manager

IN_MOVED_TO, IN_DELETE, IN_ONLYDIR, IN_IGNORED = 0x80, 0x200, 0x01000000, 0x8000
_EVENT = struct.Struct("=iIII")
"""struct inotify_event: wd, mask, cookie, length of the name."""

HOLD_SECONDS = 5.0
"""How long a supervisor without jails is kept for the next start: 30 ms saved."""

log = logging.getLogger(__name__)


class Watcher:
    """Watches the tenants it is told of, from `start` to `stop`."""

    def __init__(self, m: Manager) -> None:
        self._m = m
        self._inotify = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._inotify < 0:
            error = ctypes.get_errno()
            raise JailmgrError(
                "inotify", os.strerror(error), "Raise the sysctl fs.inotify.max_user_instances.", "unavailable"
            )
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._changed = threading.Condition()
        self._tenants: dict[int, str] = {}
        self._supervisors: dict[int, str] = {}
        self._lxcfs = -1
        self._lxcfs_at: float | None = None
        self._held: dict[str, tuple[attach.Supervisor, float]] = {}
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, autostart: bool = True) -> None:
        """Begin, and start the jails that want it after a boot of the host."""
        from jailmgr.manager import boot

        self._threads = [threading.Thread(target=self._run, name="watch", daemon=True)]
        if autostart:
            self._threads.append(
                threading.Thread(target=boot.autostart, args=(self._m,), name="autostart", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    def pause(self, seconds: float) -> bool:
        """Wait so long, or until `stop`; whether it was that."""
        return self._stopping.wait(seconds)

    def stop(self) -> None:
        """End, and wait for what is being done. Idempotent."""
        self._stopping.set()
        if self._inotify < 0:
            return
        os.eventfd_write(self._wake, 1)
        for thread in self._threads:
            thread.join()
        with self._changed:
            for fd in (self._inotify, self._wake, *self._supervisors, *self._of_lxcfs()):
                os.close(fd)
            self._inotify = self._lxcfs = -1
            self._supervisors.clear()
            for link, _ in self._held.values():
                link.close()
            self._held.clear()

    def hold(self, link: attach.Supervisor, tenant: str) -> None:
        """Keep a tenant's supervisor, jails or not, for `HOLD_SECONDS` from now, by an idle connection to it."""
        with self._changed:
            old, _ = self._held.pop(tenant, (None, 0.0))
            if self._inotify < 0:
                old = link
            else:
                self._held[tenant] = (link, time.monotonic() + HOLD_SECONDS)
                os.eventfd_write(self._wake, 1)
        if old is not None:
            old.close()

    def take(self, tenant: str) -> attach.Supervisor | None:
        """The connection that is held to a tenant's supervisor, if one is; it is the caller's then."""
        with self._changed:
            return self._held.pop(tenant, (None, 0.0))[0]

    def release(self, tenant: str) -> None:
        """Let a supervisor without jails go."""
        link = self.take(tenant)
        if link is not None:
            link.close()

    def _expire(self) -> int | None:
        """Do what it is time for, and let go of what has been held long enough: milliseconds to the next, None where
        there is none.
        """
        now = time.monotonic()
        with self._changed:
            over = [tenant for tenant, (_, until) in self._held.items() if until <= now]
            is_time = self._lxcfs_at is not None and self._lxcfs_at <= now
            if is_time:
                self._lxcfs_at = None
        for tenant in over:
            self.release(tenant)
        if is_time:
            lxcfs.again(self._m)
        with self._changed:
            times = [until for _, until in self._held.values()]
            if self._lxcfs_at is not None:
                times.append(self._lxcfs_at)
        return max(0, int((min(times) - time.monotonic()) * 1000) + 1) if times else None

    def watch(self, tenant: str) -> None:
        """Watch over a tenant's jails and its supervisor from now on; again and again is fine."""
        with self._changed:
            if self._inotify < 0:
                return
            if tenant not in self._tenants.values():
                directory = self._m.root.tenant_run(tenant)
                os.makedirs(directory, mode=0o700, exist_ok=True)
                mask = IN_MOVED_TO | IN_DELETE | IN_ONLYDIR
                watch = libc.inotify_add_watch(self._inotify, os.fsencode(directory), ctypes.c_uint32(mask))
                if watch < 0:
                    error = ctypes.get_errno()
                    raise JailmgrError(f"inotify {directory}", os.strerror(error), "", "unavailable")
                self._tenants[watch] = tenant
            if tenant in self._supervisors.values():
                return
            process = supervisor_process(self._m.root, tenant)
            pidfd = open_process(process) if process is not None else None
            if pidfd is not None:
                self._supervisors[pidfd] = tenant
                os.eventfd_write(self._wake, 1)

    @property
    def watches_lxcfs(self) -> bool:
        """Whether there is one, or its end has not been seen yet."""
        return self._lxcfs >= 0

    def watch_lxcfs(self, pidfd: int) -> None:
        """Watch over lxcfs, of which none is watched now, by its pidfd, which is the watcher's then."""
        with self._changed:
            if self._inotify < 0:
                os.close(pidfd)
                return
            self._lxcfs = pidfd
            os.eventfd_write(self._wake, 1)

    def lxcfs_again(self, seconds: float) -> None:
        """Give lxcfs' files once more, so long from now."""
        with self._changed:
            if self._inotify >= 0:
                self._lxcfs_at = time.monotonic() + seconds
                os.eventfd_write(self._wake, 1)

    def _of_lxcfs(self) -> list[int]:
        return [self._lxcfs] if self._lxcfs >= 0 else []

    def wait_ready(self, tenant: str, name: str, timeout: float) -> None:
        """Until a running jail's init has told that the system is up; JailmgrError `failed` if it won't."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                state = load_state(self._m.root.tenant_run(tenant), name)
                if state is None:
                    raise JailmgrError(
                        f"jail {full_name(tenant, name)}",
                        "it ended before it was up",
                        f"See: jailmgr logs {full_name(tenant, name)}",
                    )
                if state.ready:
                    return
                left = deadline - time.monotonic()
                if left <= 0:
                    why = f"its init has not told within {timeout:g} s that the system is up; the jail runs on"
                    raise JailmgrError(
                        f"jail {full_name(tenant, name)}", why, f"See: jailmgr logs {full_name(tenant, name)}"
                    )
                self._changed.wait(left)

    def _run(self) -> None:
        while not self._stopping.is_set():
            poll = select.poll()
            with self._changed:
                watched = [self._inotify, self._wake, *self._supervisors, *self._of_lxcfs()]
            for fd in watched:
                poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(self._expire())}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if self._inotify in ready:
                self._heard()
            for pidfd in ready - {self._inotify, self._wake}:
                if pidfd == self._lxcfs:
                    self._lxcfs_ended()
                else:
                    self._supervisor_ended(pidfd)

    def _heard(self) -> None:
        events, at, jails = os.read(self._inotify, 65536), 0, set()
        while at < len(events):
            watch, mask, _, length = _EVENT.unpack_from(events, at)
            at += _EVENT.size
            name = os.fsdecode(events[at : at + length].rstrip(b"\0"))
            at += length
            tenant = self._tenants.get(watch)
            if mask & IN_IGNORED:
                with self._changed:
                    self._tenants.pop(watch, None)
            elif tenant is not None and name.endswith(".json"):
                jails.add((tenant, name.removesuffix(".json")))
        with self._changed:
            self._changed.notify_all()
        for tenant, name in jails:
            self._attempt(tenant, name)

    def _attempt(self, tenant: str, name: str) -> None:
        from jailmgr.manager.networks import follow
        from jailmgr.manager.pinning import follow_pin

        try:
            self.watch(tenant)
            follow(self._m, tenant, name)
            follow_pin(self._m, tenant, name)
        except (JailmgrError, OSError) as error:
            log.error("jail %s/%s came or went: %s", tenant, name, error)

    def _lxcfs_ended(self) -> None:
        with self._changed:
            os.close(self._lxcfs)
            self._lxcfs = -1
        if not self._stopping.is_set():
            lxcfs.ended(self._m)

    def _supervisor_ended(self, pidfd: int) -> None:
        with self._changed:
            tenant = self._supervisors.pop(pidfd, None)
            os.close(pidfd)
        if tenant is None or self._stopping.is_set():
            return
        try:
            root = self._m.root
            runs = any(read_state(root, tenant, name) for name in running_jails(root, tenant))
            if runs or waiting_jails(root, tenant):
                log.warning("the supervisor of tenant %s ended while its jails run: a new one adopts them", tenant)
                attach.connect(root, tenant).close()
                self.watch(tenant)
                lxcfs.again(self._m)
        except (JailmgrError, OSError) as error:
            log.error("tenant %s has no supervisor: %s", tenant, error)
