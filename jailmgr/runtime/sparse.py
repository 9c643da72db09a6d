"""The holes of a sparse file: found by lseek(2), and listed in a pax archive as GNU tar's format 1.0 does.

The format is in GNU tar's manual, "Storing Sparse Files": the list stands before the content, in blocks of 512 bytes.
It has the number of extents, and the offset and length of each, in decimal digits with a line feed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

BLOCK = 512
MOST = 50_000
"""Extents of one file, since the list is kept in memory. A file that has more is sent with its zeros."""

_DIGITS = 19
"""Of a file's largest offset, 2**63 - 1."""

Extents = tuple[tuple[int, int], ...]
"""Offset and length in bytes of each part that is no hole, in order."""


def extents_of(fd: int, status: os.stat_result) -> Extents | None:
    """Return what is data in a file; None if it has no hole, too many, or its file system reports none.

    Leaves the file's offset at 0. A file that is changed meanwhile may come out with a list of either state.
    """
    if status.st_blocks * BLOCK >= status.st_size:
        return None
    found: list[tuple[int, int]] = []
    at = 0
    try:
        while at < status.st_size and len(found) <= MOST:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = min(os.lseek(fd, start, os.SEEK_HOLE), status.st_size)
            if start < at:
                found.append((start, at - start))
    except OSError as error:
        if error.errno != errno.ENXIO:
            return None
    finally:
        os.lseek(fd, 0, os.SEEK_SET)
    if len(found) > MOST or found == [(0, status.st_size)]:
        return None
    return tuple(found)


def write_map(extents: Extents, size: int) -> bytes:
    """Return the blocks that list the extents of a file of `size` bytes. An empty last one marks a hole at the end."""
    ended = extents if extents and sum(extents[-1]) == size else (*extents, (size, 0))
    text = b"%d\n" % len(ended) + b"".join(b"%d\n%d\n" % extent for extent in ended)
    return text + bytes(-len(text) % BLOCK)


def read_map(take: Callable[[int], bytes], size: int) -> tuple[Extents, int]:
    """Read a list by `take`, which returns so many bytes of the stream; return the extents and the list's length.

    Raises ValueError for a list that is none, too long, out of order, or beyond the file's `size` bytes.
    """
    rest, length, numbers = b"", 0, list[int]()
    while not numbers or len(numbers) < 1 + 2 * numbers[0]:
        if len(rest) > _DIGITS or (numbers and numbers[0] > MOST + 1):
            raise ValueError("too long a list of extents")
        *lines, rest = (rest + take(BLOCK)).split(b"\n")
        numbers += map(_number, lines)
        length += BLOCK
    extents = tuple(zip(numbers[1::2], numbers[2::2], strict=True))
    ends = [0, *(offset + length for offset, length in extents)]
    starts = [*(offset for offset, _ in extents), size]
    if any(end > start for end, start in zip(ends, starts, strict=True)):
        raise ValueError("extents out of order")
    return extents, length


def _number(line: bytes) -> int:
    if not line.isdigit() or len(line) > _DIGITS:
        raise ValueError("no number")
    return int(line)
