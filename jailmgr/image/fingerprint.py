"""The fingerprint of a root file system: SHA-256 of a tar archive of it that depends on nothing but its content.

The archive is POSIX pax (tarfile.PAX_FORMAT; pax(1)), with
- the root directory first, as `./`, then each directory's entries sorted by their names' bytes, depth first, as GNU
  tar's --sort=name has them; paths are relative to the root;
- owners as numbers, permissions with the set-id and sticky bits;
- extended attributes as `SCHILY.xattr.NAME`, sorted by name, but for those a host gives files by itself
  (security.selinux, security.ima, security.evm) and btrfs's own (btrfs.*);
- of files with several names the first one with the content, the others as links to it. Equal inode numbers don't make
  two names one file: in an overlay of several layers two files may have one number. All that stat(2) says must be
  equal, and so must content and extended attributes, read again;
- no time at all: what differs between two builds of the same content, and nothing that runs, is when it was written;
- no sockets, which tar has no word for.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest

from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime.syscalls import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2

_CHUNK = 1 << 20
_OF_THE_HOST = ("security.selinux", "security.ima", "security.evm")
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def fingerprint(rootfs: str) -> str:
    """The fingerprint, 64 hexadecimal digits, of the tree below `rootfs`. Raises as `canonical_tar` does."""
    digest = hashlib.sha256()
    for part in canonical_tar(rootfs):
        digest.update(part)
    return digest.hexdigest()


def canonical_tar(rootfs: str) -> Iterator[bytes]:
    """The archive that is fingerprinted, in parts of up to 1 MiB.

    No link in the tree is followed, no device opened. Raises JailmgrError `invalid` where a path has more than 4095
    bytes, a file changes while it is read, or a file has an attribute `trusted.*`: by those overlayfs finds a file's
    content elsewhere in the image (overlayfs.rst, "Permission model").
    """
    seen: dict[tuple[int, ...], str] = {}
    with _explained(rootfs), _open(rootfs) as top:
        for path, folder, name, found in _walk(top):
            entry = _entry(path, folder, name, found)
            if entry is None:
                continue
            first = path
            if found.st_nlink > 1 and not entry.isdir():
                first = seen.setdefault(_identity(found), path)
                if first != path and not _is_same(top, first, path):
                    first = path
            if first != path:
                entry.type, entry.linkname, entry.size, entry.pax_headers = tarfile.LNKTYPE, first, 0, {}
            yield entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
            if entry.type == tarfile.REGTYPE:
                yield from _content(folder, name, found)
    yield bytes(2 * tarfile.BLOCKSIZE)


def disk_size(rootfs: str) -> int:
    """Bytes the tree below `rootfs` takes on disk, files of several names once. Raises as `canonical_tar` does."""
    seen: set[tuple[int, ...]] = set()
    size = 0
    with _explained(rootfs), _open(rootfs) as top:
        for _path, _folder, _name, found in _walk(top):
            inode = _identity(found)
            if inode not in seen:
                size += found.st_blocks * 512
            if found.st_nlink > 1:
                seen.add(inode)
    return size


@contextmanager
def _explained(rootfs: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = from_os(f"root file system {rootfs}", error)
        if error.errno in (errno.ENAMETOOLONG, errno.ESTALE, errno.ENOENT):
            raise JailmgrError(told.what, told.why, "", "invalid") from error
        raise told from error


@contextmanager
def _open(path: str, top: int | None = None) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags) if top is None else openat2(top, path, flags, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
    try:
        yield fd
    finally:
        os.close(fd)


def _walk(top: int) -> Iterator[tuple[str, int, str, os.stat_result]]:
    """Path, fd of the directory around it, name there and stat of everything; the fd is open until the next step."""
    yield "./", top, ".", os.stat(top)
    waiting: list[tuple[str, list[str]]] = [(".", sorted(os.listdir(top), key=os.fsencode, reverse=True))]
    while waiting:
        at, names = waiting[-1]
        if not names:
            waiting.pop()
            continue
        with _open(at, top) as folder:
            while names:
                name = names.pop()
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                path = name if at == "." else f"{at}/{name}"
                yield path, folder, name, found
                if stat.S_ISDIR(found.st_mode):
                    with _open(name, folder) as below:
                        waiting.append((path, sorted(os.listdir(below), key=os.fsencode, reverse=True)))
                    break


def _entry(path: str, folder: int, name: str, found: os.stat_result) -> tarfile.TarInfo | None:
    kind = _TYPES.get(stat.S_IFMT(found.st_mode))
    if kind is None:
        return None
    entry = tarfile.TarInfo(path)
    entry.type = kind
    entry.mode, entry.uid, entry.gid = stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid
    if kind == tarfile.REGTYPE:
        entry.size = found.st_size
    elif kind == tarfile.SYMTYPE:
        entry.linkname = os.readlink(name, dir_fd=folder)
    elif kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        entry.devmajor, entry.devminor = os.major(found.st_rdev), os.minor(found.st_rdev)
    entry.pax_headers = _xattrs(f"/proc/self/fd/{folder}/{name}")
    return entry


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """What two names of one file have in common by stat(2)."""
    return (*found[:6], found.st_rdev, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _is_same(top: int, one: str, other: str) -> bool:
    """Whether two paths with one identity have the same content and extended attributes."""
    with _open(os.path.dirname(one) or ".", top) as first, _open(os.path.dirname(other) or ".", top) as second:
        (one, other) = os.path.basename(one), os.path.basename(other)
        status = os.stat(one, dir_fd=first, follow_symlinks=False)
        if _xattrs(f"/proc/self/fd/{first}/{one}") != _xattrs(f"/proc/self/fd/{second}/{other}"):
            return False
        if stat.S_ISLNK(status.st_mode):
            return os.readlink(one, dir_fd=first) == os.readlink(other, dir_fd=second)
        return not stat.S_ISREG(status.st_mode) or all(
            a == b for a, b in zip_longest(_content(first, one, status), _content(second, other, status))
        )


def _xattrs(path: str) -> dict[str, str]:
    found = {}
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        if name.startswith("trusted."):
            why = (
                f"{os.path.basename(path)} has the attribute {name}, and the kernel trusts such attributes of an image"
            )
            raise JailmgrError("image", why, "Remove it: setfattr --remove.", "invalid")
        if name not in _OF_THE_HOST and not name.startswith("btrfs."):
            value = os.getxattr(path, name, follow_symlinks=False)
            found[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
    return found


def _content(folder: int, name: str, found: os.stat_result) -> Iterator[bytes]:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=folder)
    try:
        left = found.st_size if os.fstat(fd).st_ino == found.st_ino else -1
        while left:
            chunk = os.read(fd, min(left, _CHUNK)) if left > 0 else b""
            if not chunk:
                raise OSError(errno.ESTALE, "it changed while it was read", name)
            yield chunk
            left -= len(chunk)
        yield bytes(-found.st_size % tarfile.BLOCKSIZE)
    finally:
        os.close(fd)
