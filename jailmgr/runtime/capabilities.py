"""The capabilities of a jail's root, and giving up the others (capabilities(7)). Standard library only.

All of them count in the jail's own user namespace only. The bounding set is what a program there takes for granted:
units with ConditionCapability= for one that could not be used anyway are skipped by systemd, and do not fail.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from jailmgr.errors import JailmgrError
from jailmgr.runtime.syscalls import libc, prctl

NAMES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
    "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip
"""By number (linux/capability.h)."""

_DROPPED = (
    "CAP_SYS_MODULE",  # tracefs and modules-load units are skipped
    "CAP_SYS_RAWIO",  # debugfs, /dev/mem
    "CAP_SYS_TIME",  # the clock is the host's: time synchronisation is skipped
    "CAP_SYS_PACCT",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",  # the kernel's log is the host's
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",  # the audit stream is the host's: journald does not try it
    "CAP_PERFMON",
    "CAP_BPF",
)

BOUNDING: tuple[str, ...] = tuple(name for name in NAMES if name not in _DROPPED)
"""A system container's: what systemd-nspawn leaves, CAP_IPC_LOCK and CAP_CHECKPOINT_RESTORE. CAP_SYS_BOOT stays, for
without it a reboot can't be told from a poweroff."""

_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    """struct __user_cap_header_struct, linux/capability.h."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    """struct __user_cap_data_struct; two of them hold 64 capabilities."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_Both = _Data * 2


def _call(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def permitted() -> int:
    """The caller's permitted set, a bit per capability (capget(2)). Raises OSError."""
    data = _Both()
    _call(libc.capget(ctypes.byref(_Header(_VERSION_3, 0)), data), "capget")
    return int(data[0].permitted) | int(data[1].permitted) << 32


def _set(bits: int, effective: int | None = None) -> None:
    """Set the permitted set and the effective one, which is the same unless `effective` is given (capset(2)).

    Nothing is inheritable, so no ambient one is left either.
    """
    most, words = 0xFFFFFFFF, (bits if effective is None else effective, bits)
    data = _Both(_Data(*(word & most for word in words), 0), _Data(*(word >> 32 for word in words), 0))
    _call(libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), data), "capset")


def mask(names: list[str] | tuple[str, ...]) -> int:
    """A bit for each OCI name; JailmgrError `invalid` for one that is none."""
    bits = 0
    for name in names:
        if name not in NAMES:
            raise JailmgrError(f"capability {name}", "there is none of that name", "See capabilities(7).", "invalid")
        bits |= 1 << NAMES.index(name)
    return bits


def drop(keep: list[str] | tuple[str, ...]) -> None:
    """Give up all capabilities but `keep`, for the caller and for all it will exec: bounding, permitted, effective,
    inheritable and ambient sets. One that isn't there to keep is no error. Raises OSError, JailmgrError.

    Capabilities newer than `NAMES` go too: the kernel says by EINVAL where its own list ends.
    """
    bits, number = mask(keep), 0
    while bits >> number & 1 or _dropped(number) or number < len(NAMES):
        number += 1
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _set(bits & permitted())


def _dropped(number: int) -> bool:
    """Drop a capability from the bounding set; whether the kernel has one of that number."""
    try:
        prctl(_PR_CAPBSET_DROP, number)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


@contextmanager
def writing_as(owner: int, keep: tuple[str, ...]) -> Iterator[None]:
    """Use `owner` as user and group id for files, and only `keep` as effective capabilities, for a while (setfsuid(2)).

    Real, effective and saved ids stay root's. The permitted set stays as it was, so that all can be put back. Raises
    OSError, JailmgrError.
    """
    bits = permitted()
    try:
        libc.setfsgid(owner)
        libc.setfsuid(owner)
        _set(bits, mask(keep) & bits)
        yield
    finally:
        libc.setfsuid(0)
        libc.setfsgid(0)
        _set(bits)


@contextmanager
def effective_uid(uid: int) -> Iterator[None]:
    """Root with another effective uid and gid for a while, and all capabilities in effect (capabilities(7), "Effect of
    user ID changes"): a user namespace made meanwhile is `uid`'s. The real and the saved uid stay root's, so that
    nobody else may signal or trace the caller. Raises OSError.
    """
    bits = permitted()
    try:
        os.setegid(uid)
        os.seteuid(uid)
        _set(bits)
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
