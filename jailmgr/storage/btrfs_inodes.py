"""Inode numbers of a btrfs subvolume, read from its tree: which are in use, and by which names (btrfs-ioctl(2)).

A walk of the tree would go by paths that a guest has made, as deep as it likes. BTRFS_IOC_TREE_SEARCH_V2 lists the
items of inodes in the order of their numbers, each with the directories and names that it has (INODE_REF,
INODE_EXTREF; struct btrfs_inode_ref and struct btrfs_inode_extref of linux/btrfs_tree.h). Needs CAP_SYS_ADMIN; each
function raises OSError.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

FIRST, LAST = 257, (1 << 64) - 257
"""The first and the last number that a subvolume gives to a file (BTRFS_FIRST_FREE_OBJECTID is its root directory)."""

_BUFFER = 1 << 16
"""Bytes: the largest item has less, since a tree block has 64 KiB at most."""
_KEY = struct.Struct("=QQQQQQQIIIIQQQQ")
"""struct btrfs_ioctl_search_key."""
_SIZE = struct.Struct("=Q")
_HEADER = struct.Struct("=QQQII")
"""struct btrfs_ioctl_search_header: transid, objectid, offset, type, length."""
_SEARCH_V2 = 3 << 30 | (_KEY.size + _SIZE.size) << 16 | 0x94 << 8 | 17
_INODE_ITEM, _INODE_REF, _INODE_EXTREF = 1, 12, 13
_MODE = struct.Struct("<52xI")
"""Of struct btrfs_inode_item."""
_REF, _EXTREF = struct.Struct("<8xH"), struct.Struct("<Q8xH")

_Item = tuple[int, int, int, bytes]
"""Inode number, type, offset, content."""


class Inode(NamedTuple):
    """An inode with its names: each the number of the directory around it, and the name there."""

    number: int
    mode: int
    names: list[tuple[int, str]]


def has_from(fd: int, subvolume: int, first: int) -> bool:
    """Report whether a subvolume has an inode with a number of `first` or more. Takes some 5 µs."""
    return bool(_search(fd, subvolume, (first, 0, 0), LAST, bytearray(1024), 1))


def inodes_below(fd: int, subvolume: int, end: int) -> Iterator[Inode]:
    """Yield a subvolume's inodes with numbers below `end`, but for its root directory, and those without a name."""
    number, mode, names = 0, 0, list[tuple[int, str]]()
    for at, kind, offset, item in _items(fd, subvolume, end - 1):
        if at != number:
            if names:
                yield Inode(number, mode, names)
            number, mode, names = at, 0, []
        if kind == _INODE_ITEM:
            mode = int(_MODE.unpack_from(item)[0])
        elif kind == _INODE_REF:
            names += [(offset, name) for name in _names(item)]
        elif kind == _INODE_EXTREF:
            names += _far_names(item)
    if names:
        yield Inode(number, mode, names)


def _items(fd: int, subvolume: int, last: int) -> Iterator[_Item]:
    """Yield items from FIRST to `last`; a file's extents are passed over where they fill a buffer."""
    buffer, first = bytearray(_BUFFER), (FIRST, 0, 0)
    while found := _search(fd, subvolume, first, last, buffer):
        yield from found
        number, kind, offset, _ = found[-1]
        first = (number + 1, 0, 0) if kind > _INODE_EXTREF else (number, kind, offset + 1)


def _search(
    fd: int, subvolume: int, first: tuple[int, int, int], last: int, buffer: bytearray, count: int = (1 << 32) - 1
) -> list[_Item]:
    """Return the items from key `first` on that fit into the buffer, up to inode `last`."""
    number, kind, offset = first
    most = (1 << 64) - 1
    _KEY.pack_into(buffer, 0, subvolume, number, last, offset, most, 0, most, kind, 255, count, 0, 0, 0, 0, 0)
    head = _KEY.size + _SIZE.size
    _SIZE.pack_into(buffer, _KEY.size, len(buffer) - head)
    try:
        fcntl.ioctl(fd, _SEARCH_V2, buffer)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"TREE_SEARCH_V2 {subvolume}") from None
    found, at = list[_Item](), head
    for _ in range(_KEY.unpack_from(buffer)[9]):
        _, objectid, offset, kind, length = _HEADER.unpack_from(buffer, at)
        at += _HEADER.size
        found.append((objectid, kind, offset, bytes(buffer[at : at + length]) if kind <= _INODE_EXTREF else b""))
        at += length
    return found


def _names(item: bytes) -> Iterator[str]:
    at = 0
    while at < len(item):
        (length,) = _REF.unpack_from(item, at)
        at += _REF.size
        yield os.fsdecode(item[at : at + length])
        at += length


def _far_names(item: bytes) -> Iterator[tuple[int, str]]:
    at = 0
    while at < len(item):
        parent, length = _EXTREF.unpack_from(item, at)
        at += _EXTREF.size
        yield parent, os.fsdecode(item[at : at + length])
        at += length
