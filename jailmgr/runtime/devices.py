"""Device nodes of a jail's own for devices of the host: looked up as it starts, made, and the rules of its cgroup.

mknod(2) needs CAP_MKNOD of the host's user namespace, and a file system that was mounted in the jail's has no device
nodes that work. So the supervisor makes the nodes, in a small detached tmpfs. The child that becomes init binds them
below the jail's /dev (runtime/rootfs.py). The nodes belong to the jail's ids and have modes of their own: the host's
nodes are not touched. The tmpfs has no name on the host, and goes with the last fd or mount of it. Standard library
only.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from typing import Any, NamedTuple

from jailmgr.errors import JailmgrError
from jailmgr.runtime import syscalls as kernel

_FORMATS = {"b": stat.S_IFBLK, "c": stat.S_IFCHR}


class Device(NamedTuple):
    """A device that a jail is to have."""

    path: str
    """In the jail, below /dev."""
    kind: str
    """`c` or `b`, as in OCI's config-linux.md ("Devices")."""
    source: str
    """Of the host's device."""
    numbers: tuple[int, int] | None = None
    """Major and minor; None: those that `source` has as the jail starts."""
    uid: int = 0
    """Owner in the jail."""
    gid: int = 0
    mode: int = 0o660
    required: bool = True
    """Without it the jail does not start."""


class Node(NamedTuple):
    """A device that was found."""

    path: str
    kind: str
    major: int
    minor: int
    uid: int
    gid: int
    mode: int
    required: bool


DEFAULT = (
    Device("/dev/net/tun", "c", "/dev/net/tun", mode=0o666, required=False),
    Device("/dev/fuse", "c", "/dev/fuse", mode=0o666, required=False),
)
"""Devices that every jail has where the host has them. Their drivers ask for rights over the jail's own network
namespace (tun.rst, TUNSETIFF) and mount namespace (fuse.rst, "Unprivileged fuse mounts"), and let nothing else be done.
"""


def parse(entries: Iterable[dict[str, Any]]) -> list[Device]:
    """The devices of a config.json. Raises TypeError on what is none."""
    found = [Device(**entry) for entry in entries]
    return [
        each._replace(numbers=None if each.numbers is None else (each.numbers[0], each.numbers[1])) for each in found
    ]


def look_up(device: Device) -> tuple[int, int] | None:
    """Major and minor of a device; None where the host has none at `source`.

    Raises JailmgrError `invalid` where `source` is something else than a device of this kind.
    """
    if device.numbers is not None:
        return device.numbers
    try:
        status = os.stat(device.source)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_IFMT(status.st_mode) != _FORMATS[device.kind]:
        wanted, other = ("block", "char") if device.kind == "b" else ("char", "block")
        is_other = stat.S_IFMT(status.st_mode) in _FORMATS.values()
        why = f"it is a {other} device of the host" if is_other else f"it is not a {wanted} device"
        hint = f"Its type is unix-{other}." if is_other else "Name a device of the host."
        raise JailmgrError(f"device {device.source}", why, hint, "invalid")
    return os.major(status.st_rdev), os.minor(status.st_rdev)


def missing(device: Device) -> JailmgrError:
    """The error of a device that is required, and that the host has not."""
    hint = "Plug it in, load its driver, or set required=false."
    return JailmgrError(f"device {device.source}", "not found on the host", hint, "missing")


def find(devices: Iterable[Device]) -> list[Node]:
    """The nodes to make. A later device takes the place of an earlier one of the same path.

    Raises JailmgrError: `missing` where the host lacks a required device, `invalid` as `look_up`.
    """
    found: dict[str, Node] = {}
    for device in devices:
        numbers = look_up(device)
        if numbers is None and device.required:
            raise missing(device)
        found.pop(device.path, None)
        if numbers is not None:
            found[device.path] = Node(
                device.path, device.kind, *numbers, device.uid, device.gid, device.mode, device.required
            )
    return list(found.values())


def rules(nodes: Iterable[Node]) -> list[dict[str, Any]]:
    """OCI `linux.resources.devices` that allow these nodes' devices and no others."""
    return [
        {"allow": True, "type": node.kind, "major": node.major, "minor": node.minor, "access": "rwm"} for node in nodes
    ]


def make(nodes: list[Node], base: int, size: int) -> int:
    """A detached tmpfs that has the nodes by their places in the list, owned by the jail's ids. The caller closes it.

    `base`, `size`: host uid and gid of the jail's root, and the number of its ids. A node that is not required is left
    out where this process may not make it (in a container of somebody else's). Raises JailmgrError, OSError.
    """
    attributes = kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NOEXEC
    # tmpfs counts an inode for its root; size is rounded up to a page.
    made = kernel.fsmount("tmpfs", {"mode": "755", "size": "4k", "nr_inodes": str(len(nodes) + 2)}, attributes)
    try:
        for place, node in enumerate(nodes):
            if max(node.uid, node.gid) >= size:
                why = f"its owner {node.uid}:{node.gid} is none of the jail's ids, which are 0 to {size - 1}"
                raise JailmgrError(f"device {node.path}", why, "Set another uid and gid.", "invalid")
            _make(made, str(place), node, base)
    except BaseException:
        os.close(made)
        raise
    return made


def _make(folder: int, name: str, node: Node, base: int) -> None:
    try:
        os.mknod(name, _FORMATS[node.kind] | 0o600, os.makedev(node.major, node.minor), dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES) or node.required:
            raise
        return
    os.chown(name, base + node.uid, base + node.gid, dir_fd=folder, follow_symlinks=False)
    os.chmod(name, node.mode, dir_fd=folder)
