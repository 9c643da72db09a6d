"""Files of a root file system that guests have had their hands on, reached by fd from its top.

Every path is resolved by the kernel with the tree as its root (openat2(2), RESOLVE_IN_ROOT), so that no link in it
leads out. Owners are 0-based: what is made here belongs to the guest's root.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from jailmgr.runtime import syscalls as kernel

_INSIDE = kernel.RESOLVE_IN_ROOT | kernel.RESOLVE_NO_MAGICLINKS
_DIRECTORY = os.O_DIRECTORY | os.O_RDONLY


@contextmanager
def open_tree(path: str) -> Iterator[int]:
    """The fd of the tree's top, which all functions here start from."""
    fd = os.open(path, _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read(top: int, path: str, limit: int) -> bytes | None:
    """Up to `limit` bytes of a regular file; None when there is none (a FIFO or device is none)."""
    try:
        fd = kernel.openat2(top, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, _INSIDE)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return None
    with open(fd, "rb") as file:
        return file.read(limit)


def is_executable(top: int, path: str) -> bool:
    """Report whether `path` is a regular file that may be executed; links are resolved inside the tree."""
    try:
        fd = kernel.openat2(top, path, os.O_PATH, _INSIDE)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    try:
        mode = os.fstat(fd).st_mode
    finally:
        os.close(fd)
    return stat.S_ISREG(mode) and bool(mode & 0o111)


def resolve(top: int, path: str) -> str:
    """The path that `path` leads to by links, all resolved inside the tree; only its end is the tree's. OSError."""
    fd = kernel.openat2(top, path, os.O_PATH, _INSIDE)
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def write(top: int, path: str, content: bytes, mode: int) -> None:
    """Put a file in place in one piece, with the directories above it; whatever had its name is replaced."""
    parent, name = os.path.split(path)
    directory = make_directories(top, parent)
    try:
        new = f".{name}.new"
        _unlink(directory, new)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
        with open(fd, "wb") as file:
            file.write(content)
            os.fchmod(fd, mode)
        try:
            os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            _unlink(directory, new)
            raise
    finally:
        os.close(directory)


def link(top: int, path: str, target: str) -> None:
    """Put a symbolic link in place, whatever had its name."""
    parent, name = os.path.split(path)
    directory = make_directories(top, parent)
    try:
        _remove_entry(directory, name)
        os.symlink(target, name, dir_fd=directory)
    finally:
        os.close(directory)


def make_directories(top: int, path: str, mode: int = 0o755) -> int:
    """The fd of a directory, made with those above it where it is missing."""
    try:
        return kernel.openat2(top, path.strip("/") or ".", _DIRECTORY, _INSIDE)
    except FileNotFoundError:
        above = make_directories(top, os.path.dirname(path.strip("/")))
    try:
        name = os.path.basename(path.strip("/"))
        os.mkdir(name, 0o700, dir_fd=above)
        made = os.open(name, _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        os.fchmod(made, mode)
        return made
    finally:
        os.close(above)


def remove(top: int, pattern: str) -> None:
    """Delete what matches, whole directories too. Only the last part of the path may hold `*`, `?` or `[…]`."""
    parent, last = os.path.split(pattern)
    try:
        directory = kernel.openat2(top, parent.strip("/") or ".", _DIRECTORY, _INSIDE)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return
        raise
    try:
        for name in os.listdir(directory):
            if fnmatchcase(name, last):
                _remove_entry(directory, name)
    finally:
        os.close(directory)


def _remove_entry(directory: int, name: str) -> None:
    """A file, or a directory with all in it; a stack of fds, not recursion, for a guest chose the depth."""
    if _unlink(directory, name):
        return
    flags = _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    stack = [(os.dup(directory), name)]
    try:
        while stack:
            above, current = stack[-1]
            here = os.open(current, flags, dir_fd=above)
            below = next((entry for entry in os.listdir(here) if not _unlink(here, entry)), None)
            if below is not None:
                stack.append((here, below))
                continue
            os.close(here)
            os.rmdir(current, dir_fd=above)
            os.close(above)
            stack.pop()
    finally:
        for above, _name in stack:
            os.close(above)


def _unlink(directory: int, name: str) -> bool:
    """False where it is a directory; one that isn't there counts as done."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return True
    except IsADirectoryError:
        return False
    return True
