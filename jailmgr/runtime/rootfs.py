"""A jail's mounts, made from within its user and mount namespace: kernel file systems, devices, masks.

Runs in the child that becomes init, with the host's root still in sight. All mounts are made detached and attached
by fd, so that no path in the jail's (untrusted) tree is ever followed out of it.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from jailmgr.errors import JailmgrError
from jailmgr.runtime import lxcfs, protocol
from jailmgr.runtime import syscalls as kernel
from jailmgr.runtime.bundle import DEVICES, UNCOVERED, Bundle, Mount
from jailmgr.runtime.devices import Node
from jailmgr.runtime.pty import Pty, open_pty
from jailmgr.runtime.root_mount import STAGE

_ATTRIBUTES = {
    "ro": kernel.MOUNT_ATTR_RDONLY,
    "nosuid": kernel.MOUNT_ATTR_NOSUID,
    "nodev": kernel.MOUNT_ATTR_NODEV,
    "noexec": kernel.MOUNT_ATTR_NOEXEC,
}
_INSIDE = kernel.RESOLVE_IN_ROOT | kernel.RESOLVE_NO_MAGICLINKS
_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}


def assemble() -> tuple[int, int]:
    """Take the root file system that the supervisor has mounted (root_mount.py), attached out of everyone's way.

    Returns its O_PATH fd, and the fd of the small tmpfs that it is attached in. The tmpfs is mounted on a directory of
    the host's (of this mount namespace) that is not looked into any more, and goes with it. The root itself can't be
    moved: what another user namespace has mounted is locked in its place (mount_namespaces(7)). Its clone can.
    """
    mounted = kernel.open_tree(STAGE)
    scratch = kernel.fsmount(
        "tmpfs", {"mode": "755", "size": "64k"}, kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV
    )
    out_of_the_way = os.open(STAGE, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    kernel.move_mount(scratch, out_of_the_way)
    os.close(out_of_the_way)
    os.mkdir("root", 0o700, dir_fd=scratch)
    kernel.move_mount(mounted, scratch, "root")
    os.close(mounted)
    root = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=scratch)
    return root, scratch


class Nodes(NamedTuple):
    """Device nodes to bind: devices.make's mount, and what it was made of."""

    folder: int
    nodes: list[Node]


def populate(root: int, scratch: int, bundle: Bundle, made: Nodes | None, limits_view: int | None) -> None:
    """Kernel file systems, devices and masks, as the bundle lists them. `scratch`: `assemble`'s, closed at the end.

    `made` is closed too, and `limits_view`, lxcfs.open_whole's.
    """
    for mount in bundle.mounts:
        _mount(root, mount)
    if any(mount.target == "/dev" for mount in bundle.mounts):
        _devices(root)
    if made is not None:
        _bind_nodes(root, scratch, made)
    _new_boot_id(root, scratch)
    if limits_view is not None:
        _show_limits(root, scratch, limits_view, lxcfs.files_of(bundle))
    _make_empty(scratch)
    for path in bundle.masked:
        _mask(root, scratch, path.lstrip("/"))
    os.close(scratch)
    for path in bundle.readonly:
        _read_only(root, path.lstrip("/"))


def open_console(root: int) -> Pty:
    """A pty of the jail's own devpts, its slave on /dev/console as well."""
    pty = open_pty("dev/pts/ptmx", root)
    # By its fd: a path goes by the links of the jail's tree, and they lead to the host's terminals from here.
    slave = kernel.open_tree("", pty.slave, kernel.AT_EMPTY_PATH)
    with_file = _touch(root, "dev/console")
    kernel.move_mount(slave, with_file)
    os.close(with_file)
    os.close(slave)
    return pty


def attach(root: int, mount: int, path: str) -> None:
    """Attach a detached mount, which is closed, at a directory that is made where it is missing."""
    target = _directory(root, path.lstrip("/"))
    kernel.move_mount(mount, target)
    os.close(target)
    os.close(mount)


def enter(root: int) -> None:
    """Make it the root, and let go of the host's (pivot_root(2), the "." form).

    The host's lies on it then, and goes with all that is mounted in it. setns(2) enters at the topmost mount, so
    JailmgrError unless that is the jail's own. All mounts of the jail are shared at the end: systemd in a container
    expects it of its manager, and mounts credentials, extensions and homes in a process with a slave of the tree.
    Each is the only one of its peer group (mount_namespaces(7)), for it was private before, and the host's are gone.
    """
    os.fchdir(root)
    kernel.pivot_root(".", ".")
    kernel.umount(".", kernel.MNT_DETACH)
    os.chdir("/")
    if not os.path.samestat(os.stat("/.."), os.fstat(root)):
        raise JailmgrError("start", "another mount lies on the jail's root")
    kernel.mount_propagation(kernel.MS_SHARED)


def _directory(root: int, path: str) -> int:
    """O_PATH fd of a directory in the jail's tree, made where it is missing."""
    flags = os.O_PATH | os.O_DIRECTORY
    if not path:
        return os.dup(root)
    try:
        return kernel.openat2(root, path, flags, _INSIDE)
    except FileNotFoundError:
        parent = _directory(root, os.path.dirname(path))
        try:
            os.mkdir(os.path.basename(path), 0o700 if f"/{path}" == UNCOVERED else 0o755, dir_fd=parent)
        finally:
            os.close(parent)
        return kernel.openat2(root, path, flags, _INSIDE)


def _touch(root: int, path: str) -> int:
    """O_PATH fd of a new, empty file."""
    os.close(kernel.openat2(root, path, os.O_CREAT | os.O_WRONLY, _INSIDE, 0o600))
    return kernel.openat2(root, path, os.O_PATH, _INSIDE)


def _mount(root: int, mount: Mount) -> None:
    attributes, options = 0, dict[str, str | None]()
    for option in mount.options:
        if option in _ATTRIBUTES:
            attributes |= _ATTRIBUTES[option]
        else:
            key, is_pair, value = option.partition("=")
            options[key] = value if is_pair else None
    target = _directory(root, mount.target.lstrip("/"))
    made = kernel.fsmount(mount.kind, options, attributes)
    kernel.move_mount(made, target)
    os.close(target)
    os.close(made)


def _devices(root: int) -> None:
    """Bind the host's nodes in the jail's new /dev, which nobody else can write to yet: a name there is no link."""
    dev = _directory(root, "dev")
    for name in DEVICES:
        node = kernel.open_tree(f"/dev/{name}")
        os.mknod(name, stat.S_IFREG | 0o600, dir_fd=dev)
        kernel.move_mount(node, dev, name)
        os.close(node)
    for link, target_path in _LINKS.items():
        os.symlink(target_path, link, dir_fd=dev)
    os.close(dev)


def _bind_nodes(root: int, scratch: int, made: Nodes) -> None:
    """The whole goes where nobody sees it, for only what is mounted here can be cloned in part."""
    os.mkdir("devices", 0o700, dir_fd=scratch)
    kernel.move_mount(made.folder, scratch, "devices")
    os.close(made.folder)
    for place, node in enumerate(made.nodes):
        try:
            cover = kernel.open_tree(f"devices/{place}", scratch)
        except FileNotFoundError:
            continue  # it could not be made, and is not required
        path = node.path.lstrip("/")
        os.close(_directory(root, os.path.dirname(path)))
        target = _touch(root, path)
        kernel.move_mount(cover, target)
        protocol.close_all([cover, target])


def _new_boot_id(root: int, scratch: int) -> None:
    """A boot id of the jail's own, so that its journal tells one boot from another (as systemd-nspawn does)."""
    fd = os.open("boot_id", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444, dir_fd=scratch)
    with open("/proc/sys/kernel/random/uuid", "rb", buffering=0) as random:
        os.write(fd, random.read(64))
    os.close(fd)
    _cover(kernel.openat2(root, "proc/sys/kernel/random/boot_id", os.O_PATH, _INSIDE), "boot_id", scratch)


def _show_limits(root: int, scratch: int, limits_view: int, paths: tuple[str, ...]) -> None:
    """The whole of lxcfs goes where nobody sees it, for only what is mounted here can be cloned in part."""
    os.mkdir("lxcfs", 0o700, dir_fd=scratch)
    kernel.move_mount(limits_view, scratch, "lxcfs")
    os.close(limits_view)
    for path in paths:
        cover, target = lxcfs.clone_file(path, scratch, "lxcfs"), _find(root, path)
        if cover is not None and target is not None:
            kernel.move_mount(cover, target)
        protocol.close_all([fd for fd in (cover, target) if fd is not None])


def _make_empty(scratch: int) -> None:
    """Make the read-only directory that masks are clones of; a clone keeps its flags."""
    os.mkdir("empty", 0o755, dir_fd=scratch)
    empty = kernel.open_tree("empty", scratch)
    kernel.mount_setattr(empty, kernel.MOUNT_ATTR_RDONLY)
    kernel.move_mount(empty, scratch, "empty")
    os.close(empty)


def _mask(root: int, scratch: int, path: str) -> None:
    target = _find(root, path)
    if target is None:
        return
    folder = stat.S_ISDIR(os.fstat(target).st_mode)
    cover = kernel.open_tree("empty", scratch) if folder else kernel.open_tree("/dev/null")
    kernel.move_mount(cover, target)
    os.close(cover)
    os.close(target)


def _read_only(root: int, path: str) -> None:
    target = _find(root, path)
    if target is not None:
        _cover(target, "", target)


def _find(root: int, path: str) -> int | None:
    try:
        return kernel.openat2(root, path, os.O_PATH, _INSIDE)
    except FileNotFoundError:
        return None


def _cover(target: int, path: str, dir_fd: int) -> None:
    """Mount what is at `path` read-only on `target`, which is closed."""
    cover = kernel.open_tree(path, dir_fd, 0 if path else kernel.AT_EMPTY_PATH)
    kernel.mount_setattr(cover, kernel.MOUNT_ATTR_RDONLY)
    kernel.move_mount(cover, target)
    os.close(cover)
    os.close(target)
