"""The tree of a `cp` stream, written below one directory: in the jail by its root, on the host by the caller.

Every file is opened relative to the folder that it goes into, and no link is followed on the way (openat(2),
O_NOFOLLOW). A file is made with mode 0600, written, and gets owner, extended attributes and mode in this order. It is
never open to more than its source was. The ACL comes before the mode, since an ACL's mask is the mode's group bits.
What can't be given is reported by name, and the rest goes on.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime import pax

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""After these the rest fails as well."""


class Rules(NamedTuple):
    """What a stream may bring. The host takes less from a jail: see `HOST`."""

    special: bool = True
    """FIFOs, devices, set-user-id and set-group-id bits, file capabilities."""
    owners: bool = True
    xattrs: tuple[bytes, ...] = (b"user.", b"system.posix_acl_", b"security.capability")


def extract(reader: pax.Reader, to: bytes, rules: Rules) -> list[str]:
    """Put the tree at `to`, named as `cp -a` names it; returns what could not be kept. Raises JailmgrError."""
    found: list[str] = []
    member = reader.next()
    if member is None:
        return found
    if member.content and not to.endswith(b"/"):
        return _fill(reader, to)
    parent, top = _aim(to, member)
    try:
        at = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os(f"cp to {os.fsdecode(to)}", error) from error
    folders: list[tuple[list[bytes], pax.Member]] = []
    try:
        while member is not None:
            path = place(member.name, top)
            try:
                _extract_one(reader, member, at, path, top, rules, found)
                if member.kind == pax.FOLDER:
                    folders.append((path, member))
            except (OSError, OverflowError) as error:
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise from_os(f"cp to {os.fsdecode(to)}: {os.fsdecode(member.name)}", error) from error
                found.append(f"{os.fsdecode(member.name)}: {getattr(error, 'strerror', None) or error}")
            member = reader.next()
        for path, member in reversed(folders):
            try:
                with _folder(at, path) as fd:
                    _dress(fd, member, rules, found)
            except (OSError, OverflowError) as error:
                found.append(f"{os.fsdecode(member.name)}: {getattr(error, 'strerror', None) or error}")
    finally:
        os.close(at)
    return found


def _aim(to: bytes, first: pax.Member) -> tuple[bytes, bytes | None]:
    """Return the folder that the tree goes into, and the new name of its top: none where it keeps its own."""
    if os.path.isdir(to):
        return to, None
    plain = to.rstrip(b"/")
    name = os.path.basename(plain)
    if name in (b"", b".", b"..") or (to.endswith(b"/") and first.kind != pax.FOLDER):
        raise JailmgrError(f"cp to {os.fsdecode(to)}", "no such directory", "", "missing")
    parent = os.path.dirname(plain) or (b"/" if plain.startswith(b"/") else b".")
    if not os.path.isdir(parent):
        raise JailmgrError(f"cp to {os.fsdecode(to)}", f"{os.fsdecode(parent)}: no such directory", "", "missing")
    return parent, name


def place(name: bytes, top: bytes | None) -> list[bytes]:
    """Return the components of a member's path, its first one renamed to `top`; a top of `.` is the folder itself."""
    path = name.strip(b"/").split(b"/")
    if path == [b"."]:
        return [] if top is None else [top]
    if path[0] == b"." and top is None:
        path = path[1:]
    renamed = path if top is None else [top, *path[1:]]
    if any(part in (b"", b".", b"..") or b"\0" in part for part in [*path[1:], *renamed]) or path[0] == b"..":
        raise JailmgrError("cp", f"{os.fsdecode(name)!r} leads out of its tree", "", "invalid")
    return renamed


@contextmanager
def _folder(top: int, path: list[bytes]) -> Iterator[int]:
    """Open a folder below `top` without following a link."""
    at = os.dup(top)
    try:
        for part in path:
            below = os.open(part, _FOLDER, dir_fd=at)
            os.close(at)
            at = below
        yield at
    finally:
        os.close(at)


def _extract_one(
    reader: pax.Reader,
    member: pax.Member,
    top: int,
    path: list[bytes],
    renamed: bytes | None,
    rules: Rules,
    found: list[str],
) -> None:
    if not path:
        return
    *folders, name = path
    with _folder(top, folders) as at:
        if member.kind == pax.FOLDER:
            try:
                os.mkdir(name, 0o700, dir_fd=at)
            except FileExistsError:
                with _folder(at, [name]):
                    return
            return
        if not _may(member, rules):
            found.append(f"{os.fsdecode(member.name)}: left out, neither file, folder nor link")
            return
        _clear(name, at)
        if member.kind == pax.LINK:
            *others, other = place(member.target, renamed)
            with _folder(top, others) as source:
                os.link(other, name, src_dir_fd=source, dst_dir_fd=at, follow_symlinks=False)
        elif member.kind == pax.FILE:
            fd = os.open(name, _NEW, 0o600, dir_fd=at)
            try:
                _write(reader, fd)
                _dress(fd, member, rules, found)
            finally:
                os.close(fd)
        else:
            _make(member, name, at, rules, found)


def _clear(name: bytes, at: int) -> None:
    """Remove what is there, unless it is a folder."""
    try:
        os.unlink(name, dir_fd=at)
    except FileNotFoundError:
        return


def _may(member: pax.Member, rules: Rules) -> bool:
    plain = member.kind in (pax.FILE, pax.LINK, pax.SYMLINK)
    return plain or (rules.special and member.kind in (pax.FIFO, pax.CHAR, pax.DEVICE))


def _make(member: pax.Member, name: bytes, at: int, rules: Rules, found: list[str]) -> None:
    """Make a link, or a FIFO or device, neither of which can be opened to set its attributes."""
    if member.kind == pax.SYMLINK:
        os.symlink(member.target, name, dir_fd=at)
    else:
        kinds = {pax.FIFO: stat.S_IFIFO, pax.CHAR: stat.S_IFCHR, pax.DEVICE: stat.S_IFBLK}
        os.mknod(name, kinds[member.kind] | 0o600, os.makedev(*member.device), dir_fd=at)
    if rules.owners:
        try:
            os.chown(name, member.uid, member.gid, dir_fd=at, follow_symlinks=False)
        except OSError as error:
            found.append(_unowned(member, error))
    if member.kind != pax.SYMLINK:
        os.chmod(name, member.mode & 0o777, dir_fd=at)
    try:
        os.utime(name, ns=_times(member), dir_fd=at, follow_symlinks=False)
    except OverflowError:
        found.append(f"{os.fsdecode(member.name)}: its time is out of range")


def _write(reader: pax.Reader, fd: int) -> None:
    reader.write_to(fd)


def _times(member: pax.Member) -> tuple[int, int]:
    return (member.mtime if member.atime is None else member.atime, member.mtime)


def _unowned(member: pax.Member, error: OSError) -> str:
    return f"{os.fsdecode(member.name)}: owner {member.uid}:{member.gid} can't be given ({error.strerror})"


def _dress(fd: int, member: pax.Member, rules: Rules, found: list[str]) -> None:
    """Give owner, extended attributes, mode and times to what was made, in this order."""
    name, mode = os.fsdecode(member.name), member.mode
    if rules.owners:
        try:
            os.fchown(fd, member.uid, member.gid)
        except OSError as error:
            found.append(_unowned(member, error))
            mode &= 0o1777
    for key, value in member.xattrs:
        if not key.startswith(rules.xattrs):
            found.append(f"{name}: {os.fsdecode(key)} is not kept")
            continue
        try:
            os.setxattr(fd, key, value)
        except OSError as error:
            found.append(f"{name}: {os.fsdecode(key)} can't be given ({error.strerror})")
            if key == b"system.posix_acl_access":
                # The group bits are the mask of the list that is missing: the group itself may have had less.
                mode &= ~0o070
    if not rules.special and mode & 0o6000:
        found.append(f"{name}: set-user-id and set-group-id bits are dropped")
        mode &= 0o1777
    os.fchmod(fd, mode)
    try:
        os.utime(fd, ns=_times(member))
    except OverflowError:
        # The jail's root may set any time (utimensat(2)), some beyond what Python takes: the file keeps its own.
        found.append(f"{name}: its time is out of range")


def _fill(reader: pax.Reader, to: bytes) -> list[str]:
    """Write content that has no attributes, as a shell's `>` does: what is there keeps its own, a link is followed."""
    try:
        # O_NONBLOCK: a FIFO that nobody reads is an error (ENXIO), not a wait.
        fd = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        os.set_blocking(fd, True)
    except OSError as error:
        raise from_os(f"cp to {os.fsdecode(to)}", error) from error
    try:
        _write(reader, fd)
    except OSError as error:
        raise from_os(f"cp to {os.fsdecode(to)}", error) from error
    finally:
        os.close(fd)
    return []
