"""/run/host of a jail: what its manager shows of itself and of the host, and the socket on which init reports.

systemd's Container Interface, https://systemd.io/CONTAINER_INTERFACE; docs/container-interface.md has all of it. The
supervisor fills a ramfs, makes the file system itself read-only and hands its mount to the jail. The file system is
of the host's user namespace, so the guest's root can't make it writable again. A socket on a read-only file system
receives all the same (fs/namei.c, sb_permission). A ramfs is never swapped out, which credentials are not to be
(https://systemd.io/CREDENTIALS). Standard library only.
"""

from __future__ import annotations

import os
import socket
from binascii import a2b_base64
from typing import NamedTuple

from jailmgr.runtime import syscalls as kernel
from jailmgr.runtime.bundle import MANAGER, Bundle
from jailmgr.runtime.notify import refuse_fds
from jailmgr.runtime.plainfile import read_bytes

RUN_HOST = "/run/host"
_NOTIFY, _CREDENTIALS = "notify", "credentials"
_ATTRIBUTES = (
    kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV | kernel.MOUNT_ATTR_NOEXEC | kernel.MOUNT_ATTR_NOSYMFOLLOW
)
_OS_RELEASE = ("/etc/os-release", "/usr/lib/os-release")
_OS_RELEASE_MAX = 65536
_IDS = {b"ID", b"VERSION_ID", b"BUILD_ID", b"VARIANT_ID"}
"""Of os-release(5): those that the interface names."""


class RunHost(NamedTuple):
    """The detached mount, the receiving end of its socket, and what of it is in init's environment."""

    mount: int
    notify: int | None
    environment: dict[str, str]


def make_run_host(bundle: Bundle) -> RunHost:
    """Make the directory of a jail that starts. The fds are the caller's. Raises OSError."""
    os_release = _read_os_release()
    files = {"container-manager": f"{MANAGER}\n".encode(), "os-release": os_release}
    environment = _host_ids(os_release)
    if bundle.uuid:
        files["container-uuid"] = f"{bundle.uuid}\n".encode()
        environment["container_uuid"] = bundle.uuid
    sock = _make_socket() if bundle.notify else None

    def fill(mount: int) -> None:
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        try:
            os.fchmod(root, 0o755)
            os.fchown(root, bundle.idmap_base, bundle.idmap_base)
            for name, content in files.items():
                _write(root, name, content, 0o444, bundle.idmap_base)
            if bundle.credentials:
                _write_credentials(root, bundle)
            if sock is not None:
                _bind(sock, root, bundle.idmap_base)
        finally:
            os.close(root)

    try:
        mount = kernel.fsmount("ramfs", {}, _ATTRIBUTES, fill)
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    if bundle.credentials:
        environment["CREDENTIALS_DIRECTORY"] = f"{RUN_HOST}/{_CREDENTIALS}"
    if sock is not None:
        environment["NOTIFY_SOCKET"] = f"{RUN_HOST}/{_NOTIFY}"
    return RunHost(mount, None if sock is None else sock.detach(), environment)


def _write(root: int, name: str, content: bytes, mode: int, owner: int) -> None:
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode, dir_fd=root)
    try:
        while content:
            content = content[os.write(fd, content) :]
        os.fchmod(fd, mode)
        os.fchown(fd, owner, owner)
    finally:
        os.close(fd)


def _write_credentials(root: int, bundle: Bundle) -> None:
    """Modes as systemd-nspawn(1) has them; systemd-creds(1) calls any other mode of a file insecure."""
    os.mkdir(_CREDENTIALS, 0o500, dir_fd=root)
    place = os.open(_CREDENTIALS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        for name, content in bundle.credentials.items():
            _write(place, name, a2b_base64(content), 0o400, bundle.idmap_base)
        os.fchown(place, bundle.idmap_base, bundle.idmap_base)
    finally:
        os.close(place)


def _make_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    refuse_fds(sock)
    return sock


def _bind(sock: socket.socket, root: int, owner: int) -> None:
    """bind(2) takes no directory: /proc/self/fd has the detached mount's."""
    sock.bind(f"/proc/self/fd/{root}/{_NOTIFY}")
    os.chmod(_NOTIFY, 0o755, dir_fd=root)
    os.chown(_NOTIFY, owner, owner, dir_fd=root)


def _read_os_release() -> bytes:
    """The host's os-release(5); empty where it has none."""
    for path in _OS_RELEASE:
        try:
            return read_bytes(path)[:_OS_RELEASE_MAX]
        except OSError:
            continue
    return b""


def _host_ids(os_release: bytes) -> dict[str, str]:
    """container_host_id and so on, as systemd-nspawn(1) sets them."""
    found = {}
    for line in os_release.splitlines():
        key, is_pair, value = line.partition(b"=")
        if key in _IDS and is_pair:
            found[f"container_host_{key.decode().lower()}"] = os.fsdecode(value.strip(b"\"'"))
    return found
