"""The pool of kind `project`: a directory of the host's ext4 or xfs, of which each jail's part has a project quota.

It is mounted on the pool's place (a bind mount), so that it is nosuid and nodev whatever the host's disk is. Project
ids are of a range of its own, by which several instances share a file system: the directory itself is in the range's
first project, so that the file system's own count says that the range is taken, for as long as the pool is there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.runtime import syscalls as kernel
from jailmgr.storage import project_quota as quota
from jailmgr.storage.btrfs import directory
from jailmgr.storage.kind import DIRECTORIES, Pool

FIRST_PROJECT, PROJECTS, RANGES = 0x40000000, 1 << 24, 64
"""Our project ids: 64 ranges of 16,777,216, up to 0x7FFFFFFF. Away from what others count up from: Kubernetes from
1048577, LXD and Incus from 10000, container engines from 1."""

_TRASH = "trash"


def refusal(directory_of_pool: str) -> str:
    """Why there can be no such pool in a directory; empty where there can. Raises OSError."""
    with directory(directory_of_pool) as fd:
        if not quota.file_system(fd):
            return f"{directory_of_pool} is on no ext4 or xfs"
        if not quota.is_enforced(fd):
            return f"the file system of {directory_of_pool} has no project quotas on"
    return ""


def is_made(root: Root) -> bool:
    """As PoolKind."""
    return os.path.isdir(root.pool_tree)


def is_mounted(root: Root) -> bool:
    """Whether the directory lies on the pool's place. JailmgrError `conflict` where something else does."""
    try:
        place, tree = os.stat(root.pool), os.stat(root.pool_tree)
    except FileNotFoundError:
        return False
    if os.path.samestat(place, tree):
        return True
    if os.path.ismount(root.pool):
        why = f"what is mounted there is not {root.pool_tree}"
        raise JailmgrError(f"pool {root.pool}", why, "Unmount it.", "conflict")
    return False


def opened(root: Root) -> Pool | None:
    """As PoolKind."""
    if not is_mounted(root):
        return None
    if os.statvfs(root.pool).f_flag & os.ST_RDONLY:
        why, hint = "its file system is mounted read-only", "See dmesg: the kernel does so after an error."
        raise JailmgrError(f"pool {root.pool}", why, hint, "unavailable")
    if why := refusal(root.pool):
        raise JailmgrError(
            f"pool {root.pool}", why, "Mount it with prjquota, as when the pool was made.", "unavailable"
        )
    with directory(root.pool) as fd:
        first = quota.project_of(fd)
    if first not in _firsts():
        raise JailmgrError(
            f"pool {root.pool}",
            f"its project is {first}, none of jailmgr's: a copy of a pool has lost what its jails' limits lie on",
            "Put back the file system that it was made on.",
            "conflict",
        )
    return Pool(root.pool, "project", first_project=first)


def make(root: Root, size: int | None, lock: int) -> None:
    """As PoolKind. JailmgrError `full` where all ranges of project ids are in use."""
    new = f"{root.pool_tree}.new"
    _clear(new)
    os.mkdir(new, 0o700)
    with directory(new) as fd:
        if quota.claim(fd, _free_ranges(fd), inherit=False) is None:
            why = f"the project ids from {FIRST_PROJECT} to {FIRST_PROJECT + RANGES * PROJECTS - 1} are all in use"
            raise JailmgrError(f"pool {root.pool_tree}", why, 'Set [pool] kind = "btrfs" in config.toml.', "full")
        for name in (*DIRECTORIES, _TRASH):
            os.mkdir(name, 0o700, dir_fd=fd)
        os.fsync(fd)
    os.rename(new, root.pool_tree)
    os.fsync(lock)


def mount(root: Root) -> None:
    """As PoolKind. The host's own attributes of the mount are not the pool's: /var may be noexec."""
    if is_mounted(root):
        return
    attributes = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV | kernel.MOUNT_ATTR_NOATIME
    fd = kernel.open_tree(root.pool_tree)
    try:
        kernel.mount_setattr(fd, attributes, kernel.MOUNT_ATTR_NOEXEC | kernel.MOUNT_ATTR_ATIME, 0, kernel.MS_PRIVATE)
        with directory(root.pool) as place:
            kernel.move_mount(fd, place)
    finally:
        os.close(fd)


def unmount(root: Root) -> None:
    """As PoolKind."""
    if is_mounted(root):
        kernel.umount(root.pool, kernel.UMOUNT_NOFOLLOW)


def headroom(root: Root) -> int:
    """As PoolKind: no such pool is ever filled up before the host's disk is."""
    return _left(root)


def writable(root: Root, reserve: int) -> int | None:
    """As PoolKind. What is still in memory has its blocks reserved already, by delayed allocation."""
    return _left(root) - reserve


def _left(root: Root) -> int:
    """Bytes that are free, or that the free inodes would take at the file system's own reckoning of them."""
    found = os.statvfs(root.pool_tree)
    left = found.f_bavail * found.f_frsize
    if found.f_files:
        left = min(left, found.f_favail * (found.f_blocks * found.f_frsize // found.f_files))
    return left


def _firsts() -> range:
    return range(FIRST_PROJECT, FIRST_PROJECT + RANGES * PROJECTS, PROJECTS)


def _free_ranges(fd: int) -> Iterable[int]:
    """First projects of the ranges in which nothing is and none is named in /etc, in any order: others choose, too."""
    named = quota.listed()
    for first in random.sample(_firsts(), RANGES):
        last = first + PROJECTS
        if not any(first <= project < last for project in named) and not any(quota.uses(fd, first, last)):
            yield first


def _clear(new: str) -> None:
    """Take away what a try that was cut off has left: directories with nothing in them."""
    try:
        for name in os.listdir(new):
            os.rmdir(f"{new}/{name}")
        os.rmdir(new)
    except FileNotFoundError:
        pass
