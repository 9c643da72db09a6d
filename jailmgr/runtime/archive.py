"""`cp`: a tar stream into or out of a jail, read and written by a child inside of it as the jail's root.

Nothing of the jail's tree is opened from outside, so a link in it leads nowhere else. The stream is POSIX pax
(pax(1)), its owners are the jail's.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator

from jailmgr.errors import JailmgrError

_BUFFER = 256 * 1024

# By them tarfile asks for the names of owners, and so by the jail's nsswitch.conf(5), which names libraries of the
# guest's for glibc to load into this process (CVE-2019-14271 was that). tarfile does without.
tarfile.pwd = tarfile.grp = None  # type: ignore[attr-defined]


def write_tar(path: str, fd: int) -> None:
    """`path` and all below it as a tar on `fd`, named by its last component. Sockets are left out."""
    top = os.path.basename(path.rstrip("/")) or "root"
    try:
        os.lstat(path)
    except OSError as error:
        raise JailmgrError("cp", f"{path}: {error.strerror}", "", "missing") from error
    with (
        os.fdopen(os.dup(fd), "wb") as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_BUFFER) as tar,
    ):
        for name, source in _walk(path, top):
            if stat.S_ISSOCK(os.lstat(source).st_mode):
                continue
            info = tar.gettarinfo(source, name)
            info.uname = info.gname = ""
            if not info.isreg():
                tar.addfile(info)
                continue
            file_fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(file_fd, "rb") as file:
                now = os.fstat(file_fd)
                if stat.S_ISREG(now.st_mode):
                    info.size = now.st_size
                    tar.addfile(info, file)


def _walk(path: str, name: str) -> Iterator[tuple[str, str]]:
    yield name, path
    if os.path.islink(path) or not os.path.isdir(path):
        return
    for entry in sorted(os.listdir(path)):
        yield from _walk(f"{path}/{entry}", f"{name}/{entry}")


def read_tar(path: str, fd: int) -> None:
    """Put the one tree of a tar from `fd` at `path`: into it where it is a directory, else under its name, as cp(1)."""
    into = os.path.isdir(path)
    parent = path if into else os.path.dirname(path.rstrip("/")) or "/"
    if not os.path.isdir(parent):
        raise JailmgrError("cp", f"{parent}: no such directory in the jail", "", "missing")
    directories: list[tuple[tarfile.TarInfo, str]] = []
    with os.fdopen(os.dup(fd), "rb") as stream, tarfile.open(fileobj=stream, mode="r|", bufsize=_BUFFER) as tar:
        for info in tar:
            top, _, rest = info.name.strip("/").partition("/")
            name = top if into else os.path.basename(path.rstrip("/"))
            if ".." in (top, *rest.split("/")):
                raise JailmgrError("cp", f"{info.name}: leads out of its tree", "", "invalid")
            if info.islnk():
                info.linkname = _relocate(info.linkname, parent, name)
            info.name = f"{name}/{rest}" if rest else name
            target = f"{parent.rstrip('/')}/{info.name}"
            if not info.isdir() and os.path.lexists(target) and not os.path.isdir(target):
                os.unlink(target)
            if info.isdir() and os.path.isdir(target) and not os.path.islink(target):
                directories.append((info, target))
                continue
            tar.extract(info, parent, numeric_owner=True, set_attrs=not info.isdir())
            if info.isdir():
                directories.append((info, target))
    for info, target in reversed(directories):
        os.chown(target, info.uid, info.gid)
        os.chmod(target, info.mode)
        os.utime(target, (info.mtime, info.mtime))


def _relocate(linkname: str, parent: str, name: str) -> str:
    """tarfile resolves a hard link's target from the archive's own names: the new name of its top is put in."""
    _, _, rest = linkname.strip("/").partition("/")
    if ".." in rest.split("/"):
        raise JailmgrError("cp", f"{linkname}: leads out of its tree", "", "invalid")
    return f"{name}/{rest}" if rest else name
