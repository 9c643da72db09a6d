"""Ptys of a jail's own devpts: never one of the host's (pty(7), ioctl_tty(2))."""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import termios
from typing import NamedTuple

from jailmgr.errors import JailmgrError
from jailmgr.runtime import syscalls as kernel

TIOCGPTN = 0x80045430
TIOCSPTLCK = 0x40045431
TIOCGPTPEER = 0x5441
_DEVPTS_MAGIC = 0x1CD1
_PTMX = os.makedev(5, 2)


class Pty(NamedTuple):
    master: int
    slave: int
    number: int


def open_pty(ptmx: str, dir_fd: int = kernel.AT_FDCWD) -> Pty:
    """Open a pair at `ptmx`, which the guest may have put there: JailmgrError when it isn't a devpts' own."""
    master = kernel.openat2(
        dir_fd, ptmx, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK, kernel.RESOLVE_IN_ROOT | kernel.RESOLVE_NO_MAGICLINKS
    )
    try:
        check_master(master)
        fcntl.ioctl(master, TIOCSPTLCK, b"\0\0\0\0")
        number = int.from_bytes(fcntl.ioctl(master, TIOCGPTN, b"\0\0\0\0"), "little")
        slave = fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except BaseException:
        os.close(master)
        raise
    return Pty(master, slave, number)


def check_master(fd: int) -> None:
    """Whether an fd that came out of a jail is a pty's master and nothing else; JailmgrError when not."""
    status = os.fstat(fd)
    if not (stat.S_ISCHR(status.st_mode) and status.st_rdev == _PTMX and fs_type(fd) == _DEVPTS_MAGIC):
        raise JailmgrError("terminal", "what the jail has at /dev/pts/ptmx is not its devpts")


def fs_type(fd: int) -> int:
    """f_type of fstatfs(2), the first long of struct statfs."""
    buffer = ctypes.create_string_buffer(512)
    if kernel.libc.fstatfs(fd, buffer) < 0:
        return 0
    return ctypes.c_long.from_buffer(buffer).value


def make_controlling(slave: int) -> None:
    """A session of its own with the terminal as its controlling one and on fds 0 to 2."""
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2):
        os.dup2(slave, fd)
    if slave > 2:
        os.close(slave)
