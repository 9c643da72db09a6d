"""The layout of a volume, and the conversion of one from before overlays were mounted by the supervisor.

A volume is a directory with `upper`, the jail's layer, and the overlay's work directory. In the older format that is
`work` and the overlay's private attributes are `user.overlay.*`; in today's it is `WORK` and they are
`trusted.overlay.*` (root_mount.py). So a release from before finds no work directory in a converted volume and refuses
it: it would show files that were deleted, and files of which only the owner was changed as zeros.

The older format's attributes are the kernel's own. A guest's `user.overlay.NAME` is on disk as
`user.overlay.overlay.NAME` since Linux 6.7 (overlayfs.rst, "Nesting overlayfs mounts"); before that the kernel refused
it. The conversion takes known values of known attributes only, so no guest can smuggle in a redirect.

A kill at any line leaves a volume that the next call goes on with. First all of the kernel's attributes are converted.
Then the guest's escaped names, where there are any, get a name that no guest can write, and after that their own: no
name means one thing before such a pass and another after it, and which pass is due is marked. The renaming of the work
directory comes last. Today's format is known by it, so a start looks at one name.

Beside both lies `RESERVE`, a file that only takes up room: overlayfs makes directories as it is mounted, and where the
quota lets it not, the mount is read-only, and nobody in the jail could remove anything.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime.syscalls import libc

UPPER = "upper"
WORK = "workdir"
"""The work directory's name in today's format."""
RESERVE = "reserve"
RESERVE_BYTES, _STEP = 512 * 1024, 16 * 1024
"""Each item of a change counts as a node, 16 KiB, on btrfs while the change is made: overlayfs needs more room to be
mounted than it then takes."""

_OLD_WORK = "work"
_DUE = "trusted.jailmgr.pass"
"""On the volume's directory: the pass over the guest's names that is due, `_PASSES`."""
_KEPT = "trusted.jailmgr.kept."
_PRIVATE, _ESCAPED, _TRUSTED = "user.overlay.", "user.overlay.overlay.", "trusted.overlay."
_PASSES = {b"1": (_ESCAPED, _KEPT), b"2": (_KEPT, _PRIVATE)}
"""Beginnings of names, before and after."""
_TAKEN: dict[str, tuple[bytes, ...]] = {
    "opaque": (b"y", b"x"),
    "impure": (b"y",),
    "origin": (b"",),
    "whiteout": (b"", b"y"),
}
"""What the kernel wrote with `userxattr`, and with which values. Whiteouts are devices 0:0 in both formats."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def convert(volume: str) -> None:
    """Have a stopped jail's volume in today's format; fine where it is.

    The caller is the host's root. Several at once wait for each other. Raises JailmgrError, `full` where the quota has
    no room for it.
    """
    if os.path.isdir(f"{volume}/{WORK}"):
        return
    try:
        with _locked(volume) as top:
            if not os.path.isdir(f"{volume}/{WORK}"):
                _convert(top)
    except OSError as error:
        if error.errno not in (errno.EDQUOT, errno.ENOSPC):
            raise from_os(f"volume {volume}", error) from error
        why = "no space is left in it to change its format to this release's"
        raise JailmgrError(f"volume {volume}", why, "Raise the jail's limits.disk and start it.", "full") from error


def keep_reserve(volume: str) -> None:
    """Have the reserve, as large as the quota has room for. Raises OSError."""
    try:
        if os.stat(f"{volume}/{RESERVE}").st_size >= RESERVE_BYTES:
            return
    except FileNotFoundError:
        pass
    with _locked(volume) as top:
        try:
            fd = os.open(RESERVE, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=top)
        except OSError as error:
            _check_full(error)
            return
        try:
            _grow(fd)
            if not os.fstat(fd).st_size:
                release_reserve(volume)
        finally:
            os.close(fd)


def _grow(fd: int) -> None:
    for size in range(RESERVE_BYTES, os.fstat(fd).st_size, -_STEP):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            _check_full(error)
        if size == RESERVE_BYTES:
            _sync(fd)  # btrfs gives back what the changes of the mount have reserved


def _check_full(error: OSError) -> None:
    """Raise an error that is not about space."""
    if error.errno not in (errno.EDQUOT, errno.ENOSPC):
        raise error


def release_reserve(volume: str) -> bool:
    """Remove the reserve; whether there was one. Raises OSError."""
    try:
        os.unlink(f"{volume}/{RESERVE}")
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(volume: str) -> Iterator[int]:
    top = os.open(volume, _FOLDER)
    try:
        fcntl.flock(top, fcntl.LOCK_EX)
        yield top
    finally:
        os.close(top)


def _convert(top: int) -> None:
    if not _due(top):
        escaped = False

        def take(path: str) -> None:
            nonlocal escaped
            escaped = _take_over(path) or escaped

        _each(top, take)
        _sync(top)
        if escaped:
            os.setxattr(top, _DUE, b"1")
    while (due := _due(top)) in _PASSES:
        before, after = _PASSES[due]
        _each(top, partial(_rename, before, after))
        _sync(top)
        os.setxattr(top, _DUE, b"%d" % (int(due) + 1))
    os.rename(_OLD_WORK, WORK, src_dir_fd=top, dst_dir_fd=top)
    os.fsync(top)


def _due(top: int) -> bytes:
    return os.getxattr(top, _DUE) if _DUE in os.listxattr(top) else b""


def _take_over(path: str) -> bool:
    """Convert one file's attributes of the kernel's; whether the file has escaped ones of the guest's."""
    names = [name for name in os.listxattr(path, follow_symlinks=False) if name.startswith(_PRIVATE)]
    own = [name for name in names if not name.startswith(_ESCAPED)]
    for name in own:
        kind = name.removeprefix(_PRIVATE)
        value = os.getxattr(path, name, follow_symlinks=False)
        if value in _TAKEN.get(kind, ()):
            os.setxattr(path, f"{_TRUSTED}{kind}", value, follow_symlinks=False)
        os.removexattr(path, name, follow_symlinks=False)
    return len(own) < len(names)


def _rename(before: str, after: str, path: str) -> None:
    for name in os.listxattr(path, follow_symlinks=False):
        if name.startswith(before):
            value = os.getxattr(path, name, follow_symlinks=False)
            os.setxattr(path, f"{after}{name.removeprefix(before)}", value, follow_symlinks=False)
            os.removexattr(path, name, follow_symlinks=False)


def _each(top: int, act: Callable[[str], None]) -> None:
    """Call `act` with a path to each directory and regular file of the layer. No other kind has user attributes.

    One directory is open at a time and the way up is `..`: a guest's tree may be deeper than PATH_MAX and than the
    number of files that may be open. Nobody changes it meanwhile.
    """
    at = os.open(UPPER, _FOLDER, dir_fd=top)
    try:
        act(f"/proc/self/fd/{at}/.")
        waiting = [_look(at, act)]
        while waiting:
            if waiting[-1]:
                name = waiting[-1].pop()
            else:
                waiting.pop()
                name = ".."
                if not waiting:
                    return
            below = os.open(name, _FOLDER, dir_fd=at)
            os.close(at)
            at = below
            if name != "..":
                waiting.append(_look(at, act))
    finally:
        os.close(at)


def _look(folder: int, act: Callable[[str], None]) -> list[str]:
    """Call `act` for what lies in a directory; the names of the directories there."""
    below = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.name)
            elif not entry.is_file(follow_symlinks=False):
                continue
            act(f"/proc/self/fd/{folder}/{entry.name}")
    return below


def _sync(top: int) -> None:
    if libc.syncfs(top) < 0:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "syncfs")
