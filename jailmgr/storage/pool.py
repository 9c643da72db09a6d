"""The pool: where images and volumes live. Made on first use, of the kind that the host's disk lets be the best.

Where its file system has project quotas on, it is a directory there (kind `project`), else a btrfs of our own in a
loop file (`btrfs`). Who makes, mounts or unmounts it holds a lock (flock(2)) on the directory around it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os
from jailmgr.storage import btrfs_pool, project_pool
from jailmgr.storage.btrfs_pool import MIN_SIZE
from jailmgr.storage.kind import Pool, PoolKind
from jailmgr.units import parse_size

__all__ = [
    "MIN_SIZE",
    "Pool",
    "close_pool",
    "host_headroom",
    "is_made",
    "is_open",
    "open_pool",
    "pool_usage",
    "writable",
]

_KINDS: dict[str, PoolKind] = {"btrfs": btrfs_pool, "project": project_pool}


class _Wanted(msgspec.Struct, frozen=True):
    """What [pool] of config.toml asks for."""

    kind: str = ""
    size: int | None = None


def open_pool(root: Root, size: int | None = None) -> Pool:
    """The instance's pool, made and mounted if it isn't.

    One that is there is kept. A new one is of the kind that [pool] in config.toml names, else a btrfs where `size` in
    bytes or [pool] size says how big its file may get, else as the host's disk has it. Raises JailmgrError `full` where
    the host's disk has less than 512 MiB, or than the size asked for; `unavailable` where the host lacks what it takes;
    `denied` without root's rights; `conflict` where something else is mounted in its place, or where it is of another
    kind than the one asked for; `invalid` for a bad configuration.
    """
    try:
        return _opened(root) or _open(root, size)
    except OSError as error:
        raise _explained(f"pool {root.pool}", error) from error


def close_pool(root: Root) -> None:
    """Unmount the pool. Fine where it isn't mounted. Raises JailmgrError `conflict` while something on it is in use."""
    try:
        with _lock(root) as locked:
            if locked is not None:
                _present(root).unmount(root)
    except OSError as error:
        if error.errno == errno.EBUSY:
            hint = "A process has a file or its working directory there: see fuser -vm on it."
            raise JailmgrError(f"pool {root.pool}", "it is in use", hint, "conflict") from error
        raise _explained(f"pool {root.pool}", error) from error


def is_made(root: Root) -> bool:
    """Whether the instance has a pool, mounted or not."""
    return any(kind.is_made(root) for kind in _KINDS.values())


def is_open(root: Root) -> bool:
    """Whether the pool is mounted. JailmgrError as `open_pool`."""
    try:
        return _opened(root) is not None
    except OSError as error:
        raise _explained(f"pool {root.pool}", error) from error


def pool_usage(pool: Pool) -> tuple[int, int]:
    """Bytes in all and bytes free, as statvfs(3) tells them: free in the pool, which isn't free on the host's disk."""
    found = os.statvfs(pool.path)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def host_headroom(root: Root) -> int:
    """Bytes the host's disk would have left were the pool filled up; negative where it would be full before."""
    return _present(root).headroom(root)


def writable(root: Root, reserve: int) -> int | None:
    """Bytes the pool may still take before the host's disk has less than `reserve` left; negative where it has.

    None where there is no pool, or the disk has room for all that it can hold. Raises OSError.
    """
    return _present(root).writable(root, reserve) if is_made(root) else None


def _present(root: Root) -> PoolKind:
    """The kind of the pool there is; where only a mount is left of one, that of the file that was under it."""
    return project_pool if project_pool.is_made(root) and not btrfs_pool.is_made(root) else btrfs_pool


def _opened(root: Root) -> Pool | None:
    return _present(root).opened(root) if is_made(root) or os.path.ismount(root.pool) else None


def _open(root: Root, size: int | None) -> Pool:
    if os.geteuid() != 0:
        raise JailmgrError(f"pool {root.pool}", "only root can make and mount it", "Run it as root.", "denied")
    os.makedirs(root.lib, mode=0o700, exist_ok=True)
    os.makedirs(root.pool, mode=0o700, exist_ok=True)
    os.chmod(os.path.dirname(root.pool), 0o700)
    with _lock(root) as lock:
        assert lock is not None
        wanted = _configured(root)
        kind = _choose(root, wanted, size)
        if not kind.is_made(root) and not os.path.ismount(root.pool):
            kind.make(root, size or wanted.size, lock)
        kind.mount(root)
    opened = kind.opened(root)
    if opened is None:
        raise JailmgrError(f"pool {root.pool}", "quotas could not be switched on", "", "unavailable")
    return opened


def _choose(root: Root, wanted: _Wanted, size: int | None) -> PoolKind:
    """The kind that the pool has, else is to have. JailmgrError `conflict`, `invalid`, `unavailable`."""
    made = [name for name, kind in _KINDS.items() if kind.is_made(root)]
    if len(made) > 1:
        why = f"there are two, {root.pool_file} and {root.pool_tree}"
        raise JailmgrError(f"pool {root.pool}", why, "Move the one away that no jails are in.", "conflict")
    if made:
        if wanted.kind not in ("", *made):
            why = f"it is of kind {made[0]}, and config.toml says {wanted.kind}"
            hint = "A pool keeps its kind: delete all jails and images and then the pool, or take [pool] kind out."
            raise JailmgrError(f"pool {root.pool}", why, hint, "conflict")
        return _KINDS[made[0]]
    sized = size is not None or wanted.size is not None
    if wanted.kind == "btrfs" or (not wanted.kind and (sized or os.path.ismount(root.pool))):
        return btrfs_pool
    why = project_pool.refusal(os.path.dirname(root.pool))
    if not wanted.kind:
        return btrfs_pool if why else project_pool
    if sized:
        hint = 'Take [pool] size out of config.toml, or have [pool] kind = "btrfs".'
        raise JailmgrError(f"pool {root.pool}", "a pool of kind project has no size", hint, "invalid")
    if why:
        hint = "Mount it with prjquota (ext4: after tune2fs -O project -Q prjquota), or have another [pool] kind."
        raise JailmgrError(f"pool {root.pool}", why, hint, "unavailable")
    return project_pool


def _configured(root: Root) -> _Wanted:
    import tomllib

    path, key = f"{root.etc}/config.toml", ""
    try:
        with open(path, "rb") as file:
            pool = tomllib.load(file).get("pool", {})
        key = "[pool] kind: "
        kind = pool.get("kind", "")
        if kind not in ("", *_KINDS):
            raise ValueError(f"{kind!r} is none; there are {' and '.join(_KINDS)}")
        key = "[pool] size: "
        size = pool.get("size")
        return _Wanted(kind, None if size is None else parse_size(str(size)))
    except FileNotFoundError:
        return _Wanted()
    except (ValueError, TypeError, AttributeError) as error:
        raise JailmgrError(f"configuration {path}", f"{key}{error}", "", "invalid") from error


@contextmanager
def _lock(root: Root) -> Iterator[int | None]:
    """An fd of the pool's directory, locked; None where there is no such directory."""
    try:
        fd = os.open(os.path.dirname(root.pool), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _explained(what: str, error: OSError) -> JailmgrError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return JailmgrError(what, str(error.strerror), "Run it as root.", "denied")
    if error.errno == errno.ENODEV and "mount" in str(error.filename):
        hint = "Load it: modprobe btrfs (or install a kernel that has it)."
        return JailmgrError(what, "the kernel has no btrfs", hint, "unavailable")
    if error.filename == "/dev/loop-control":
        return JailmgrError(what, "the kernel has no loop devices", "Load them: modprobe loop.", "unavailable")
    if error.errno == errno.ENOSPC:
        return JailmgrError(what, "the disk is full", "Free some space.", "full")
    return from_os(what, error)
