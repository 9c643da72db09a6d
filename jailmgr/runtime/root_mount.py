"""A jail's root file system, mounted by the supervisor for the child that becomes init.

    supervisor, staging namespace              child, the jail's namespace
    image on /usr, volume on its workdir, idmapped
    overlay on /usr ──────── unshare(2) ────▶  a copy that nobody inside can take nodev from

An overlay mounted inside a user namespace takes `userxattr`, and that excludes `redirect_dir` and `metacopy`: rename(2)
of an image's directory fails with EXDEV, and chown(2) copies the content. So the supervisor mounts it, in the host's
user namespace. The kernel writes to the layers with the credentials that the mount was made with (overlayfs.rst,
"Permission model"): they are the jail's root by user id, since the layers have no other ids, with capabilities over the
host's file systems. CAP_SYS_RESOURCE is not among these, since no quota of ext4 and xfs binds who has it; nor is
CAP_MKNOD. The private attributes are `trusted.overlay.*`, which nobody in a user namespace can write.

The superblock belongs to the host, so only the mount's flag keeps device nodes dead. The kernel locks the flags of a
mount that is there when another user namespace copies its mount namespace (mount_namespaces(7)). So the root is mounted
in a namespace of the host's user namespace, the staging namespace, where the child begins and which it then copies.
Layers are named by path, since Linux before 6.15 takes none that are not mounted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from jailmgr.errors import JailmgrError
from jailmgr.runtime import capabilities, volume_format
from jailmgr.runtime import syscalls as kernel
from jailmgr.runtime.volume_format import UPPER, WORK

_OWN = "/proc/thread-self/ns/mnt"
STAGE = "/usr"
"""A directory of every host, which nobody looks into while a jail's root lies on it."""
WRITES_WITH = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_SETFCAP", "CAP_SYS_ADMIN",
)  # fmt: skip
"""Capabilities of what the kernel itself does in the layers; CAP_SYS_ADMIN is for trusted attributes."""
_OPTIONS: dict[str, str | None] = {
    "lowerdir": STAGE,
    "upperdir": UPPER,
    "workdir": WORK,
    "redirect_dir": "on",
    "metacopy": "on",
    "index": "off",  # a volume with an index could not be moved to another copy of its image
}


@contextmanager
def staging() -> Iterator[int]:
    """Move the caller, who has one thread, into a private copy of the host's mounts, and back (setns(2)).

    Yields an fd of that namespace, which is the caller's to close afterwards, when nobody waits: whoever lets go of a
    mount namespace last waits for a grace period of the kernel's RCU. The caller's working directory is the root
    afterwards. Raises OSError; what raises within has the fd closed.
    """
    host = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        kernel.unshare(kernel.CLONE_NEWNS)
        stage = -1
        try:
            stage = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
            kernel.mount_propagation(kernel.MS_PRIVATE)
            yield stage
        except BaseException:
            if stage >= 0:
                os.close(stage)
            raise
        finally:
            kernel.setns(host, kernel.CLONE_NEWNS)
    finally:
        os.close(host)


def mount(lower: str, volume: str, userns_fd: int, owner: int) -> None:
    """Mount a jail's root on `STAGE`: an overlay of image and volume, or the volume itself where `lower` is empty.

    Called in `staging`. `owner`: the host's id of the jail's root. Raises OSError, JailmgrError `full` where the kernel
    would mount it read-only, for lack of space.
    """
    place = os.open(STAGE, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if lower:
            _mount_layers(place, lower, volume, userns_fd)
            root = _writable(volume, owner)
        else:
            root = idmap(volume, userns_fd, read_only=False)
        _attach(root, place)
    finally:
        os.close(place)


def idmap(path: str, userns_fd: int, read_only: bool) -> int:
    """A detached mount of `path` whose owners, 0-based on disk, are mapped by the jail's user namespace.

    Called in the host's user namespace (mount_setattr(2), MOUNT_ATTR_IDMAP). A clone of a shared mount, as systemd
    makes all of a host's, would pass on what is mounted on it, and pivot_root(2) takes none.
    """
    fd = kernel.open_tree(path)
    try:
        attributes = kernel.MOUNT_ATTR_IDMAP | kernel.MOUNT_ATTR_NODEV | (kernel.MOUNT_ATTR_RDONLY if read_only else 0)
        kernel.mount_setattr(fd, attributes, kernel.MOUNT_ATTR_NOSUID, userns_fd, kernel.MS_PRIVATE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mount_layers(place: int, lower: str, volume: str, userns_fd: int) -> None:
    """Mount the image on `place`, and the volume where the host's is still in sight; change to the latter.

    So no path of the host's is among the options of the overlay, which the guest sees.
    """
    _attach(idmap(lower, userns_fd, read_only=True), place)
    there = os.open(f"{volume}/{WORK}", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _attach(idmap(volume, userns_fd, read_only=False), there)
    finally:
        os.close(there)
    os.chdir(f"{volume}/{WORK}")


def _writable(volume: str, owner: int) -> int:
    """A detached overlay; where that is read-only, tried again in the room that the volume's reserve takes."""
    root = _overlay(owner)
    if os.fstatvfs(root).f_flag & os.ST_RDONLY and volume_format.release_reserve(volume):
        os.close(root)
        root = _overlay(owner)
    if os.fstatvfs(root).f_flag & os.ST_RDONLY:
        os.close(root)
        why = "the kernel can write nothing to it: its quota is full, or the pool is"
        raise JailmgrError(f"volume {volume}", why, "Raise the jail's limits.disk, start it and remove files.", "full")
    volume_format.keep_reserve(volume)
    return root


def _overlay(owner: int) -> int:
    with capabilities.writing_as(owner, WRITES_WITH):
        return kernel.fsmount("overlay", _OPTIONS, kernel.MOUNT_ATTR_NODEV)


def _attach(mount_fd: int, place: int) -> None:
    """Attach a detached mount, and close its fd."""
    try:
        kernel.move_mount(mount_fd, place)
    finally:
        os.close(mount_fd)
