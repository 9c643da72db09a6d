"""Files the manager writes into a jail's own layer: before its first start, and for a new name while it is stopped.

The layer was the guest's to shape, and the image is nobody's friend: no path in them is ever followed through a link
(openat2(2), RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS), no file is opened that isn't a regular one with one name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from jailmgr.errors import JailmgrError
from jailmgr.runtime.syscalls import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2

_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
_FILE_MAX = 1 << 20
_NEW = ".jailmgr-new"
_METACOPY = "trusted.overlay.metacopy"

Rendered = list[tuple[str, bytes, int]]
"""Path in the jail, content, mode."""


def write_files(upper: str, lower: str, files: Rendered) -> None:
    """Put `files` into an upper layer over `lower`; directories on the way are made like the image's.

    Raises JailmgrError `invalid` where the image has a link in the place of a directory.
    """
    with _directory(upper) as top, _directory(lower) as image:
        for path, content, mode in files:
            folder, name = _split(path)
            with _make_directories(top, image, folder) as at:
                _write(at, name, content, mode)


def replace_files(
    upper: str, old: Rendered, new: Rendered, always: frozenset[str] = frozenset({"/etc/hostname"})
) -> None:
    """Where a file is still as it was rendered (`old`), make it as it is now (`new`); those of `always` in any case.

    A file or directory that the guest has removed, or put a link in the place of, is left alone.
    """
    before = {path: content for path, content, _ in old}
    with _directory(upper) as top:
        for path, content, mode in new:
            if before.get(path) == content:
                continue
            folder, name = _split(path)
            try:
                at = openat2(top, folder or ".", os.O_RDONLY | os.O_DIRECTORY, _RESOLVE)
            except OSError:
                continue
            try:
                there = _read(at, name)
                if there is not None and (path in always or there == before.get(path)):
                    _write(at, name, content, mode)
            finally:
                os.close(at)


@contextmanager
def _directory(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.strip("/").rpartition("/")
    if not name or any(part in ("", ".", "..") for part in path.strip("/").split("/")):
        raise JailmgrError(f"file {path!r}", "not a path of a file in the jail", "", "invalid")
    return folder, name


@contextmanager
def _make_directories(top: int, image: int, folder: str) -> Iterator[int]:
    """An fd of `folder` below `top`, with what is missing of it made with the owner and mode it has in the image."""
    at, path = os.dup(top), ""
    try:
        for part in folder.split("/") if folder else []:
            path = f"{path}/{part}".lstrip("/")
            like = _stat(image, path)
            if like is not None and not stat.S_ISDIR(like.st_mode):
                raise JailmgrError(f"file below /{path}", "the image has no directory there", "", "invalid")
            try:
                os.mkdir(part, 0o755, dir_fd=at)
            except FileExistsError:
                pass
            else:
                if like is not None:
                    os.chown(part, like.st_uid, like.st_gid, dir_fd=at, follow_symlinks=False)
                os.chmod(part, stat.S_IMODE(like.st_mode) if like is not None else 0o755, dir_fd=at)
            below = openat2(at, part, os.O_RDONLY | os.O_DIRECTORY, _RESOLVE)
            os.close(at)
            at = below
        yield at
    finally:
        os.close(at)


def _stat(image: int, path: str) -> os.stat_result | None:
    try:
        fd = openat2(image, path, os.O_PATH | os.O_NOFOLLOW, _RESOLVE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JailmgrError(
            f"file below /{path}", f"the image has no directory there ({error.strerror})", "", "invalid"
        ) from None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _read(at: int, name: str) -> bytes | None:
    """The content of a regular file with one name; None for anything else, or more than 1 MiB.

    None also for a file whose content is still the image's: the layer has only its owner and mode (overlayfs.rst,
    "Metadata only copy up").
    """
    try:
        fd = openat2(at, name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, _RESOLVE)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_size > _FILE_MAX:
            return None
        return None if _METACOPY in os.listxattr(fd) else os.read(fd, _FILE_MAX)
    finally:
        os.close(fd)


def _write(at: int, name: str, content: bytes, mode: int) -> None:
    """Replace a file by rename(2), whatever was there."""
    try:
        os.unlink(_NEW, dir_fd=at)
    except FileNotFoundError:
        pass
    fd = openat2(at, _NEW, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _RESOLVE, 0o600)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(fd, left) :]
        os.fchmod(fd, mode & 0o777)
    finally:
        os.close(fd)
    os.rename(_NEW, name, src_dir_fd=at, dst_dir_fd=at)
