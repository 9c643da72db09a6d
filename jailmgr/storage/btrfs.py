"""The btrfs ioctls behind pools and volumes: subvolumes, snapshots, quota groups (btrfs-ioctl(2), linux/btrfs.h).

Each takes an fd of any directory of the file system, unless it says more, and raises OSError with the ioctl and its
object as `filename`. Needs CAP_SYS_ADMIN and Linux 5.7 (deletion by id).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from jailmgr.runtime.plainfile import read_bytes

U64_MAX = (1 << 64) - 1
ROOT_INODE = 256
"""Inode number of every subvolume's root directory (BTRFS_FIRST_FREE_OBJECTID)."""

_U64, _U32 = ctypes.c_uint64, ctypes.c_uint32
_MAGIC = 0x94
_NONE, _WRITE, _READ = 0, 1, 2

_SUBVOL_RDONLY = 1 << 1
_SUBVOL_QGROUP_INHERIT = 1 << 2
_SUBVOL_SPEC_BY_ID = 1 << 4
_QUOTA_CTL_ENABLE = 1
_QUOTA_CTL_DISABLE = 2
_QUOTA_CTL_ENABLE_SIMPLE_QUOTA = 4
_QGROUP_LIMIT_MAX_RFER = 1 << 0

_ROOT_TREE, _QUOTA_TREE = 1, 8
_INODE_ITEM_KEY, _ROOT_REF_KEY, _QGROUP_INFO_KEY, _QGROUP_RELATION_KEY = 1, 156, 242, 246
_REFERENCED = struct.Struct("<8xQ")
"""Of struct btrfs_qgroup_info_item: what the group refers to, behind a generation."""
_GENERATION = struct.Struct("<I")
"""Of struct btrfs_inode_item: the low half of its first field, which is what a handle has room for."""
_FILEID_BTRFS_WITHOUT_PARENT = 0x4D


class _VolArgsV2(ctypes.Structure):
    """struct btrfs_ioctl_vol_args_v2; `name` and `subvolid` share their place."""

    class _Name(ctypes.Union):
        _fields_ = (("name", ctypes.c_char * 4040), ("subvolid", _U64))

    _anonymous_ = ("spec",)
    _fields_ = (
        ("fd", ctypes.c_int64),
        ("transid", _U64),
        ("flags", _U64),
        ("size", _U64),
        ("qgroup_inherit", ctypes.c_void_p),
        ("unused", _U64 * 2),
        ("spec", _Name),
    )


class _QgroupLimit(ctypes.Structure):
    """struct btrfs_qgroup_limit."""

    _fields_ = (("flags", _U64), ("max_rfer", _U64), ("max_excl", _U64), ("rsv_rfer", _U64), ("rsv_excl", _U64))


class _QgroupLimitArgs(ctypes.Structure):
    """struct btrfs_ioctl_qgroup_limit_args."""

    _fields_ = (("qgroupid", _U64), ("lim", _QgroupLimit))


class _QgroupCreateArgs(ctypes.Structure):
    """struct btrfs_ioctl_qgroup_create_args."""

    _fields_ = (("create", _U64), ("qgroupid", _U64))


class _QgroupAssignArgs(ctypes.Structure):
    """struct btrfs_ioctl_qgroup_assign_args."""

    _fields_ = (("assign", _U64), ("src", _U64), ("dst", _U64))


class _QuotaCtlArgs(ctypes.Structure):
    """struct btrfs_ioctl_quota_ctl_args."""

    _fields_ = (("cmd", _U64), ("status", _U64))


class _QuotaRescanArgs(ctypes.Structure):
    """struct btrfs_ioctl_quota_rescan_args."""

    _fields_ = (("flags", _U64), ("progress", _U64), ("reserved", _U64 * 6))


class _FsInfoArgs(ctypes.Structure):
    """struct btrfs_ioctl_fs_info_args."""

    _fields_ = (("max_id", _U64), ("num_devices", _U64), ("fsid", ctypes.c_ubyte * 16), ("rest", ctypes.c_ubyte * 992))


class _InoLookupArgs(ctypes.Structure):
    """struct btrfs_ioctl_ino_lookup_args."""

    _fields_ = (("treeid", _U64), ("objectid", _U64), ("name", ctypes.c_char * 4080))


class _SearchArgs(ctypes.Structure):
    """struct btrfs_ioctl_search_args with its key."""

    _fields_ = (
        ("tree_id", _U64),
        ("min_objectid", _U64),
        ("max_objectid", _U64),
        ("min_offset", _U64),
        ("max_offset", _U64),
        ("min_transid", _U64),
        ("max_transid", _U64),
        ("min_type", _U32),
        ("max_type", _U32),
        ("nr_items", _U32),
        ("unused", _U32),
        ("unused64", _U64 * 4),
        ("buf", ctypes.c_ubyte * 3992),
    )


_SEARCH_HEADER = struct.Struct("=QQQII")
"""struct btrfs_ioctl_search_header: transid, objectid, offset, type, and the length of the item that follows."""


class _FileHandle(ctypes.Structure):
    """struct file_handle (open_by_handle_at(2)) with btrfs's content, struct btrfs_fid up to its generation."""

    _pack_ = 4
    _fields_ = (
        ("handle_bytes", _U32),
        ("handle_type", ctypes.c_int32),
        ("objectid", _U64),
        ("root_objectid", _U64),
        ("gen", _U32),
    )


def _request(direction: int, number: int, size: int) -> int:
    """_IOC of asm-generic/ioctl.h, which x86 and arm64 share."""
    return direction << 30 | size << 16 | _MAGIC << 8 | number


SUBVOL_CREATE_V2 = _request(_WRITE, 24, ctypes.sizeof(_VolArgsV2))
SNAP_CREATE_V2 = _request(_WRITE, 23, ctypes.sizeof(_VolArgsV2))
SNAP_DESTROY_V2 = _request(_WRITE, 63, ctypes.sizeof(_VolArgsV2))
SUBVOL_GETFLAGS = _request(_READ, 25, 8)
SUBVOL_SETFLAGS = _request(_WRITE, 26, 8)
INO_LOOKUP = _request(_READ | _WRITE, 18, ctypes.sizeof(_InoLookupArgs))
TREE_SEARCH = _request(_READ | _WRITE, 17, ctypes.sizeof(_SearchArgs))
FS_INFO = _request(_READ, 31, ctypes.sizeof(_FsInfoArgs))
SYNC = _request(_NONE, 8, 0)
QUOTA_CTL = _request(_READ | _WRITE, 40, ctypes.sizeof(_QuotaCtlArgs))
QGROUP_ASSIGN = _request(_WRITE, 41, ctypes.sizeof(_QgroupAssignArgs))
QGROUP_CREATE = _request(_WRITE, 42, ctypes.sizeof(_QgroupCreateArgs))
QGROUP_LIMIT = _request(_READ, 43, ctypes.sizeof(_QgroupLimitArgs))
QUOTA_RESCAN = _request(_WRITE, 44, ctypes.sizeof(_QuotaRescanArgs))

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def directory(path: str) -> Iterator[int]:
    """An fd of a directory; its last component is no link."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _ioctl(fd: int, request: int, args: Any, thing: str, fine: int = 0) -> None:
    """ioctl(2); the error number `fine` is success, too."""
    try:
        fcntl.ioctl(fd, request, args)
    except OSError as error:
        if error.errno != fine:
            raise OSError(error.errno, error.strerror, thing) from None


def file_system_uuid(fd: int) -> str:
    """The file system's UUID, as /sys/fs/btrfs names it. OSError ENOTTY where it is no btrfs."""
    args = _FsInfoArgs()
    _ioctl(fd, FS_INFO, args, "FS_INFO")
    return str(UUID(bytes=bytes(args.fsid)))


def sync(fd: int) -> None:
    """Write all that is dirty and commit the transaction; accounting is exact after it."""
    _ioctl(fd, SYNC, 0, "SYNC")


def create_subvolume(parent_fd: int, name: str, groups: Sequence[int] = ()) -> None:
    """An empty subvolume, counted in quota groups `groups` from its first block on."""
    _create(parent_fd, SUBVOL_CREATE_V2, "SUBVOL_CREATE_V2", _VolArgsV2(name=os.fsencode(name)), groups)


def snapshot(source_fd: int, parent_fd: int, name: str, groups: Sequence[int] = ()) -> None:
    """A writable snapshot of the subvolume whose root `source_fd` is. Subvolumes nested in it are left out."""
    args = _VolArgsV2(fd=source_fd, name=os.fsencode(name))
    _create(parent_fd, SNAP_CREATE_V2, "SNAP_CREATE_V2", args, groups)


def _create(parent_fd: int, request: int, call: str, args: _VolArgsV2, groups: Sequence[int]) -> None:
    if groups:
        inherit = _inherit(groups)
        args.flags |= _SUBVOL_QGROUP_INHERIT
        args.size = ctypes.sizeof(inherit)
        args.qgroup_inherit = ctypes.addressof(inherit)
    _ioctl(parent_fd, request, args, f"{call} {os.fsdecode(args.name)}")


def _inherit(groups: Sequence[int]) -> ctypes.Array[ctypes.c_uint64]:
    """struct btrfs_qgroup_inherit: flags, num_qgroups, two counts, an unused limit of five, the groups."""
    return (_U64 * (9 + len(groups)))(0, len(groups), 0, 0, 0, 0, 0, 0, 0, *groups)


def set_read_only(fd: int, read_only: bool) -> None:
    """Make the subvolume whose root `fd` is read-only, or writable again."""
    flags = _U64()
    _ioctl(fd, SUBVOL_GETFLAGS, flags, "SUBVOL_GETFLAGS")
    wanted = flags.value | _SUBVOL_RDONLY if read_only else flags.value & ~_SUBVOL_RDONLY
    if wanted != flags.value:
        _ioctl(fd, SUBVOL_SETFLAGS, _U64(wanted), "SUBVOL_SETFLAGS")


def subvolume_id(fd: int) -> int:
    """The id of the subvolume that `fd` lies in."""
    args = _InoLookupArgs(treeid=0, objectid=ROOT_INODE)
    _ioctl(fd, INO_LOOKUP, args, "INO_LOOKUP")
    return int(args.treeid)


def subvolume_at(path: str) -> int | None:
    """Return the id of the subvolume whose root directory lies at `path`; None without one.

    Raises OSError EINVAL for any other directory: the subvolume that it lies in is not the one that is meant.
    """
    try:
        with directory(path) as fd:
            if os.fstat(fd).st_ino != ROOT_INODE:
                raise OSError(errno.EINVAL, "not a subvolume", path)
            return subvolume_id(fd)
    except FileNotFoundError:
        return None


def open_subvolume(fd: int, subvolume: int) -> int:
    """An fd of a subvolume's root directory by its id: no path is walked, whoever made what lies on it.

    Raises OSError: FileNotFoundError where there is none.
    """
    return open_directory(fd, subvolume, ROOT_INODE)


def open_directory(fd: int, subvolume: int, inode: int) -> int:
    """Return an fd of a directory of a subvolume by its inode number, as `open_subvolume` does."""
    content = ctypes.sizeof(_FileHandle) - 8
    generation = _generation(fd, subvolume, inode)
    handle = _FileHandle(content, _FILEID_BTRFS_WITHOUT_PARENT, inode, subvolume, generation)
    opened = _libc.open_by_handle_at(fd, ctypes.byref(handle), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if opened < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), f"inode {inode} of subvolume {subvolume}")
    return int(opened)


def _generation(fd: int, subvolume: int, inode: int) -> int:
    """Return an inode's generation, which is part of its handle: Linux 6.1 opens no directory without it."""
    found = _items(fd, subvolume, inode, _INODE_ITEM_KEY)
    if not found:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"inode {inode} of subvolume {subvolume}")
    return int(_GENERATION.unpack_from(found[0][1])[0])


def nested_subvolumes(fd: int, subvolume: int) -> list[int]:
    """Ids of the subvolumes that lie directly in one (ROOT_REF items: parent to child)."""
    return _search(fd, _ROOT_TREE, subvolume, _ROOT_REF_KEY)


def subvolumes_from(fd: int, subvolume: int) -> list[int]:
    """Ids of a subvolume and of all that are nested in it, however deep: none before the one it lies in."""
    found = [subvolume]
    for parent in found:
        found += nested_subvolumes(fd, parent)
    return found


def destroy_subvolume(fd: int, subvolume: int) -> None:
    """Delete a subvolume and all that are nested in it, deepest first; one that is gone is fine.

    It is out of sight at once; its space comes back as the kernel's cleaner gets to it. OSError EINVAL for the file
    system's own, in which all others are nested.
    """
    if subvolume < ROOT_INODE:
        raise OSError(errno.EINVAL, "not a subvolume that can be deleted", str(subvolume))
    found = subvolumes_from(fd, subvolume)
    for each in found if len(found) > 1 else ():
        # Nothing can be deleted from one that is read-only.
        try:
            inside = open_subvolume(fd, each)
        except FileNotFoundError:
            continue
        try:
            set_read_only(inside, False)
        finally:
            os.close(inside)
    for each in reversed(found):
        args = _VolArgsV2(flags=_SUBVOL_SPEC_BY_ID)
        args.subvolid = each
        _ioctl(fd, SNAP_DESTROY_V2, args, f"SNAP_DESTROY_V2 {each}", fine=errno.ENOENT)


def enable_quota(fd: int, simple: bool = True) -> None:
    """Switch quotas on: simple ones (Linux 6.7), or where `simple` is false or the kernel has none, classic qgroups."""
    if simple:
        try:
            _ioctl(fd, QUOTA_CTL, _QuotaCtlArgs(_QUOTA_CTL_ENABLE_SIMPLE_QUOTA), "QUOTA_CTL ENABLE_SIMPLE_QUOTA")
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    _ioctl(fd, QUOTA_CTL, _QuotaCtlArgs(_QUOTA_CTL_ENABLE), "QUOTA_CTL ENABLE")


def disable_quota(fd: int) -> None:
    """Switch quotas off; every group and limit is forgotten."""
    _ioctl(fd, QUOTA_CTL, _QuotaCtlArgs(_QUOTA_CTL_DISABLE), "QUOTA_CTL DISABLE")


def quota_mode(uuid: str) -> str | None:
    """`squota`, `qgroup`, or None where quotas are off (/sys/fs/btrfs/UUID/qgroups; `mode` came with Linux 6.7)."""
    at = f"/sys/fs/btrfs/{uuid}/qgroups"
    mode = _read(f"{at}/mode")
    if mode is not None:
        return mode if mode in ("squota", "qgroup") else None
    return "qgroup" if os.path.isdir(at) else None


def rescan_if_inconsistent(fd: int, uuid: str) -> None:
    """Classic groups may lose count (the kernel says so): have it counted anew, in the kernel's own time."""
    if _read(f"/sys/fs/btrfs/{uuid}/qgroups/inconsistent") == "1":
        _ioctl(fd, QUOTA_RESCAN, _QuotaRescanArgs(), "QUOTA_RESCAN", fine=errno.EINPROGRESS)


def group(level: int, number: int) -> int:
    """A quota group's id: `level/number`, 16 and 48 bits."""
    return level << 48 | number


def create_group(fd: int, group_id: int) -> None:
    """A quota group; fine where there is one."""
    args = _QgroupCreateArgs(1, group_id)
    _ioctl(fd, QGROUP_CREATE, args, f"QGROUP_CREATE {told(group_id)}", fine=errno.EEXIST)


def remove_group(fd: int, group_id: int) -> bool:
    """Remove a quota group; True also where there is none, False while it has members or is a living subvolume's."""
    args = _QgroupCreateArgs(0, group_id)
    try:
        _ioctl(fd, QGROUP_CREATE, args, f"QGROUP_REMOVE {told(group_id)}")
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno != errno.ENOENT:
            raise
    return True


def assign_group(fd: int, member: int, parent: int) -> None:
    """Make a group a member of one of a higher level; fine where it is."""
    args = _QgroupAssignArgs(1, member, parent)
    _ioctl(fd, QGROUP_ASSIGN, args, f"QGROUP_ASSIGN {told(member)} {told(parent)}", fine=errno.EEXIST)


def release_group(fd: int, member: int, parent: int) -> None:
    """Take a group out of one of a higher level; fine where it isn't in it."""
    args = _QgroupAssignArgs(0, member, parent)
    _ioctl(fd, QGROUP_ASSIGN, args, f"QGROUP_REMOVE {told(member)} {told(parent)}", fine=errno.ENOENT)


def limit_group(fd: int, group_id: int, size: int | None) -> None:
    """Limit what a group may refer to, in bytes; None takes the limit away."""
    args = _QgroupLimitArgs(group_id, _QgroupLimit(_QGROUP_LIMIT_MAX_RFER, U64_MAX if size is None else size))
    _ioctl(fd, QGROUP_LIMIT, args, f"QGROUP_LIMIT {told(group_id)}")


def members(fd: int, group_id: int) -> list[int]:
    """The groups directly in one (QGROUP_RELATION items, which are kept both ways)."""
    return [each for each in _search(fd, _QUOTA_TREE, group_id, _QGROUP_RELATION_KEY) if each >> 48 < group_id >> 48]


def parents(fd: int, group_id: int) -> list[int]:
    """The groups a group is directly in; a subvolume's own group has its id."""
    return [each for each in _search(fd, _QUOTA_TREE, group_id, _QGROUP_RELATION_KEY) if each >> 48 > group_id >> 48]


def group_usage(uuid: str, group_id: int) -> int | None:
    """Bytes that count against a group's limit: what it refers to and data still dirty in memory. None without a group.

    Metadata, and data that was overwritten or deleted, are counted as of the last commit (`sync`).
    """
    at = f"/sys/fs/btrfs/{uuid}/qgroups/{group_id >> 48}_{group_id & (1 << 48) - 1}"
    referenced, dirty = _read(f"{at}/referenced"), _read(f"{at}/rsv_data")
    return None if referenced is None or dirty is None else int(referenced) + int(dirty)


def committed_usage(fd: int) -> dict[int, int]:
    """Bytes each group refers to, by group, as of the last commit: some fifty groups for the price of one in sysfs."""
    return {offset: _REFERENCED.unpack_from(item)[0] for offset, item in _items(fd, _QUOTA_TREE, 0, _QGROUP_INFO_KEY)}


def told(group_id: int) -> str:
    """A group as btrfs-qgroup(8) writes it: `1/7`."""
    return f"{group_id >> 48}/{group_id & (1 << 48) - 1}"


def _search(fd: int, tree: int, objectid: int, kind: int) -> list[int]:
    """Offsets of all items (objectid, kind, *) of a tree."""
    return [offset for offset, _ in _items(fd, tree, objectid, kind)]


def _items(fd: int, tree: int, objectid: int, kind: int) -> list[tuple[int, bytes]]:
    """Offset and content of all items (objectid, kind, *) of a tree; of a tree that isn't there, none."""
    found: list[tuple[int, bytes]] = []
    args = _SearchArgs(
        tree_id=tree, min_objectid=objectid, max_objectid=objectid, min_type=kind, max_type=kind,
        max_offset=U64_MAX, max_transid=U64_MAX,
    )  # fmt: skip
    while True:
        args.nr_items = (1 << 32) - 1
        try:
            _ioctl(fd, TREE_SEARCH, args, f"TREE_SEARCH {tree}")
        except FileNotFoundError:
            return found
        if args.nr_items == 0:
            return found
        buffer, at = bytes(args.buf), 0
        for _ in range(args.nr_items):
            _, _, offset, _, length = _SEARCH_HEADER.unpack_from(buffer, at)
            at += _SEARCH_HEADER.size
            found.append((offset, buffer[at : at + length]))
            at += length
        if found[-1][0] == U64_MAX:
            return found
        args.min_offset = found[-1][0] + 1


def _read(path: str) -> str | None:
    """A sysfs attribute; None where it, or what it was of, is gone."""
    try:
        return read_bytes(path).decode("ascii").strip()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return None
        raise
