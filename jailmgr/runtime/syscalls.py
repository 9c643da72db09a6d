"""The system calls Python 3.11 has no name for, by ctypes; constants carry the kernel's own names.

Each wrapper raises OSError with the call and its object as `filename`. Numbers from 424 on are the same on every
architecture (syscalls(2)); older ones stand in a table by machine.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_long, c_size_t, c_uint, c_ulong, c_void_p
from typing import Any

CLONE_NEWTIME = 0x00000080
CLONE_PARENT = 0x00008000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_INTO_CGROUP = 0x200000000
SIGCHLD = 17
WALL = 0x40000000
"""__WALL of waitid(2): children of any kind, and threads that are traced."""
PTRACE_DETACH = 17

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
FSCONFIG_CMD_RECONFIGURE = 7

MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
MOUNT_ATTR_ATIME = 0x70
"""The mask of all that is about access times, to be cleared when one of them is set."""
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_IDMAP = 0x00100000
MOUNT_ATTR_NOSYMFOLLOW = 0x00200000

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2

MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SHARED = 0x100000
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36

KEYCTL_JOIN_SESSION_KEYRING = 1
PIDFD_GET_INFO = 0xC040FF0B
PIDFD_INFO_EXIT = 1 << 3

_OLD = {
    "x86_64": {"clone": 56, "pivot_root": 155, "keyctl": 250, "bpf": 321},
    "aarch64": {"clone": 220, "pivot_root": 41, "keyctl": 219, "bpf": 280},
}
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 437, 442
_CLONE3, _CLOSE_RANGE, _QUOTACTL_FD = 435, 436, 443

NEEDED = {
    "clone3": _CLONE3, "close_range": _CLOSE_RANGE, "fsconfig": _FSCONFIG, "fsmount": _FSMOUNT, "fsopen": _FSOPEN,
    "mount_setattr": _MOUNT_SETATTR, "move_mount": _MOVE_MOUNT, "open_tree": _OPEN_TREE, "openat2": _OPENAT2,
    "pidfd_open": 434,
}  # fmt: skip
"""What a start calls that came with Linux 5.2 to 5.12, by its number."""

libc = ctypes.CDLL(None, use_errno=True)
_python = ctypes.PyDLL(None, use_errno=True)
"""Keeps the GIL over the call, so that a child made by clone() begins with it held."""


def number(name: str) -> int:
    """The number of an old system call on this machine; OSError ENOSYS on one that is not in the table."""
    machine = os.uname().machine
    if machine not in _OLD:
        raise OSError(errno.ENOSYS, f"no system call numbers for {machine}", name)
    return _OLD[machine][name]


def _check(result: int, call: str, thing: str = "") -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"{call} {thing}".rstrip())
    return result


def missing() -> list[str]:
    """Those of `NEEDED` that this kernel has not, or a filter takes away. Each is called in a way that does nothing."""
    bad_fd, nothing = c_long(-1), c_long(0)
    found = []
    for name, nr in NEEDED.items():
        first = nothing if name in ("clone3", "fsopen") else bad_fd
        libc.syscall(c_long(nr), first, nothing, nothing, nothing, nothing)
        if ctypes.get_errno() == errno.ENOSYS:
            found.append(name)
    return found


def _declare(function: str, *types: type[Any]) -> Callable[..., int]:
    """A function of libc with its types told, so that ctypes needs no object for each argument: a start makes some 300
    such calls. An entry of its own each time: `syscall` has other types for each system call.
    """
    found = libc[function]
    found.argtypes, found.restype = types, c_long if function == "syscall" else c_int
    return found


_open_tree = _declare("syscall", c_long, c_int, c_char_p, c_uint)
_move_mount = _declare("syscall", c_long, c_int, c_char_p, c_int, c_char_p, c_uint)
_fsopen = _declare("syscall", c_long, c_char_p, c_uint)
_fsconfig = _declare("syscall", c_long, c_int, c_uint, c_char_p, c_char_p, c_int)
_fsmount = _declare("syscall", c_long, c_int, c_uint, c_uint)
_mount_setattr = _declare("syscall", c_long, c_int, c_char_p, c_uint, c_void_p, c_size_t)
_openat2 = _declare("syscall", c_long, c_int, c_char_p, c_void_p, c_size_t)
_close_range = _declare("syscall", c_long, c_uint, c_uint, c_uint)
_quotactl_fd = _declare("syscall", c_long, c_int, c_uint, c_uint, c_void_p)
_pivot_root = _declare("syscall", c_long, c_char_p, c_char_p)
_bpf = _declare("syscall", c_long, c_int, c_char_p, c_uint)
_keyctl = _declare("syscall", c_long, c_int, c_void_p)
_ptrace = _declare("ptrace", c_long, c_int, c_void_p, c_void_p)
_prctl = _declare("prctl", c_int, c_ulong, c_ulong, c_ulong, c_ulong)
_set_name = _declare("prctl", c_int, c_char_p)
_renameat2 = _declare("renameat2", c_int, c_char_p, c_int, c_char_p, c_uint)


def clone(flags: int) -> int:
    """fork(2) with flags: the child's pid in the parent, 0 in the child. The caller has one thread."""
    zero = c_long(0)
    pid = _python.syscall(c_long(number("clone")), c_long(flags | SIGCHLD), zero, zero, zero, zero)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    return _check(int(pid), "clone")


class _CloneArgs(ctypes.Structure):
    """struct clone_args, linux/sched.h (CLONE_ARGS_SIZE_VER2)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls", "set_tid",
            "set_tid_size", "cgroup",
        )
    )  # fmt: skip


def fork_into(cgroup_fd: int | None, namespaces: int = 0) -> int:
    """fork(2) with the child born in the v2 group whose directory that is, and in new `namespaces` (clone3(2)).

    Much cheaper than moving it there, which waits for all of the host's processes. None: the caller's group.
    """
    if cgroup_fd is None and not namespaces:
        return os.fork()
    args = _CloneArgs(flags=namespaces, exit_signal=SIGCHLD)
    if cgroup_fd is not None:
        args.flags |= CLONE_INTO_CGROUP
        args.cgroup = cgroup_fd
    pid = _python.syscall(c_long(_CLONE3), ctypes.byref(args), c_long(ctypes.sizeof(args)))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    return _check(int(pid), "clone3")


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(libc.unshare(flags), "unshare", hex(flags))


def setns(fd: int, flags: int) -> None:
    """setns(2); `fd` may be a pidfd (Linux 5.8)."""
    _check(libc.setns(fd, flags), "setns", hex(flags))


def prctl(option: int, value: int, *more: int) -> int:
    """prctl(2) with up to four arguments; those left out are 0, some options insist on it."""
    padded = (value, *more, 0, 0, 0)[:4]
    return _check(_prctl(option, *padded), "prctl", str(option))


def set_name(name: str) -> None:
    """The process's name as ps shows it, 15 bytes (PR_SET_NAME)."""
    _set_name(PR_SET_NAME, name.encode()[:15])


def find_arguments() -> tuple[int, int]:
    """Where this process's command line is in its memory: first byte and length (proc_pid_stat(5), arg_start)."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[45]), int(fields[46]) - int(fields[45])


def hide_arguments(where: tuple[int, int], name: bytes) -> None:
    """Replace the command line that others see in /proc by `name`."""
    start, length = where
    ctypes.memset(start, 0, length)
    ctypes.memmove(start, name, min(len(name), length - 1))


def sethostname(name: str) -> None:
    """sethostname(2)."""
    raw = name.encode()
    _check(libc.sethostname(raw, len(raw)), "sethostname", name)


def join_new_keyring() -> None:
    """A session keyring of its own, so that the caller's isn't inherited (keyctl(2)); without keyrings, nothing."""
    try:
        _check(_keyctl(number("keyctl"), KEYCTL_JOIN_SESSION_KEYRING, None), "keyctl")
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EDQUOT):
            raise


def mount_propagation(kind: int) -> None:
    """Change the propagation type of all mounts in this namespace (mount(2)): to MS_PRIVATE or MS_SHARED.

    Private mounts neither receive mounts that are made in other namespaces nor pass on their own.
    """
    _check(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | kind), None), "mount", f"/ rec {kind:#x}")


def umount(path: str, flags: int) -> None:
    """umount2(2)."""
    _check(libc.umount2(os.fsencode(path), flags), "umount2", path)


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    _check(_pivot_root(number("pivot_root"), os.fsencode(new), os.fsencode(old)), "pivot_root")


def open_tree(path: str, dir_fd: int = AT_FDCWD, flags: int = 0) -> int:
    """A detached copy of the mount at `path` (open_tree(2), OPEN_TREE_CLONE)."""
    flags |= OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
    return _check(_open_tree(_OPEN_TREE, dir_fd, os.fsencode(path), flags), "open_tree", path)


def move_mount(mount_fd: int, target_fd: int, path: str = "") -> None:
    """Attach a detached mount to what `target_fd` (and `path` below it) is (move_mount(2))."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if path else MOVE_MOUNT_T_EMPTY_PATH)
    _check(_move_mount(_MOVE_MOUNT, mount_fd, b"", target_fd, os.fsencode(path), flags), "move_mount", path)


class _MountAttr(ctypes.Structure):
    """struct mount_attr, linux/mount.h."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount_setattr(fd: int, set_: int = 0, clear: int = 0, userns_fd: int = 0, propagation: int = 0) -> None:
    """Change attributes of the mount `fd` is (mount_setattr(2)); with MOUNT_ATTR_IDMAP, map it by `userns_fd`.

    `propagation`: MS_PRIVATE or its like; 0 leaves it as it is.
    """
    attr = _MountAttr(set_, clear, propagation, userns_fd)
    size = ctypes.sizeof(attr)
    pointer = ctypes.addressof(attr)
    _check(_mount_setattr(_MOUNT_SETATTR, fd, b"", AT_EMPTY_PATH, pointer, size), "mount_setattr")


def fsmount(
    kind: str, options: dict[str, str | None], attributes: int = 0, fill: Callable[[int], None] | None = None
) -> int:
    """A new detached mount of file system `kind` (fsopen(2), fsconfig(2), fsmount(2)); an option of None is a flag.

    `fill` puts files into the mount, and then the file system itself becomes read-only: only root of the user namespace
    that it was made in can undo that.
    """
    fs = _check(_fsopen(_FSOPEN, kind.encode(), FSOPEN_CLOEXEC), "fsopen", kind)
    try:
        for key, value in options.items():
            command = FSCONFIG_SET_FLAG if value is None else FSCONFIG_SET_STRING
            raw = None if value is None else os.fsencode(value)
            _check(_fsconfig(_FSCONFIG, fs, command, key.encode(), raw, 0), "fsconfig", f"{kind} {key}={value}")
        _check(_fsconfig(_FSCONFIG, fs, FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig", kind)
        made = _check(_fsmount(_FSMOUNT, fs, FSMOUNT_CLOEXEC, attributes), "fsmount", kind)
        if fill is None:
            return made
        try:
            fill(made)
            _check(_fsconfig(_FSCONFIG, fs, FSCONFIG_SET_FLAG, b"ro", None, 0), "fsconfig", f"{kind} ro")
            _check(_fsconfig(_FSCONFIG, fs, FSCONFIG_CMD_RECONFIGURE, None, None, 0), "fsconfig", kind)
        except BaseException:
            os.close(made)
            raise
        return made
    finally:
        os.close(fs)


class _OpenHow(ctypes.Structure):
    """struct open_how, linux/openat2.h."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(dir_fd: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2); close-on-exec always."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    size = ctypes.sizeof(how)
    return _check(_openat2(_OPENAT2, dir_fd, os.fsencode(path), ctypes.addressof(how), size), "openat2", path)


def renameat2(source: str, target: str, flags: int) -> None:
    """renameat2(2) of two paths: RENAME_NOREPLACE raises FileExistsError, RENAME_EXCHANGE swaps both."""
    done = _renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags)
    _check(done, "renameat2", f"{source} {target}")


def close_all_but(*keep: int) -> None:
    """Close every fd above 2 that isn't named (close_range(2))."""
    first = 3
    for fd in sorted({*keep, 1 << 31}):
        if fd > first:
            _check(_close_range(_CLOSE_RANGE, first, min(fd - 1, (1 << 31) - 1), 0), "close_range")
        first = max(first, fd + 1)


def bpf(command: int, attributes: bytes) -> int:
    """bpf(2): `attributes` is the part of union bpf_attr that the command reads."""
    return _check(_bpf(number("bpf"), command, attributes, len(attributes)), "bpf", str(command))


def quotactl_fd(fd: int, command: int, number: int, argument: int) -> None:
    """quotactl(2) on the file system of `fd` (Linux 5.14); `argument` is the address of the command's structure."""
    _check(_quotactl_fd(_QUOTACTL_FD, fd, command, number, argument), "quotactl_fd", str(number))


def detach_tracee(pid: int, signal_number: int) -> None:
    """Let go of a process that made us its tracer and has stopped, with a signal or 0 (ptrace(2)); fine if it ended."""
    try:
        _check(_ptrace(PTRACE_DETACH, pid, None, signal_number), "ptrace", str(pid))
    except ProcessLookupError:
        return


class _PidfdInfo(ctypes.Structure):
    """The first 64 bytes of struct pidfd_info (linux/pidfd.h, PIDFD_INFO_SIZE_VER0)."""

    _fields_ = (
        ("mask", ctypes.c_uint64),
        ("cgroupid", ctypes.c_uint64),
        ("ids", ctypes.c_uint32 * 11),
        ("exit_code", ctypes.c_int32),
    )


def pidfd_exit_status(pidfd: int) -> int | None:
    """The wait status of a process that has ended and isn't our child (PIDFD_GET_INFO, Linux 6.15), else None."""
    info = _PidfdInfo(mask=PIDFD_INFO_EXIT)
    if libc.ioctl(pidfd, ctypes.c_ulong(PIDFD_GET_INFO), ctypes.byref(info)) < 0 or not info.mask & PIDFD_INFO_EXIT:
        return None
    return int(info.exit_code)
