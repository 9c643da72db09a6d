"""Give new inode numbers to a volume that earlier releases made, so that none is also a number of its image.

Such a volume counts from 257 as its image does (btrfs_seeds.py). An inode keeps its number for as long as it lives, so
each with a number below the floor is replaced by a copy: same owner, mode, times, extended attributes and names, and
for a file the same extents (FICLONE, ioctl_ficlonerange(2)), which stay charged to the jail. The time of the last
change of status (ctime) and the time of birth can't be kept.

All this is done to a snapshot of the volume, which takes the volume's place in one step (RENAME_EXCHANGE). The volume
is read-only meanwhile, and so the snapshot lies beside it: the kernel moves nothing read-only to another directory. A
crash leaves the volume as it was, or renewed, and a mark in `seeds` by which the rest is found.

The inodes and their names come from the tree of the snapshot, and directories are opened by their numbers, so neither
depth nor names of what a guest has made matter; what has numbers above the floor isn't looked at. The mark of a volume
that needs no more of this is the number of its `upper`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from jailmgr.errors import JailmgrError
from jailmgr.runtime.syscalls import RENAME_EXCHANGE, renameat2
from jailmgr.storage import btrfs, btrfs_inodes, btrfs_seeds
from jailmgr.storage.btrfs_inodes import Inode
from jailmgr.storage.kind import Pool

_FICLONE = 0x40049409
_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602
"""FS_IOC_GETFLAGS, FS_IOC_SETFLAGS (ioctl_iflags(2)); the kernel reads and writes an int."""
_FLAGS = struct.Struct("i4x")
_KEPT_FLAGS = 0x4 | 0x8 | 0x40 | 0x80 | 0x400 | 0x10000 | 0x800000
"""chattr(1)'s c, S, d, A, m, D and C. Nobody in a user namespace can set others that btrfs has."""
_NOT_COPIED = ("security.ima", "security.evm", "trusted.overlay.upper", "user.overlay.upper")
"""What the host makes of the inode itself, and overlayfs' handle of `upper`, which becomes another."""
_MARK = "renumber-"
"""Beginning of a mark's name, in `seeds`; the jail's quota group follows."""
_SCRATCH, _NEW = ".renumber", "new"
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Times = tuple[int, int]
"""Of the last access and the last modification, in nanoseconds."""


def overlaps(path: str, layers: Sequence[str]) -> bool:
    """Report whether an inode of the volume may have the number of one in `layers`. Takes 50 µs. Raises OSError."""
    with btrfs.directory(f"{path}/upper") as upper:
        first = os.fstat(upper).st_ino
    for layer in layers:
        with btrfs.directory(layer) as fd:
            if btrfs_inodes.has_from(fd, btrfs.subvolume_id(fd), first):
                return True
    return False


def renumber(pool: Pool, path: str, group: int, layers: Sequence[str], in_use: Callable[[], bool]) -> None:
    """Give the volume at `path`, whose jail has quota group `group`, numbers that no inode in `layers` has.

    It can't be written to meanwhile. `in_use` is asked once, after that began. The jail's limit stops nothing here,
    for the copies are counted when they are whole. Raises OSError, JailmgrError `conflict` for a volume that is in use,
    `invalid` for one with subvolumes in it; then it is as it was.
    """
    floor = btrfs_seeds.floor_above(layers)
    mark, stage = f"{pool.path}/{btrfs_seeds.SEEDS}/{_MARK}{group}", _stage(path)
    with btrfs.directory(pool.path) as top, btrfs.directory(path) as old:
        if nested := btrfs.nested_subvolumes(old, btrfs.subvolume_id(old)):
            why = f"{len(nested)} subvolumes lie in it, which no snapshot has"
            raise JailmgrError(f"volume {path}", why, "Move what is in them to plain directories.", "invalid")
        with open(mark, "wb") as file:
            file.write(os.fsencode(os.path.relpath(path, pool.path)))
        try:
            _set_read_only(top, old, group, True)
            if in_use():
                raise JailmgrError(f"volume {path}", "it is in use", "Try again when its jail has stopped.", "conflict")
            _copy(pool, top, old, stage, group, floor)
            renameat2(stage, path, RENAME_EXCHANGE)
        finally:
            give_up(pool, mark)


def _set_read_only(top: int, volume: int, group: int, read_only: bool) -> None:
    """As btrfs.set_read_only, also of a volume that is at its limit: for the blink of the call it is in no group."""
    try:
        return btrfs.set_read_only(volume, read_only)
    except OSError as error:
        if error.errno != errno.EDQUOT:
            raise
    member = btrfs.group(0, btrfs.subvolume_id(volume))
    btrfs.release_group(top, member, group)
    try:
        btrfs.set_read_only(volume, read_only)
    finally:
        btrfs.assign_group(top, member, group)


def _copy(pool: Pool, top: int, old: int, stage: str, group: int, floor: int) -> None:
    with btrfs.directory(os.path.dirname(stage)) as parent:
        btrfs.snapshot(old, parent, os.path.basename(stage))
    with btrfs.directory(stage) as new:
        btrfs_seeds.raise_counter(new, floor)
        _Copies(new).replace_all_below(floor)
        btrfs.assign_group(top, btrfs.group(0, btrfs.subvolume_id(new)), group)


def marks(pool: Pool) -> list[str]:
    """Return the paths of the marks of volumes that a crash kept from being renewed. Raises OSError."""
    at = f"{pool.path}/{btrfs_seeds.SEEDS}"
    return [f"{at}/{name}" for name in os.listdir(at) if name.startswith(_MARK)]


def give_up(pool: Pool, mark: str) -> None:
    """Delete the copy that the mark stands for, or the volume that it replaced; what stays is writable. Idempotent."""
    group = int(os.path.basename(mark).removeprefix(_MARK))
    with open(mark, "rb") as file:
        name = os.fsdecode(file.read())
    path = f"{pool.path}/{name}"
    with btrfs.directory(pool.path) as top:
        if name and os.path.isdir(path):
            with btrfs.directory(path) as volume:
                btrfs.assign_group(top, btrfs.group(0, btrfs.subvolume_id(volume)), group)
                _set_read_only(top, volume, group, False)
        if name and (stage := btrfs.subvolume_at(_stage(path))) is not None:
            btrfs.destroy_subvolume(top, stage)
        btrfs.rescan_if_inconsistent(top, pool.uuid)
    os.unlink(mark)


def _stage(path: str) -> str:
    """Where the copy of a volume is made; `list_volumes` passes over it."""
    folder, name = os.path.split(path)
    return f"{folder}/.{name}"


class _Copies:
    """A snapshot of a volume in which inodes are replaced by copies."""

    def __init__(self, volume: int) -> None:
        self._volume = volume
        self._subvolume = btrfs.subvolume_id(volume)
        self._moved: dict[int, int] = {}
        """Numbers of directories that were replaced, and of what replaced them."""
        self._times: dict[int, Times] = {}
        """By its number, what a directory is to have at the end: changes to what is in it have set it."""
        self._scratch = -1

    def replace_all_below(self, floor: int) -> None:
        """Replace each inode with a lower number but the root directory. Raises OSError, JailmgrError `failed`."""
        inodes = list(btrfs_inodes.inodes_below(self._volume, self._subvolume, floor))
        os.mkdir(_SCRATCH, 0o700, dir_fd=self._volume)
        with _opened(_SCRATCH, self._volume) as self._scratch:
            for inode in inodes:
                if stat.S_ISDIR(inode.mode):
                    self._replace_directory(inode)
            for inode in inodes:
                if not stat.S_ISDIR(inode.mode):
                    self._replace_file(inode)
            for number, times in self._times.items():
                with self._directory(number) as fd:
                    os.utime(fd, ns=times)
        os.rmdir(_SCRATCH, dir_fd=self._volume)
        left = next(btrfs_inodes.inodes_below(self._volume, self._subvolume, floor), None)
        if left is not None:
            raise JailmgrError("volume", f"inode {left.number} has kept its number", "", "failed")

    def _replace_directory(self, inode: Inode) -> None:
        (above, name), *_ = inode.names
        with self._parent(above) as at, _opened(name, at) as old:
            status = os.fstat(old)
            os.mkdir(_NEW, 0o700, dir_fd=self._scratch)
            with _opened(_NEW, self._scratch) as new:
                _copy_flags(old, new)
                for entry in os.listdir(old):
                    os.rename(entry, entry, src_dir_fd=old, dst_dir_fd=new)
                self._moved[inode.number] = number = os.fstat(new).st_ino
            self._copy_attributes(at, name, status)
            self._times[number] = self._times.pop(inode.number, _times(status))
            os.rmdir(name, dir_fd=at)
            os.rename(_NEW, name, src_dir_fd=self._scratch, dst_dir_fd=at)

    def _replace_file(self, inode: Inode) -> None:
        (above, name), *others = inode.names
        with self._parent(above) as at:
            status = os.stat(name, dir_fd=at, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                self._clone(at, name)
            elif stat.S_ISLNK(status.st_mode):
                os.symlink(os.readlink(name, dir_fd=at), _NEW, dir_fd=self._scratch)
            else:
                os.mknod(_NEW, status.st_mode, status.st_rdev, dir_fd=self._scratch)
            self._copy_attributes(at, name, status)
            for other_above, other in others:
                with self._parent(other_above) as place:
                    os.unlink(other, dir_fd=place)
                    os.link(_NEW, other, src_dir_fd=self._scratch, dst_dir_fd=place, follow_symlinks=False)
            os.rename(_NEW, name, src_dir_fd=self._scratch, dst_dir_fd=at)

    def _clone(self, at: int, name: str) -> None:
        old = os.open(name, _OPEN, dir_fd=at)
        try:
            new = os.open(_NEW, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._scratch)
            try:
                _copy_flags(old, new)
                fcntl.ioctl(new, _FICLONE, old)
            finally:
                os.close(new)
        finally:
            os.close(old)

    def _copy_attributes(self, at: int, name: str, status: os.stat_result) -> None:
        """Owner, mode, extended attributes and times, in this order: each may change those before it."""
        os.chown(_NEW, status.st_uid, status.st_gid, dir_fd=self._scratch, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(_NEW, stat.S_IMODE(status.st_mode), dir_fd=self._scratch)
        old, new = f"/proc/self/fd/{at}/{name}", f"/proc/self/fd/{self._scratch}/{_NEW}"
        for key in os.listxattr(old, follow_symlinks=False):
            if key not in _NOT_COPIED:
                os.setxattr(new, key, os.getxattr(old, key, follow_symlinks=False), follow_symlinks=False)
        os.utime(_NEW, ns=_times(status), dir_fd=self._scratch, follow_symlinks=False)

    @contextmanager
    def _parent(self, number: int) -> Iterator[int]:
        """An fd of the directory that had the number, or has it, with its times noted before anything in it changes."""
        number = self._moved.get(number, number)
        with self._directory(number) as fd:
            if number not in self._times and number != btrfs.ROOT_INODE:
                self._times[number] = _times(os.fstat(fd))
            yield fd

    @contextmanager
    def _directory(self, number: int) -> Iterator[int]:
        fd = btrfs.open_directory(self._volume, self._subvolume, number)
        try:
            yield fd
        finally:
            os.close(fd)


@contextmanager
def _opened(name: str, at: int) -> Iterator[int]:
    fd = os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=at)
    try:
        yield fd
    finally:
        os.close(fd)


def _copy_flags(old: int, new: int) -> None:
    """Those of chattr(1): on an empty file, since one without copy-on-write (C) takes extents of its like only."""
    flags = _FLAGS.unpack(fcntl.ioctl(old, _GETFLAGS, bytes(_FLAGS.size)))[0] & _KEPT_FLAGS
    if flags:
        fcntl.ioctl(new, _SETFLAGS, _FLAGS.pack(flags))


def _times(status: os.stat_result) -> Times:
    return status.st_atime_ns, status.st_mtime_ns
