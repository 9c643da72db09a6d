"""The instance's lxcfs(1): one for all of its jails, which see their own memory, CPUs and load by it.

Not the distribution's service: ours has a directory of its own, and is started with the first jail. Its mount is the
one that jailmgr makes in the host's mount namespace. It outlives the engine, which finds it again by its pid file and
command line. Where it dies, the watcher has it replaced, and the files are put into the jails that run again.

A file `stale` lies beside it from before it begins until every jail has its files: what fails is tried again after a
while, and who is killed in between leaves that to the next engine.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import shutil
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os
from jailmgr.manager.watch import Watcher
from jailmgr.runtime import attach, cgroups, scope
from jailmgr.runtime.cgroup_services import has_service, make_service, remove_service
from jailmgr.runtime.state import running_jails, supervisor_process
from jailmgr.runtime.syscalls import MNT_DETACH, UMOUNT_NOFOLLOW, umount

SBIN = "/usr/bin:/usr/local/bin:/usr/sbin:/usr/local/sbin:/bin"
DEVICE = "/dev/fuse"
START_S, STOP_S = 10.0, 2.0
CGROUP = "lxcfs"
"""Of its group, which has a CPU quota: guests that read its files without end would use up the host's CPUs by it."""
RENEW_S = 60.0
"""For a supervisor to put the files into all of its jails."""
ENDS_MAX, ENDS_S = 5, 10.0
"""So many ends in so many seconds, and it is started again with the next jail, or where some still lacked its files."""
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Before each further try: a supervisor may be ending, hang or not be replaced yet. A guest may be in the way for ever,
and of its supervisor's time each try takes some.
"""

log = logging.getLogger(__name__)


def program() -> str | None:
    """The host's lxcfs; None where it isn't installed."""
    return shutil.which("lxcfs", path=SBIN)


def cpus_most() -> float:
    """How many CPUs' worth of time it may use for all jails: a quarter of the host's, and half of one at least.

    A read takes it less than a millisecond. Where the quota is used up, reads of these files wait in all jails.
    """
    return max(0.5, (os.cpu_count() or 1) / 4)


def is_there(root: Root) -> bool:
    """Whether anything is left of it on the host: a process, a mount, their directory, its cgroup."""
    return _place(root).exists() or has_service(cgroups.discover(), root.cgroup, CGROUP)


class Lxcfs:
    """A root has one, from the first jail on."""

    def __init__(self, root: Root, watcher: Watcher) -> None:
        self._root = root
        self._watcher = watcher
        self._lock = threading.Lock()
        """Held while it is started."""
        self._watched = False
        """Whether there is one, or its end has not been seen yet."""
        self._ends: list[float] = []
        """When it died lately, of time.monotonic()."""
        self._tries = 0
        """How often its files have been given once more, since it began, without all jails having them."""
        self._lack: list[str] = []
        """Tenants of those jails; empty before all were asked."""
        self._again_at = 0.0

    def up(self) -> None:
        """Start it, where the host has one, before a jail starts. What fails is logged: jails do without."""
        # Where it runs, no start waits until the jails of all tenants have been given its files.
        if not self._watcher.is_open or self._watched:
            return
        with self._lock:
            if not self._watched:
                self._tries = 0
                self._attempt()

    def again(self) -> None:
        """Start it and give its files, where jails still lack them."""
        with self._lock:
            if self._watcher.is_open and _stale(self._root).exists():
                self._attempt()

    def settle(self, needed: bool) -> None:
        """When the engine begins: find it again. One that died is replaced where jails run, else cleared away."""
        if needed:
            self.up()
            return
        pidfd = _find_whole(self._root)
        if pidfd is None:
            stop(self._root)
        else:
            self._watch(pidfd)

    def _attempt(self) -> None:
        try:
            if self._watched or self._run():
                self._give()
        except (JailmgrError, OSError) as error:
            log.error("lxcfs: %s: jails see the host's memory and CPUs", error)
        if _stale(self._root).exists() and self._tries < len(PAUSES_S):
            pause = PAUSES_S[self._tries]
            self._tries += 1
            at = self._again_at = time.monotonic() + pause
            self._watcher.after(pause, partial(self._again_if_due, at))

    def _again_if_due(self, at: float) -> None:
        if at == self._again_at:  # no later try has taken its place
            self.again()

    def _run(self) -> bool:
        """Have one run, and be watched; False where the host has none. Raises JailmgrError, OSError."""
        root = self._root
        pidfd = _find_whole(root)
        if pidfd is None:
            found = program()
            if found is None or not os.path.exists(DEVICE):
                return False
            _unmount(root)
            os.makedirs(root.lxcfs, mode=0o700, exist_ok=True)
            _stale(root).touch()
            self._lack = []
            pidfd = _start(root, found)
        self._watch(pidfd)
        return True

    def _watch(self, pidfd: int) -> None:
        self._watched = True
        self._watcher.watch_pidfd(pidfd, self._ended)

    def _give(self) -> None:
        """Its files to the jails that run, where some lack them: of all tenants, and then of those where it failed."""
        if not _stale(self._root).exists():
            return
        tenants = f"{self._root.run}/tenants"
        asked = self._lack or (os.listdir(tenants) if os.path.isdir(tenants) else [])
        self._lack = [tenant for tenant in asked if not _renew(self._root, tenant)]
        if not self._lack:
            _stale(self._root).unlink()

    def _ended(self) -> None:
        """It has died: start the next one, and give its files to the jails that run."""
        self._watched = False
        now = time.monotonic()
        self._ends = [*(at for at in self._ends if now - at < ENDS_S), now]
        if len(self._ends) > ENDS_MAX:
            log.error("lxcfs has ended %d times within %.0f s: it is left so until a jail starts", ENDS_MAX + 1, ENDS_S)
            return
        log.warning("lxcfs has ended: the next one takes its place")
        self.up()


def stop(root: Root) -> None:
    """End it and take its mount away; fine where there is none. Raises JailmgrError."""
    if not is_there(root):
        return
    try:
        pidfd = _find(root)
        if pidfd is not None:
            _end(pidfd)
        _unmount(root)
        place = _place(root)
        for file in (place / "pid", _stale(root)):
            file.unlink(missing_ok=True)
        # Never a tree: one that was just mounted by who was killed meanwhile would be walked into.
        for directory in (Path(root.lxcfs), place):
            with contextlib.suppress(FileNotFoundError):
                directory.rmdir()
        remove_service(cgroups.discover(), root.cgroup, CGROUP)
    except OSError as error:
        raise from_os("lxcfs", error) from error


def _place(root: Root) -> Path:
    return Path(root.lxcfs).parent


def _stale(root: Root) -> Path:
    return _place(root) / "stale"


def _find_whole(root: Root) -> int | None:
    """`_find`; one whose engine was killed before it was mounted is ended."""
    pidfd = _find(root)
    if pidfd is not None and _stale(root).exists() and not _is_mounted(root):
        _end(pidfd)
        return None
    return pidfd


def _find(root: Root) -> int | None:
    """Its pidfd, which the caller closes; None where it doesn't run."""
    try:
        pid = int((_place(root) / "pid").read_text())
        # First the descriptor and then the look: the number may be another's by now.
        pidfd = os.pidfd_open(pid)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None
    try:
        words = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
    except OSError:
        words = []
    if os.fsencode(_pid_option(root)) in words and not _ready(pidfd, 0):
        return pidfd
    os.close(pidfd)
    return None


def _pid_option(root: Root) -> str:
    """By which its command line is known again."""
    return f"--pidfile={_place(root)}/pid"


def _start(root: Root, found: str) -> int:
    """Its pidfd, once it is mounted. Raises JailmgrError, OSError."""
    argv = [found, "--enable-loadavg", _pid_option(root), root.lxcfs]
    quota = f"CPUQuota={cpus_most() * 100:.0f}%"
    argv = ["setsid", "--fork", *scope.begin_apart("The jails' view of their limits", argv, quota)]
    if joins := make_service(cgroups.discover(), root.cgroup, CGROUP, cpus_most()):
        # It moves itself before it is lxcfs, so that whoever is killed here leaves no lxcfs outside of the group.
        argv = ["/bin/sh", "-c", 'echo 0 >"$0" && exec "$@"', joins, *argv]
    mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    reading, writing = os.pipe()
    try:
        # setsid(1) forks: one that ends is init's to reap, however long the engine lives. SIGPIPE stays ignored, for
        # nobody reads what it says once it is mounted.
        subprocess.run(
            argv,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=writing,
            cwd="/",
            env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            restore_signals=False,
        )
        os.close(writing)
        writing = -1
        told = _await_mount(root, mounts, reading)
    except subprocess.SubprocessError as error:
        raise JailmgrError("lxcfs", f"it could not be started: {error}") from error
    finally:
        os.close(mounts)
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    pidfd = _find(root)
    if pidfd is None:
        raise JailmgrError("lxcfs", told.strip().rpartition("\n")[2] or "it did not start")
    return pidfd


def _await_mount(root: Root, mounts: int, reading: int) -> str:
    """What it says until it is mounted, ends or START_S have passed. mountinfo tells of changes by POLLPRI
    (proc_pid_mountinfo(5)).
    """
    told, deadline = b"", time.monotonic() + START_S
    poll = select.poll()
    poll.register(mounts, select.POLLPRI)
    poll.register(reading, select.POLLIN)
    while not _is_mounted(root):
        for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if fd == reading:
                chunk = os.read(reading, 4096)
                if not chunk:
                    return told.decode(errors="replace")
                told += chunk
        if time.monotonic() >= deadline:
            break
    return told.decode(errors="replace")


def _is_mounted(root: Root) -> bool:
    """And answers: stat(2) of it waits until it does, and fails where it is dead."""
    try:
        return os.stat(root.lxcfs).st_dev != os.stat(_place(root)).st_dev
    except OSError:
        return False


def _unmount(root: Root) -> None:
    """Of a dead one too, of which stat(2) says nothing."""
    while True:
        try:
            umount(root.lxcfs, MNT_DETACH | UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            raise


def _end(pidfd: int) -> None:
    """By SIGKILL: it has nothing to lose, and by SIGTERM its thread of load averages takes seconds. Closes `pidfd`."""
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        _ready(pidfd, STOP_S)
    finally:
        os.close(pidfd)


def _ready(pidfd: int, seconds: float) -> bool:
    """Wait until the process has ended; whether it has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _renew(root: Root, tenant: str) -> bool:
    """Have a tenant's supervisor put the files into its jails; whether it was done in all of them."""
    runs = bool(running_jails(root, tenant))
    # One that is alive is asked in any case: of a jail that is only just starting there is no state file yet.
    if not runs and supervisor_process(root, tenant) is None:
        return True
    try:
        # One that was killed has been replaced then, and its jails adopted.
        with attach.connect(root, tenant, start=runs) as supervisor:
            failed = supervisor.ask("renew_lxcfs", within=RENEW_S, mounted=root.lxcfs).body["failed"]
    except (JailmgrError, OSError) as error:
        log.warning("lxcfs: tenant %s: %s", tenant, error)
        return False
    if failed:
        log.error("lxcfs: its files could not be put into %s of tenant %s", ", ".join(failed), tenant)
    return not failed
