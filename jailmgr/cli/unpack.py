"""A tar from a jail, unpacked on the host. The jail's root may have written it, so nothing in it is believed.

Every file is opened relative to the folder that it goes into, and no link is followed on the way (openat(2),
O_NOFOLLOW). Devices and FIFOs are left out; set-user-id and set-group-id bits are dropped.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

from jailmgr.errors import JailmgrError, from_os

Directory = tuple[list[str], tarfile.TarInfo]


def unpack(tar: tarfile.TarFile, to: str) -> list[str]:
    """Put the tree in `tar` at `to`: into it where it is a directory, else under its name, as `cp -a` does.

    Returns the names of what was left out. Raises JailmgrError for paths that lead elsewhere or can't be written.
    """
    into = os.path.isdir(to)
    parent = to if into else os.path.dirname(to.rstrip("/")) or "."
    left_out: list[str] = []
    directories: list[Directory] = []
    try:
        top = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os(f"cp to {to}", error) from error
    try:
        for member in tar:
            path = _place(member.name, None if into else os.path.basename(to.rstrip("/")))
            try:
                if not _unpack_one(tar, member, top, path):
                    left_out.append(member.name)
            except (OSError, OverflowError) as error:
                why = getattr(error, "strerror", None) or error
                raise JailmgrError(f"cp to {to}", f"{member.name}: {why}") from error
            if member.isdir():
                directories.append((path, member))
        for path, member in reversed(directories):
            with _folder(top, path) as at:
                _dress(at, member)
    finally:
        os.close(top)
    return left_out


def _place(name: str, top: str | None) -> list[str]:
    """Components of a member's path, its first one renamed to `top`."""
    path = name.strip("/").split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in path):
        raise JailmgrError("cp", f"{name!r} leads out of its tree")
    return path if top is None else [top, *path[1:]]


@contextmanager
def _folder(top: int, path: list[str]) -> Iterator[int]:
    """A folder below `top`, reached without following a link."""
    at = os.dup(top)
    try:
        for part in path:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
        yield at
    finally:
        os.close(at)


def _unpack_one(tar: tarfile.TarFile, member: tarfile.TarInfo, top: int, path: list[str]) -> bool:
    """Make one file; False for a kind that is left out."""
    *folders, name = path
    with _folder(top, folders) as at:
        if member.isdir():
            try:
                os.mkdir(name, 0o700, dir_fd=at)
            except FileExistsError:
                with _folder(at, [name]):
                    return True
            return True
        if not (member.isreg() or member.issym() or member.islnk()):
            return False
        try:
            os.unlink(name, dir_fd=at)
        except FileNotFoundError:
            pass
        if member.issym():
            os.symlink(member.linkname, name, dir_fd=at)
            if os.geteuid() == 0:
                os.chown(name, member.uid, member.gid, dir_fd=at, follow_symlinks=False)
        elif member.islnk():
            *others, other = _place(member.linkname, path[0])
            with _folder(top, others) as source:
                os.link(other, name, src_dir_fd=source, dst_dir_fd=at, follow_symlinks=False)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(name, flags, 0o600, dir_fd=at), "wb") as file:
                content = tar.extractfile(member)
                assert content is not None
                shutil.copyfileobj(content, file, 256 * 1024)
                file.flush()
                _dress(file.fileno(), member)
    return True


def _dress(fd: int, member: tarfile.TarInfo) -> None:
    """Owner, mode and time of what was made. Only root may give files away (chown(2)); others own what they copy."""
    if os.geteuid() == 0:
        os.fchown(fd, member.uid, member.gid)
    os.fchmod(fd, member.mode & 0o1777 if member.isdir() else member.mode & 0o777)
    try:
        os.utime(fd, (member.mtime, member.mtime))
    except OverflowError:
        # The jail's root may set any time (utimensat(2)), some beyond what Python takes: the file keeps its own.
        return
