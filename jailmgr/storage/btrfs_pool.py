"""The pool of kind `btrfs`: a btrfs of our own in a loop file, with quotas on before anything is put into it.

Each step can be cut off anywhere. The file gets its name only when its file system is whole, a loop device without
a mount is freed by the kernel, and quotas that are not on yet are switched on by the next to come.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.storage import btrfs, loop
from jailmgr.storage.btrfs_seeds import SEEDS
from jailmgr.storage.kind import DIRECTORIES, Pool
from jailmgr.units import format_size

MIN_SIZE = 512 << 20
MIN_RESERVE = 2 << 30
LABEL = "jailmgr"

_DIRECTORIES = (*DIRECTORIES, "reap", SEEDS)
_MS_NOSUID, _MS_NODEV, _MS_NOATIME = 2, 4, 1024
_FS_IOC_SETFLAGS, _FS_NOCOW_FL = 0x40086602, 0x00800000
_libc = ctypes.CDLL(None, use_errno=True)


def is_made(root: Root) -> bool:
    """As PoolKind."""
    return os.path.exists(root.pool_file)


def opened(root: Root) -> Pool | None:
    """As PoolKind."""
    if not os.path.ismount(root.pool):
        return None
    uuid = _require_ours(root)
    if os.statvfs(root.pool).f_flag & os.ST_RDONLY:
        raise JailmgrError(
            f"pool {root.pool}",
            "the kernel made it read-only after an error",
            "See dmesg; stop all jails and jailmgr, run btrfs check on the file, start again. "
            "btrfs-progs 6.2 (Debian 12) refuse a pool with simple quotas, 6.14 (Debian 13) check it.",
            "unavailable",
        )
    mode = btrfs.quota_mode(uuid)
    made = all(os.path.isdir(f"{root.pool}/{name}") for name in _DIRECTORIES)
    return Pool(root.pool, mode, uuid) if mode and made else None


def make(root: Root, size: int | None, lock: int) -> None:
    """As PoolKind: the file with an empty btrfs in it. What an earlier try left is thrown away.

    `size` in bytes, else the host's free space less a reserve of a tenth (2 GiB at least). The file is sparse: it
    takes what is written. JailmgrError `full`, `invalid`, `unavailable`.
    """
    mkfs = shutil.which("mkfs.btrfs") or shutil.which("mkfs.btrfs", path="/usr/sbin:/sbin")
    if mkfs is None:
        raise JailmgrError(
            f"pool {root.pool_file}", "mkfs.btrfs is not there", "Install it: apt install btrfs-progs.", "unavailable"
        )
    new = f"{root.pool_file}.new"
    try:
        os.unlink(new)
    except FileNotFoundError:
        pass
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _no_copy_on_write(fd)
        _set_length(fd, _size(root, size))
        # With the lock as its own, an mkfs that outlives us keeps the next one out until it has ended.
        argv = [mkfs, "--quiet", "--nodiscard", "--label", LABEL, new]
        done = subprocess.run(
            argv, pass_fds=(lock,), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            why = done.stderr.strip().rpartition("\n")[2] or f"mkfs.btrfs ended with {done.returncode}"
            raise JailmgrError(f"pool {root.pool_file}", why, "", "failed")
        os.fsync(fd)
        os.rename(new, root.pool_file)
        os.fsync(lock)
    except BaseException:
        if os.path.exists(new):
            os.unlink(new)
        raise
    finally:
        os.close(fd)


def _set_length(fd: int, size: int) -> None:
    """A hole of `size` bytes, or of what the host's file system allows in a file."""
    while True:
        try:
            return os.truncate(fd, size)
        except OSError as error:
            if error.errno != errno.EFBIG or size < 2 * MIN_SIZE:
                raise
            size = size // 2 // loop.BLOCK * loop.BLOCK


def _size(root: Root, size: int | None) -> int:
    host = os.statvfs(os.path.dirname(root.pool_file))
    free = host.f_bavail * host.f_frsize
    room = free - max(MIN_RESERVE, free // 10)
    wanted = size or max(room, MIN_SIZE)
    if wanted < MIN_SIZE:
        why = f"{format_size(wanted)} is too small, it needs {format_size(MIN_SIZE)}"
        raise JailmgrError(f"pool {root.pool_file}", why, "", "invalid")
    if wanted > room:
        raise JailmgrError(
            f"pool {root.pool_file}",
            f"it would take {format_size(wanted)}; of the {format_size(free)} free on the host's disk "
            f"{format_size(free - room)} are kept in reserve",
            'Free some space, or give the pool a smaller size in config.toml: [pool] size = "20GiB" (512MiB at least).',
            "full",
        )
    return wanted // loop.BLOCK * loop.BLOCK


def _no_copy_on_write(fd: int) -> None:
    """On a host's btrfs, direct I/O into a file that is copied on write breaks its checksums (chattr(1), +C)."""
    try:
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("@l", _FS_NOCOW_FL))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def mount(root: Root) -> None:
    """As PoolKind."""
    if not os.path.ismount(root.pool):
        _mount(root)
    uuid = _require_ours(root)
    with btrfs.directory(root.pool) as top:
        if btrfs.quota_mode(uuid) is None:
            btrfs.enable_quota(top)
        btrfs.rescan_if_inconsistent(top, uuid)
    for name in _DIRECTORIES:
        os.makedirs(f"{root.pool}/{name}", mode=0o700, exist_ok=True)


def unmount(root: Root) -> None:
    """As PoolKind; the kernel frees the loop device."""
    if os.path.ismount(root.pool):
        _require_ours(root)
        _umount(root.pool)


def headroom(root: Root) -> int:
    """As PoolKind."""
    file, host = os.stat(root.pool_file), os.statvfs(root.pool_file)
    return host.f_bavail * host.f_frsize - max(0, file.st_size - file.st_blocks * 512)


def writable(root: Root, reserve: int) -> int | None:
    """As PoolKind. Data still dirty in memory will want space too, so it counts as used."""
    if headroom(root) > reserve:
        return None
    host = os.statvfs(root.pool_file)
    return host.f_bavail * host.f_frsize - _dirty() - reserve


def _dirty() -> int:
    """Bytes in memory that are not on any disk yet (proc_meminfo(5))."""
    with open("/proc/meminfo", encoding="ascii") as file:
        told = dict(line.split(":") for line in file)
    return sum(int(told[key].split()[0]) for key in ("Dirty", "Writeback")) * 1024


def _mount(root: Root) -> None:
    """Mount the file, by the loop device it already has: a jail may hold on to one that the host has unmounted."""
    found = loop.find(root.pool_file)
    if found is None:
        file = os.open(root.pool_file, os.O_RDWR | os.O_CLOEXEC)
        try:
            found = loop.attach(file, root.pool_file)
        finally:
            os.close(file)
    fd, device = found
    try:
        flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOATIME)
        if _libc.mount(device.encode(), os.fsencode(root.pool), b"btrfs", flags, b"discard=async") < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), f"mount {device}")
    finally:
        os.close(fd)


def _umount(path: str) -> None:
    if _libc.umount2(os.fsencode(path), 0) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)


def _require_ours(root: Root) -> str:
    """The UUID of what is mounted at the pool's place; JailmgrError where that isn't the pool's file."""
    try:
        file = os.stat(root.pool_file)
    except FileNotFoundError:
        hint = f"Copy what is needed out of {root.pool}, then unmount it."
        raise JailmgrError(f"pool {root.pool_file}", "the file was deleted under its mount", hint, "conflict") from None
    try:
        with btrfs.directory(root.pool) as top:
            uuid = btrfs.file_system_uuid(top)
        for device in os.listdir(f"/sys/fs/btrfs/{uuid}/devices"):
            if (fd := loop.open_view_of(device, file)) is not None:
                os.close(fd)
                return uuid
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.ENOENT):
            raise
    hint = "Unmount it, or move the pool's file away from beside it."
    raise JailmgrError(f"pool {root.pool}", f"what is mounted there is not {root.pool_file}", hint, "conflict")
