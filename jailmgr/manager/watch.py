"""A thread with an event loop that sees jails come and go, processes end, and times pass, as it happens.

Supervisors write and remove a state file for each jail in their tenant's runtime directory (inotify(7)). Any thread may
register a call for changes of jails, for the end of a process (pidfd_open(2)), or for a time. The watcher imports none
of its callers. Its thread makes the calls, one after the other.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack
from queue import Empty, SimpleQueue
from time import monotonic

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.runtime.loop import Loop
from jailmgr.runtime.syscalls import libc

IN_MOVED_TO, IN_DELETE, IN_ONLYDIR, IN_IGNORED = 0x80, 0x200, 0x01000000, 0x8000
_EVENT = struct.Struct("=iIII")
"""struct inotify_event: wd, mask, cookie, length of the name."""

log = logging.getLogger(__name__)


class Watcher:
    """Watches from `open` to `close`, and calls back from `start` to `stop`. It takes nothing before and after."""

    def __init__(self, root: Root) -> None:
        self.on_jail_change: list[Callable[[str, str], None]] = []
        """Called in their order with the tenant and name of a jail that has come, gone or changed."""
        self.changed = threading.Condition()
        """Notified as jails come, go and change."""
        self._root = root
        self._loop: Loop | None = None
        self._inotify = self._wake = -1
        self._calls = SimpleQueue[Callable[[Loop], object]]()
        self._lock = threading.Lock()
        self._tenants: dict[int, str] = {}
        self._pidfds: set[int] = set()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Take what is registered from now on. JailmgrError `unavailable`."""
        inotify = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if inotify < 0:
            error = ctypes.get_errno()
            raise JailmgrError(
                "inotify", os.strerror(error), "Raise the sysctl fs.inotify.max_user_instances.", "unavailable"
            )
        with ExitStack() as undo:
            undo.callback(os.close, inotify)
            wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, wake)
            self._loop = Loop()
            undo.pop_all()
        self._inotify, self._wake = inotify, wake
        self._loop.watch(self._inotify, lambda _: self._jails_changed())
        self._loop.watch(self._wake, lambda _: self._woken())

    def start(self) -> None:
        """Begin to call back."""
        assert self._loop is not None
        self._thread = threading.Thread(target=self._loop.run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for what is being done. Idempotent."""
        self._stopping.set()
        if self._thread is not None and self._loop is not None:
            self._call(Loop.stop)
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Close all descriptors, after `stop`. Idempotent."""
        with self._lock:
            if self._loop is None:
                return
            for fd in (self._inotify, self._wake, *self._pidfds):
                os.close(fd)
            self._loop.close()
            self._loop = None
            self._inotify = self._wake = -1
            self._pidfds.clear()

    @property
    def is_open(self) -> bool:
        return self._inotify >= 0

    def pause(self, seconds: float) -> bool:
        """Wait so long, or until `stop`. Return whether it was `stop`, or nothing is watched at all."""
        return not self.is_open or self._stopping.wait(seconds)

    def watch_tenant(self, tenant: str) -> None:
        """Watch the jails of a tenant from now on. Idempotent. JailmgrError `unavailable`, OSError."""
        with self._lock:
            if self._inotify < 0 or tenant in self._tenants.values():
                return
            directory = self._root.tenant_run(tenant)
            os.makedirs(directory, mode=0o700, exist_ok=True)
            mask = ctypes.c_uint32(IN_MOVED_TO | IN_DELETE | IN_ONLYDIR)
            watch = libc.inotify_add_watch(self._inotify, os.fsencode(directory), mask)
            if watch < 0:
                error = ctypes.get_errno()
                raise JailmgrError(f"inotify {directory}", os.strerror(error), "", "unavailable")
            self._tenants[watch] = tenant

    def watch_pidfd(self, pidfd: int, ended: Callable[[], None]) -> None:
        """Call once the process has ended. The pidfd is the watcher's from now on, and is closed before the call."""
        with self._lock:
            if self._inotify < 0:
                os.close(pidfd)
                return
            self._pidfds.add(pidfd)
        self._call(lambda loop: loop.watch(pidfd, lambda _: self._process_ended(pidfd, ended)))

    def after(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call once, that much later; not after `stop`."""
        due = monotonic() + seconds
        self._call(lambda loop: loop.after(max(0.0, due - monotonic()), callback))

    def _call(self, do: Callable[[Loop], object]) -> None:
        """Have the loop's own thread do it: no other thread may touch the loop."""
        with self._lock:
            if self._inotify >= 0:
                self._calls.put(do)
                os.eventfd_write(self._wake, 1)

    def _woken(self) -> None:
        assert self._loop is not None
        os.eventfd_read(self._wake)
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                return
            try:
                call(self._loop)
            except OSError as error:
                log.error("it could not be watched: %s", error)

    def _process_ended(self, pidfd: int, ended: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.forget(pidfd)
        with self._lock:
            self._pidfds.discard(pidfd)
        os.close(pidfd)
        if not self._stopping.is_set():
            ended()

    def _jails_changed(self) -> None:
        events, at, jails = os.read(self._inotify, 65536), 0, set()
        while at < len(events):
            watch, mask, _, length = _EVENT.unpack_from(events, at)
            at += _EVENT.size
            name = os.fsdecode(events[at : at + length].rstrip(b"\0"))
            at += length
            with self._lock:
                tenant = self._tenants.get(watch)
                if mask & IN_IGNORED:
                    self._tenants.pop(watch, None)
            if not mask & IN_IGNORED and tenant is not None and name.endswith(".json"):
                jails.add((tenant, name.removesuffix(".json")))
        with self.changed:
            self.changed.notify_all()
        for tenant, name in jails:
            self._follow(tenant, name)

    def _follow(self, tenant: str, name: str) -> None:
        try:
            for follow in self.on_jail_change:
                follow(tenant, name)
        except (JailmgrError, OSError) as error:
            log.error("jail %s/%s came or went: %s", tenant, name, error)
