"""FUSE connections of a jail, aborted as the jail is killed.

A process that waits for a FUSE server outlives SIGKILL once the server has read its request (fs/fuse/dev.c,
request_wait_answer). Where the server's own thread waits, or two servers wait for each other, no kill ends either. The
way out is the `abort` file of the connection (fuse.rst, "Aborting a filesystem connection"). Its file system, fusectl,
shows the connections of all user namespaces, each owned by the host uid that mounted it (fs/fuse/control.c), which
for a guest is one of its jail's ids. Standard library only.
"""

from __future__ import annotations

import os

from jailmgr.runtime import syscalls as kernel

CONTROL = "/sys/fs/fuse/connections"
"""There once the kernel has FUSE (fs/fuse/inode.c); fusectl need not be mounted on it."""


def abort(base: int, size: int) -> int:
    """Abort every connection whose owner is a host uid from `base` on, of `size` uids; how many there were.

    Never waits. Each request that waits ends with ECONNABORTED, each later one with ENOTCONN. Raises OSError, and
    ValueError where uid 0 is among the owners: its connections are the host's own, lxcfs for one.
    """
    if base <= 0:
        raise ValueError(f"uids from {base} on are not a jail's")
    if not os.path.isdir(CONTROL):
        return 0
    mount = kernel.fsmount("fusectl", {})
    try:
        control = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        try:
            return sum(_abort(control, name, base, size) for name in os.listdir(control))
        finally:
            os.close(control)
    finally:
        os.close(mount)


def _abort(control: int, name: str, base: int, size: int) -> bool:
    try:
        if not base <= os.stat(name, dir_fd=control).st_uid < base + size:
            return False
        file = os.open(f"{name}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=control)
    except FileNotFoundError:
        return False  # unmounted meanwhile
    try:
        os.write(file, b"1")
    finally:
        os.close(file)
    return True
