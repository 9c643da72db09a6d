"""The processes of a group and all below: listed, frozen, killed, waited for.

On v2 by the group's own files (cgroup-v2.rst, "Core Interface Files"), on v1 by the freezer and pidfds. Standard
library only.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time

from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime.cgroup_hierarchies import Hierarchies, directory, field, read, read_or, relative, write

_BATCH = 256
"""pidfds held at a time, well below a soft RLIMIT_NOFILE of 1024."""
_STUCK = "They wait in the kernel, for a disk or a file server perhaps."


def members(h: Hierarchies, cgroup: str) -> list[int]:
    """Processes in the group and below, as this pid namespace numbers them; empty where there is no such group."""
    found: set[int] = set()
    if h.mounts:
        # Whoever joins does so in the order of `mounts`: the first has them all.
        found.update(_members(f"{h.mounts[0]}/{relative(cgroup)}"))
    if h.unified:
        found.update(_members(f"{h.unified}/{relative(cgroup)}"))
    return sorted(found)


def _members(path: str, at: int | None = None) -> list[int]:
    """Walks by directory fds: the names a guest gives to nested groups can add up to more than PATH_MAX."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    except FileNotFoundError:
        return []
    try:
        found = _procs(fd)
        with os.scandir(fd) as entries:
            below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        for name in below:
            found += _members(name, fd)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return []
    finally:
        os.close(fd)
    return found


def _procs(fd: int) -> list[int]:
    """A threaded group of the guest's has no list of processes (EOPNOTSUPP): they are in that of its domain."""
    procs = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=fd)
    text = b""
    try:
        while part := os.read(procs, 65536):
            text += part
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    finally:
        os.close(procs)
    return [int(line) for line in text.split() if line != b"0"]


def freeze(h: Hierarchies, cgroup: str, timeout: float = 10.0, keep: bool = False) -> None:
    """Stop every process of the group; on return all are. Raises JailmgrError, and then none is.

    `keep`: then those that can be stopped are, and the others as they come out of the kernel (they may wait for a FUSE
    server that has been stopped).
    """
    if not _set_frozen(h, cgroup, True, timeout):
        if not keep:
            _set_frozen(h, cgroup, False, timeout)
        raise JailmgrError(f"freezing {cgroup}", f"some processes could not be stopped within {timeout:g} s", _STUCK)


def thaw(h: Hierarchies, cgroup: str, timeout: float = 10.0) -> None:
    """Let them run again; fine if they do. Raises JailmgrError."""
    if not _set_frozen(h, cgroup, False, timeout):
        raise JailmgrError(f"thawing {cgroup}", f"not done within {timeout:g} s")


def is_frozen(h: Hierarchies, cgroup: str) -> bool:
    """`freeze` was asked for and is done; False where there is no such group."""
    if h.unified:
        return field(read_or(f"{h.unified}/{relative(cgroup)}/cgroup.events", ""), "frozen") == 1
    return read_or(f"{directory(h, 'freezer', cgroup)}/freezer.state", "") == "FROZEN"


def _set_frozen(h: Hierarchies, cgroup: str, frozen: bool, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    path = directory(h, "freezer", cgroup)
    try:
        if h.unified:
            path = f"{h.unified}/{relative(cgroup)}"
            write(f"{path}/cgroup.freeze", "1" if frozen else "0")
            return wait_event(path, "frozen", int(frozen), deadline)
        if path is None:
            raise JailmgrError(f"freezing {cgroup}", "this host has no freezer", code="unavailable")
        state = "FROZEN" if frozen else "THAWED"
        write(f"{path}/freezer.state", state)
        while read(f"{path}/freezer.state") != state:
            # v1 tells of it by no event: reading the state is what takes the freezer a step further.
            if time.monotonic() >= deadline:
                return False
            select.select([], [], [], 0.002)
        return True
    except OSError as error:
        raise from_os(f"{'freezing' if frozen else 'thawing'} {cgroup}", error) from error


def wait_event(path: str, name: str, value: int, deadline: float) -> bool:
    """Wait until the cgroup.events of a v2 group's directory has `name` at `value`, or the group is gone: True.

    `deadline`: time.monotonic() at which to give up: False.
    """
    try:
        fd = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        events = select.poll()
        events.register(fd, select.POLLPRI | select.POLLERR)
        while field(os.pread(fd, 256, 0).decode(), name) != value:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            events.poll(max(1, left * 1000))
        return True
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return True
    finally:
        os.close(fd)


def kill(h: Hierarchies, cgroup: str, timeout: float = 10.0) -> None:
    """SIGKILL every process of the group, frozen ones too, and wait until none is left. Fine if there is no group.

    Raises JailmgrError where some are left after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    path = f"{h.unified}/{relative(cgroup)}"
    try:
        if h.unified and os.path.isdir(path):
            write(f"{path}/cgroup.kill", "1")
            wait_event(path, "populated", 0, deadline)
        while members(h, cgroup):
            _kill_members(h, cgroup, deadline)
            if not wait_members(h, cgroup, deadline):
                left = " ".join(map(str, members(h, cgroup)[:10]))
                raise JailmgrError(f"killing {cgroup}", f"processes are left after {timeout:g} s: {left}", _STUCK)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise from_os(f"killing {cgroup}", error) from error


def send_kill(h: Hierarchies, cgroup: str) -> None:
    """Send SIGKILL to every process of the group, and wait for none. Fine if there is no group. Raises JailmgrError.

    Without cgroup v2, a process that is forked meanwhile may be missed.
    """
    path = f"{h.unified}/{relative(cgroup)}"
    try:
        if h.unified and os.path.isdir(path):
            write(f"{path}/cgroup.kill", "1")
            return
        pids = members(h, cgroup)
        for start in range(0, len(pids), _BATCH):
            _send_kill(h, cgroup, pids[start : start + _BATCH])
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise from_os(f"killing {cgroup}", error) from error


def _kill_members(h: Hierarchies, cgroup: str, deadline: float) -> None:
    """Where there is no cgroup.kill. A fork bomb outruns a list, so v1's processes are frozen for it."""
    frozen = not h.unified and "freezer" in h.v1
    if frozen:
        _set_frozen(h, cgroup, True, max(0.0, deadline - time.monotonic()))
    try:
        pids = members(h, cgroup)
        for start in range(0, len(pids), _BATCH):
            _send_kill(h, cgroup, pids[start : start + _BATCH])
    finally:
        if frozen:
            _set_frozen(h, cgroup, False, 0)


def _send_kill(h: Hierarchies, cgroup: str, pids: list[int]) -> None:
    """By pidfds whose process is a member once they are open: a pid may be somebody else's by now."""
    opened = _open_pidfds(pids)
    try:
        still = set(members(h, cgroup))
        for pid, fd in opened.items():
            if pid in still:
                try:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                except ProcessLookupError:
                    continue
    finally:
        for fd in opened.values():
            os.close(fd)


def _open_pidfds(pids: list[int]) -> dict[int, int]:
    opened: dict[int, int] = {}
    for pid in pids:
        try:
            opened[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
    return opened


def wait_members(h: Hierarchies, cgroup: str, deadline: float) -> bool:
    """Wait until the group has no process, by their ends, since v1 has no event for it; False at the deadline."""
    while pids := members(h, cgroup):
        opened = _open_pidfds(pids[:_BATCH])
        try:
            for fd in opened.values():
                ends = select.poll()
                ends.register(fd, select.POLLIN)
                if not ends.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    return False
        finally:
            for fd in opened.values():
                os.close(fd)
        if time.monotonic() >= deadline:
            return not members(h, cgroup)
    return True
