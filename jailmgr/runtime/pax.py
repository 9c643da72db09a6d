"""The stream of `cp`: a POSIX pax archive (pax(1)) that GNU tar reads, with extended attributes as GNU tar has them.

The module is ours because tarfile copies in small steps, rounds times and asks the guest's libraries for names of
owners (CVE-2019-14271 was that). Only members that `cp` can make are written and read. All names are bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from jailmgr.errors import JailmgrError
from jailmgr.runtime.sparse import Extents, read_map, write_map

BLOCK = 512
CHUNK = 1 << 18
_SPLICED = 1 << 20
HEADER_MAX = 4 << 20
"""Bytes of one member's pax records: the stream may be a hostile guest's, and the records are kept in memory."""

FILE, LINK, SYMLINK, CHAR, DEVICE, FOLDER, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_KINDS = (FILE, LINK, SYMLINK, CHAR, DEVICE, FOLDER, FIFO, b"x")
_XATTR = b"SCHILY.xattr."
_CONTENT = b"JAILMGR.content"
_REAL_SIZE = b"GNU.sparse.realsize"
_SPARSE_NAME = b"GNUSparseFile.0/file"
"""What a reader without the format takes for the name: the name itself would give it the list as content."""
_MAGIC = b"ustar\x0000"


class Member(NamedTuple):
    """One file of the stream. Times are in nanoseconds; `content` marks one that brings no attributes."""

    name: bytes
    kind: bytes
    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    atime: int | None = None
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    content: bool = False
    extents: Extents | None = None
    """What is data in a sparse file of `size` bytes; only that is in the stream."""


def header(member: Member) -> bytes:
    """Return the blocks that stand before a member's content."""
    size, before = member.size, b""
    if member.extents is not None:
        before = write_map(member.extents, member.size)
        size = len(before) + stored(member)
    if member.kind == FOLDER and not member.name.endswith(b"/"):
        member = member._replace(name=member.name + b"/")
    records = _records(member, size)
    if not records:
        return _block(member, member.name, member.kind, size)
    body = b"".join(_record(key, value) for key, value in records)
    extended = _block(Member(b"", b"x"), b"PaxHeaders/" + member.name[-80:].lstrip(b"/"), b"x", len(body))
    name = member.name if member.extents is None else _SPARSE_NAME
    return extended + pad(body) + _block(member, name, member.kind, size) + before


def parts(member: Member) -> Extents:
    """Return offset and length of each part of the file that is in the stream."""
    return ((0, member.size),) if member.extents is None else member.extents


def stored(member: Member) -> int:
    """Return how many bytes of content follow the header; the last block is filled up behind them."""
    return sum(length for _, length in parts(member))


def pad(body: bytes) -> bytes:
    """Fill up the last block."""
    return body + bytes(-len(body) % BLOCK)


def end() -> bytes:
    """Return the two blocks that end an archive."""
    return bytes(2 * BLOCK)


def broken_end() -> bytes:
    """Return a member whose content is missing: each reader of tar reports an unexpected end there."""
    return _block(Member(b"", FILE), b"cp-was-cut-short", FILE, BLOCK)


def _records(member: Member, size: int) -> list[tuple[bytes, bytes]]:
    found = []
    if member.extents is not None:
        found = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")]
        found += [(b"GNU.sparse.name", member.name), (_REAL_SIZE, b"%d" % member.size)]
    elif len(member.name) > 100 or not member.name.isascii():
        found.append((b"path", member.name))
    if len(member.target) > 100 or not member.target.isascii():
        found.append((b"linkpath", member.target))
    for key, number, limit in ((b"uid", member.uid, 8**7), (b"gid", member.gid, 8**7), (b"size", size, 8**11)):
        if number >= limit:
            found.append((key, b"%d" % number))
    if member.mtime % 10**9 or not 0 <= member.mtime < 8**11 * 10**9:
        found.append((b"mtime", _seconds(member.mtime)))
    if member.atime is not None:
        found.append((b"atime", _seconds(member.atime)))
    found += [(_XATTR + name.replace(b"%", b"%25").replace(b"=", b"%3D"), value) for name, value in member.xattrs]
    if member.content:
        found.append((_CONTENT, b"1"))
    return found


def _record(key: bytes, value: bytes) -> bytes:
    """`LENGTH key=value\\n`, whose length counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) != len(str(rest)):
        length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _seconds(time: int) -> bytes:
    sign, time = (b"-", -time) if time < 0 else (b"", time)
    return b"%s%d.%09d" % (sign, time // 10**9, time % 10**9)


def _block(member: Member, name: bytes, kind: bytes, size: int) -> bytes:
    seconds = member.mtime // 10**9
    block = bytearray(
        name[:100].ljust(100, b"\0")
        + b"%07o\0" % (member.mode & 0o7777)
        + b"%07o\0" % (member.uid if member.uid < 8**7 else 0)
        + b"%07o\0" % (member.gid if member.gid < 8**7 else 0)
        + b"%011o\0" % (size if size < 8**11 else 0)
        + b"%011o\0" % (seconds if 0 <= seconds < 8**11 else 0)
        + b"        "
        + kind
        + member.target[:100].ljust(100, b"\0")
        + _MAGIC
        + bytes(64)
        + b"%07o\0%07o\0" % tuple(number & 0o7777777 for number in member.device)
    ).ljust(BLOCK, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


class Reader:
    """Members of a stream in their order. The content of each is read, or passed over, before the next."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._kept = b""
        self._at = 0
        self._left = 0
        """Bytes of content that are still in the stream."""
        self._padding = 0
        self._member = Member(b"", FILE)

    def next(self) -> Member | None:
        """Return the next member; None at the end. Raises JailmgrError where the stream is broken."""
        while self.stored():
            continue
        self._take(self._padding)
        self._padding = 0
        records: dict[bytes, bytes] = {}
        while True:
            block = self._take(BLOCK)
            if not block.strip(b"\0"):
                return None
            member = _parse(block, records)
            if member.kind != b"x":
                break
            if member.size > HEADER_MAX:
                raise broken("sizes beyond reason")
            records = _read_records(self._take(member.size + -member.size % BLOCK)[: member.size])
        if member.kind == FILE:
            if _REAL_SIZE in records:
                member = self._read_extents(member, records[_REAL_SIZE])
            self._left = stored(member)
            self._padding = -self._left % BLOCK
        self._member = member
        return member

    def _read_extents(self, member: Member, size: bytes) -> Member:
        try:
            extents, length = read_map(self._take, int(size))
        except ValueError as error:
            raise broken("a list of extents is none") from error
        if length + sum(length for _, length in extents) != member.size:
            raise broken("a list of extents has another size than its content")
        return member._replace(size=int(size), extents=extents)

    def stored(self, most: int = CHUNK) -> bytes:
        """Return the next part of the member's content, without the holes of a sparse file; nothing at its end."""
        if not self._left:
            return b""
        most = min(most, self._left)
        part = self._kept[self._at : self._at + most]
        self._at += len(part)
        part = part or os.read(self.fd, min(CHUNK, most))
        if not part:
            raise broken("it ends early")
        self._left -= len(part)
        return part

    def content(self) -> Iterator[bytes]:
        """Yield the member's content, with zeros for the holes of a sparse file."""
        size, at = self._member.size, 0
        for offset, length in (*parts(self._member), (size, 0)):
            while at < offset:
                zeros = min(CHUNK, offset - at)
                yield bytes(zeros)
                at += zeros
            at += length
            until = self._left - length
            while self._left > until:
                yield self.stored(self._left - until)

    def write_to(self, fd: int) -> None:
        """Write the member's content to a file, with its holes. Raises OSError where the file can't have them."""
        member = self._member
        for offset, length in parts(member):
            if member.extents is not None:
                os.lseek(fd, offset, os.SEEK_SET)
            self._write(fd, self._left - length)
        if member.extents is not None:
            os.ftruncate(fd, member.size)

    def _write(self, fd: int, until: int) -> None:
        """Write until so much is left. Most goes from the pipe to the file in the kernel (splice(2))."""
        direct = True
        while self._left > until:
            if direct and self._at == len(self._kept):
                try:
                    moved = os.splice(self.fd, fd, min(_SPLICED, self._left - until))
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    # One of the two is neither a pipe nor a file that splice knows.
                    direct = False
                    continue
                if not moved:
                    raise broken("it ends early")
                self._left -= moved
                continue
            part = memoryview(self.stored(self._left - until))
            while part:
                part = part[os.write(fd, part) :]

    def drain(self) -> None:
        """Read what follows the end, for its writer not to meet a closed pipe."""
        while os.read(self.fd, CHUNK):
            pass

    def _take(self, count: int) -> bytes:
        while len(self._kept) - self._at < count:
            part = os.read(self.fd, CHUNK)
            if not part:
                raise broken("it ends early")
            self._kept, self._at = self._kept[self._at :] + part, 0
        self._at += count
        return self._kept[self._at - count : self._at]


class BrokenStreamError(JailmgrError):
    """A stream that is no archive, or that ends early."""


def broken(why: str) -> BrokenStreamError:
    """Return the error for a stream that can't be read."""
    return BrokenStreamError("cp", f"what came is not a tar that can be read ({why})")


def _parse(block: bytes, records: dict[bytes, bytes]) -> Member:
    try:
        if int(block[148:156].rstrip(b"\0 "), 8) != sum(block) - sum(block[148:156]) + 8 * 32:
            raise broken("a header's checksum is wrong")
        octal = [int(block[start:stop].rstrip(b"\0 ") or b"0", 8) for start, stop in _NUMBERS]
        uid, gid = int(records.get(b"uid", octal[1])), int(records.get(b"gid", octal[2]))
        size, atime = int(records.get(b"size", octal[3])), records.get(b"atime")
        if min(octal) < 0 or min(uid, gid, size) < 0:
            raise broken("a number is negative")
        kind = block[156:157]
        if kind not in _KINDS:
            raise broken("a member is of no known kind")
        return Member(
            records.get(b"GNU.sparse.name") or records.get(b"path", block[:100].rstrip(b"\0")),
            kind,
            octal[0] & 0o7777,
            uid,
            gid,
            size if kind in (FILE, b"x") else 0,
            _nanoseconds(records[b"mtime"]) if b"mtime" in records else octal[4] * 10**9,
            None if atime is None else _nanoseconds(atime),
            records.get(b"linkpath", block[157:257].rstrip(b"\0")),
            (octal[5], octal[6]),
            tuple(
                (key[len(_XATTR) :].replace(b"%3D", b"=").replace(b"%25", b"%"), value)
                for key, value in records.items()
                if key.startswith(_XATTR)
            ),
            _CONTENT in records,
        )
    except ValueError as error:
        raise broken("a header holds no number where one belongs") from error


_NUMBERS = ((100, 108), (108, 116), (116, 124), (124, 136), (136, 148), (329, 337), (337, 345))


def _nanoseconds(text: bytes) -> int:
    sign, text = (-1, text[1:]) if text[:1] == b"-" else (1, text)
    whole, _, part = text.partition(b".")
    return sign * (int(whole) * 10**9 + int(part[:9].ljust(9, b"0")))


def _read_records(body: bytes) -> dict[bytes, bytes]:
    found, at = {}, 0
    while at < len(body):
        digits, space, _ = body[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = body[at + len(digits) + 1 : at + length]
        key, equals, value = record[:-1].partition(b"=")
        if not (space and equals and record.endswith(b"\n")):
            raise broken("a header holds no record where one belongs")
        found[key] = value
        at += length
    return found
