"""Project quotas of ext4 and xfs: ids on inodes by ioctl(2), limits and use by quotactl_fd(2), the same for both.

A project is a number on each inode (FS_IOC_FSSETXATTR), which what is made in a directory takes over where that says
so (FS_XFLAG_PROJINHERIT). From a user namespace neither can be changed (fs/ioctl.c), so what is made by a jail's root
stays in its jail's project. Whoever has CAP_SYS_RESOURCE in the host's own is held by no limit.

Each takes an fd of any directory of the file system, unless it says more, and raises OSError with the call as
`filename`. Needs CAP_SYS_ADMIN and Linux 5.14. Sources: quotactl(2),
ioctl_xfs_fsgetxattr(2), linux/dqblk_xfs.h, linux/fs.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jailmgr.runtime.syscalls import libc, quotactl_fd

FILE_SYSTEMS = {0xEF53: "ext4", 0x58465342: "xfs"}
"""By f_type of statfs(2)."""
PROJECTS, PROJID = "/etc/projects", "/etc/projid"

_SECTOR = 512
_FSGETXATTR, _FSSETXATTR = 0x801C581F, 0x401C5820
_FSXATTR = struct.Struct("=IIIII8x")
"""struct fsxattr: flags, two of extents, project, a hint, padding."""
_PROJINHERIT = 0x200

_PRJQUOTA = 2
_GETQUOTA, _SETQLIM, _GETQSTATV, _GETNEXTQUOTA = (ord("X") << 8 | command for command in (3, 4, 8, 9))
_DISK_QUOTA = struct.Struct("=bbHI6QiiHH4b3QiHh8x")
"""struct fs_disk_quota: version, flags, what is set, project, four limits, blocks and inodes in use, timers, warnings,
realtime's. Blocks are of 512 bytes."""
_VERSION, _OF_PROJECT = 1, 2
_INODES_HARD, _BLOCKS_HARD = 1 << 1, 1 << 3
_STATV_VERSION = 1
_STATV_SIZE = 160
_ACCOUNTED, _ENFORCED = 1 << 4, 1 << 5


class Use(NamedTuple):
    """What a project takes, data still in memory included; `size` in bytes. Nothing is in one without inodes."""

    project: int
    size: int
    inodes: int


def file_system(fd: int) -> str:
    """`ext4`, `xfs`, or empty for any other (f_type, the first word of struct statfs)."""
    found = ctypes.create_string_buffer(256)
    if libc.fstatfs(fd, found) < 0:
        raise _error("fstatfs")
    return FILE_SYSTEMS.get(ctypes.c_ulong.from_buffer(found).value & 0xFFFFFFFF, "")


def is_enforced(fd: int) -> bool:
    """Whether the file system counts projects and holds them to their limits; False where it can't be told."""
    state = ctypes.create_string_buffer(bytes([_STATV_VERSION]), _STATV_SIZE)
    try:
        _quotactl(fd, _GETQSTATV, 0, state)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EINVAL, errno.ESRCH, errno.EOPNOTSUPP, errno.ENOTBLK):
            return False
        raise
    flags = int.from_bytes(state.raw[2:4], sys.byteorder)
    return flags & (_ACCOUNTED | _ENFORCED) == _ACCOUNTED | _ENFORCED


def project_of(fd: int) -> int:
    """The project of the file or directory that `fd` is; 0 for none."""
    return int(_attributes(fd)[3])


def set_project(fd: int, project: int, inherit: bool) -> None:
    """Give the directory `fd` to a project; with `inherit`, all that is made in it from now on as well."""
    flags, *rest = _attributes(fd)
    rest[2] = project
    flags = flags | _PROJINHERIT if inherit else flags & ~_PROJINHERIT
    try:
        fcntl.ioctl(fd, _FSSETXATTR, _FSXATTR.pack(flags, *rest))
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"FSSETXATTR project {project}") from None


def use(fd: int, project: int) -> Use:
    """What is in a project."""
    return _record(fd, _GETQUOTA, project) or Use(project, 0, 0)


def uses(fd: int, first: int, last: int) -> Iterator[Use]:
    """What is in each project of `first` to `last`, the last one excluded, that has anything in it."""
    while first < last:
        found = _record(fd, _GETNEXTQUOTA, first)
        if found is None or found.project >= last:
            return
        if found.inodes:
            yield found
        first = found.project + 1


def limit(fd: int, project: int, size: int | None, inodes: int | None) -> None:
    """Hold a project to `size` bytes (in blocks of 512) and `inodes` files; None: no limit."""
    blocks = 0 if size is None else max(1, size // _SECTOR)
    _quotactl(fd, _SETQLIM, project, ctypes.create_string_buffer(limit_request(project, blocks, inodes or 0)))


def limit_request(project: int, blocks: int, inodes: int) -> bytes:
    """struct fs_disk_quota that sets both hard limits; 0: none."""
    fields = _BLOCKS_HARD | _INODES_HARD
    return _DISK_QUOTA.pack(_VERSION, _OF_PROJECT, fields, project, blocks, 0, inodes, *[0] * 17)


def claim(fd: int, candidates: Iterable[int], inherit: bool) -> int | None:
    """Give the directory `fd`, still empty, to the first candidate that holds nothing else; None: each does.

    Given first and counted then: of two who choose the same one at the same time at most one keeps it.
    """
    for project in candidates:
        if use(fd, project).inodes:
            continue
        set_project(fd, project, inherit)
        if use(fd, project).inodes == 1:
            return project
        set_project(fd, 0, False)
    return None


def listed(*paths: str) -> set[int]:
    """Projects that an admin has named (projects(5): `ID:PATH`, projid(5): `NAME:ID`)."""
    found: set[int] = set()
    for path in paths or (PROJECTS, PROJID):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = file.read().splitlines()
        except OSError:
            continue
        words = [word.strip() for line in lines if not line.startswith("#") for word in line.split(":")]
        found.update(int(word) for word in words if word.isascii() and word.isdigit())
    return found


def sync(fd: int) -> None:
    """syncfs(2)."""
    if libc.syncfs(fd) < 0:
        raise _error("syncfs")


def _attributes(fd: int) -> tuple[int, ...]:
    try:
        return _FSXATTR.unpack(fcntl.ioctl(fd, _FSGETXATTR, bytes(_FSXATTR.size)))
    except OSError as error:
        raise OSError(error.errno, error.strerror, "FSGETXATTR") from None


def _record(fd: int, command: int, project: int) -> Use | None:
    """None where there is no record: xfs says so, ext4 gives an empty one."""
    answer = ctypes.create_string_buffer(_DISK_QUOTA.size)
    try:
        _quotactl(fd, command, project, answer)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return parse_record(answer.raw)


def parse_record(answer: bytes) -> Use:
    """Of struct fs_disk_quota."""
    _, _, _, project, _, _, _, _, blocks, inodes, *_ = _DISK_QUOTA.unpack(answer)
    return Use(project, blocks * _SECTOR, inodes)


def _quotactl(fd: int, command: int, project: int, argument: ctypes.Array[ctypes.c_char]) -> None:
    quotactl_fd(fd, command << 8 | _PRJQUOTA, project, ctypes.addressof(argument))


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), call)
