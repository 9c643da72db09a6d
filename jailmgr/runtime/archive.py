"""`cp`: a tree read into a stream (pax.py), and the jail's end of both directions, in a child inside of the jail.

Nothing of the jail's tree is opened from outside, so a link in it leads nowhere else. Owners are the jail's.

Two files may have one inode number where overlayfs shows the numbers of two subvolumes: in a jail whose volume an
earlier release made, until its next start (storage/btrfs_renumber.py), and in overlays of others. So equal (st_dev,
st_ino) is not enough for a hard link. A second name is written as a link only if both names have more than one link,
and equal size, mode, owner, mtime and ctime in nanoseconds, and equal content, read again. The content decides: files
that are taken for one by mistake have the same bytes, and none is lost.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator

from jailmgr.errors import JailmgrError
from jailmgr.runtime import extract, pax, sparse

_WHOLE = 1 << 20
"""Bytes of a file that are read before its header is written: then the header has the size that was read."""
_UNSIZED_MAX = 64 << 20
"""Bytes of a file that has more than its size says, as those of /proc do. They are kept in memory."""
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_XATTRS = ("user.", "system.posix_acl_", "security.capability")
_NAMED = 20
_PIPE = 1 << 20

Seen = dict[tuple[int, ...], tuple[str, bytes]]


def send(path: str, fd: int) -> None:
    """Write `path` and all below it on its file system to `fd`. Raises JailmgrError at the end for what was missed."""
    complain(write_tree(path, fd, True))


def receive(path: str, fd: int) -> None:
    """Put the tree on `fd` at `path` as `cp -a` does. Raises JailmgrError at the end for what could not be kept."""
    reader = pax.Reader(fd)
    found = extract.extract(reader, os.fsencode(path), extract.Rules())
    reader.drain()
    complain(found)


def complain(found: list[str]) -> None:
    """Raise JailmgrError if anything was not copied as it is."""
    if found:
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise JailmgrError("cp", "the rest was copied, but " + "; ".join(text[:400] for text in found[:_NAMED]) + more)


def write_tree(path: str, fd: int, one_system: bool) -> list[str]:
    """Write `path` as an archive, named by its last component, and return what was missed.

    An error ends the archive so that each reader of tar reports it. Raises JailmgrError if `path` is not there.
    """
    try:
        top = os.lstat(path.rstrip("/") or "/")
    except OSError as error:
        raise JailmgrError("cp", f"{path}: {error.strerror}", "", "missing") from error
    name = os.path.basename(path.rstrip("/"))
    widen(fd)
    tree = Writer(fd)
    try:
        plain = path.rstrip("/") or "/"
        for source, below in _walk(
            plain, b"." if name in ("", ".", "..") else os.fsencode(name), top, one_system, tree
        ):
            try:
                tree.add(source, below)
            except BrokenPipeError:
                raise
            except OSError as error:
                tree.missed.append(f"{source}: {error.strerror}")
        tree.put(pax.end())
    except BaseException:
        tree.put(pax.broken_end())
        raise
    finally:
        tree.flush()
    return tree.missed


def widen(fd: int) -> None:
    """Let a pipe hold more, so that its two ends take turns less often; a user's share of pipes may be used up."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE)
    except OSError:
        return


def _walk(path: str, name: bytes, top: os.stat_result, one_system: bool, tree: Writer) -> Iterator[tuple[str, bytes]]:
    """Yield each file and its name in the archive, a folder before what is in it."""
    waiting = [(path, name)]
    while waiting:
        path, name = waiting.pop()
        yield path, name
        try:
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode) or (one_system and status.st_dev != top.st_dev):
                continue
            entries = sorted(os.listdir(path), reverse=True)
        except FileNotFoundError:
            continue
        except OSError as error:
            tree.missed.append(f"{path}: {error.strerror}")
            continue
        waiting += [(f"{path.rstrip('/')}/{entry}", name + b"/" + os.fsencode(entry)) for entry in entries]


class Writer:
    """An archive on a file descriptor; small parts are put together."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.missed: list[str] = []
        self._parts: list[bytes] = []
        self._size = 0
        self._seen: Seen = {}

    def put(self, part: bytes) -> None:
        """Append to the archive."""
        self._parts.append(part)
        self._size += len(part)
        if self._size >= pax.CHUNK:
            self.flush()

    def flush(self) -> None:
        """Write what has been put together. A pipe that nobody reads any more raises BrokenPipeError."""
        left, self._parts, self._size = memoryview(b"".join(self._parts)), [], 0
        while left:
            left = left[os.write(self.fd, left) :]

    def add(self, path: str, name: bytes) -> None:
        """Append one file. Raises OSError for one that can't be read, with nothing of it written."""
        status = os.lstat(path)
        kind = _KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            self.missed.append(f"{path}: left out, a socket")
            return
        if status.st_nlink > 1 and kind in (pax.FILE, pax.SYMLINK) and self._add_link(path, name, status, kind):
            return
        if kind == pax.FILE:
            self._add_file(path, name)
        else:
            self.put(pax.header(_member(path, name, kind, status, 0)))

    def _add_link(self, path: str, name: bytes, status: os.stat_result, kind: bytes) -> bool:
        key = _identity(status)
        first = self._seen.setdefault(key, (path, name))
        try:
            if first[1] == name or not _same(first[0], path, key):
                return False
        except OSError:
            return False
        member = _member(path, name, kind, status, 0)
        self.put(pax.header(member._replace(kind=pax.LINK, target=first[1], xattrs=())))
        return True

    def _add_file(self, path: str, name: bytes) -> None:
        fd = os.open(path, _READ)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EAGAIN, "was replaced while it was copied")
            extents = sparse.extents_of(fd, status)
            if extents is not None:
                self._add_sparse(path, fd, _member(path, name, pax.FILE, status, status.st_size), extents)
                return
            content, whole = _read_up_to(fd, min(status.st_size + 1, _WHOLE) if status.st_size else _WHOLE)
            if not whole and status.st_size < len(content):
                rest, whole = _read_up_to(fd, _UNSIZED_MAX)
                content += rest
                if not whole:
                    raise OSError(errno.EAGAIN, "has more content than its size says")
            size = len(content) if whole else status.st_size
            self.put(pax.header(_member(path, name, pax.FILE, status, size)))
            self.put(content)
            self._put_rest(path, fd, size - len(content))
            self.put(bytes(-size % pax.BLOCK))
        finally:
            os.close(fd)

    def _add_sparse(self, path: str, fd: int, member: pax.Member, extents: sparse.Extents) -> None:
        member = member._replace(extents=extents)
        self.put(pax.header(member))
        for offset, length in extents:
            os.lseek(fd, offset, os.SEEK_SET)
            self._put_rest(path, fd, length)
        self.put(bytes(-pax.stored(member) % pax.BLOCK))

    def _put_rest(self, path: str, fd: int, left: int) -> None:
        """Append as many bytes as the header has promised: what can't be read any more is filled with zeros."""
        failed = False
        while left:
            part = b"" if failed else _read_or_nothing(fd, min(pax.CHUNK, left))
            if not part and not failed:
                failed = True
                self.missed.append(f"{path}: became shorter while it was copied; the rest is zeros")
            part = part or bytes(min(pax.CHUNK, left))
            self.put(part)
            left -= len(part)


def _read_or_nothing(fd: int, count: int) -> bytes:
    try:
        return os.read(fd, count)
    except OSError:
        return b""


_KINDS = {
    stat.S_IFREG: pax.FILE,
    stat.S_IFLNK: pax.SYMLINK,
    stat.S_IFDIR: pax.FOLDER,
    stat.S_IFCHR: pax.CHAR,
    stat.S_IFBLK: pax.DEVICE,
    stat.S_IFIFO: pax.FIFO,
}


def _read_up_to(fd: int, count: int) -> tuple[bytes, bool]:
    """Return up to `count` bytes, and whether the file ends there."""
    parts, left = [], count
    while left and (part := os.read(fd, min(pax.CHUNK, left))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts), left > 0


def _member(path: str, name: bytes, kind: bytes, status: os.stat_result, size: int) -> pax.Member:
    return pax.Member(
        name,
        kind,
        stat.S_IMODE(status.st_mode),
        status.st_uid,
        status.st_gid,
        size,
        status.st_mtime_ns,
        status.st_atime_ns,
        os.fsencode(os.readlink(path)) if kind == pax.SYMLINK else b"",
        (os.major(status.st_rdev), os.minor(status.st_rdev)),
        () if kind == pax.SYMLINK else _xattrs(path),
    )


def _xattrs(path: str) -> tuple[tuple[bytes, bytes], ...]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError:
        return ()
    kept = [name for name in names if name.startswith(_XATTRS)]
    return tuple((os.fsencode(name), os.getxattr(path, name, follow_symlinks=False)) for name in kept)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (*status[:6], status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _same(one: str, other: str, key: tuple[int, ...]) -> bool:
    """Whether two names have the identity `key` still, and the same content."""
    if stat.S_ISLNK(key[0]):
        return _identity(os.lstat(one)) == key and os.readlink(one) == os.readlink(other)
    with open(os.open(one, _READ), "rb", 0) as first, open(os.open(other, _READ), "rb", 0) as second:
        if not _identity(os.fstat(first.fileno())) == key == _identity(os.fstat(second.fileno())):
            return False
        while part := first.read(pax.CHUNK):
            if part != second.read(pax.CHUNK):
                return False
        return not second.read(1)
