"""What a jail sees of memory, CPUs, load, swap and disks: files of an lxcfs(1) over those of its /proc and /sys.

One lxcfs serves all jails of an instance (manager/lxcfs.py). It tells who reads what holds for that process's cgroup
and those above it. In the jail they are mounts like any other, which guest root may take away. Where there is no lxcfs,
or a dead one, a jail has what the kernel shows.

Two files of lxcfs stay out, since a jail has a time namespace. The kernel's `uptime` is right there. lxcfs' `stat` has
the host's `btime`, while the start times in /proc/PID/stat count from the jail's boot: ps(1) adds the two, and every
process would seem to have begun with the host.

lxcfs dies: `renew` puts the files of the next one in the place of those that answer ENOTCONN now.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from functools import partial
from time import monotonic
from typing import Any

from jailmgr.runtime import process
from jailmgr.runtime import syscalls as kernel
from jailmgr.runtime.bundle import Bundle
from jailmgr.runtime.cgroups import Hierarchies, members
from jailmgr.runtime.pty import fs_type

FILES = ("proc/cpuinfo", "proc/diskstats", "proc/loadavg", "proc/meminfo", "proc/swaps")
"""Paths below the mount point of lxcfs, and below a jail's root."""
ONLINE = "sys/devices/system/cpu/online"
"""Only for jails with fewer CPUs than the host: glibc's sysconf(_SC_NPROCESSORS_ONLN) counts the CPUs in this list. All
jails share its inode, and a copy by way of the page cache, as busybox' cat makes it, ends at the length that was read
last. read(2) does not.
"""
_RETIRED = ("proc/stat",)
"""Files of jails that run since an earlier release: the kernel's come back where lxcfs' are dead."""
RENEW_SECONDS, JAIL_SECONDS = 2.0, 0.05
"""How long the jails of a tenant may take for it, and each one more: it is some milliseconds, unless a guest is up to
something.
"""

_ATTRIBUTES = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV | kernel.MOUNT_ATTR_NOEXEC
_MAGIC = {"proc": 0x9FA0, "sys": 0x62656572}
"""File system types of /proc and /sys (statfs(2))."""
_BENEATH = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS
_LAYERS_MAX = 8
_NAMESPACES_MAX = 128


def files_of(bundle: Bundle) -> tuple[str, ...]:
    """The paths that a jail is given."""
    return (*FILES, ONLINE) if bundle.limits.cpus is not None else FILES


def open_whole(directory: str) -> int | None:
    """A detached, read-only mount of all that is mounted at `directory`; None where there is nothing.

    It asks lxcfs for nothing, which may be dead.
    """
    if not directory:
        return None
    try:
        return _detached(directory)
    except OSError:
        return None


def open_file(path: str, below: str) -> int | None:
    """A detached mount of one of `files_of`, of the lxcfs mounted at `below`; None where that has none, or is dead."""
    try:
        return _detached(f"{below}/{path}")
    except OSError:
        return None


def clone_file(path: str, at: int, below: str) -> int | None:
    """The same of what `open_whole` returned, attached at `below` of the directory `at`: a clone keeps its flags."""
    try:
        return kernel.open_tree(f"{below}/{path}", at)
    except OSError:
        return None


def _detached(path: str) -> int:
    made = kernel.open_tree(path)
    try:
        # A clone of a shared mount, as systemd makes all of a host's, would pass on what is mounted on it.
        kernel.mount_setattr(made, _ATTRIBUTES, propagation=kernel.MS_PRIVATE)
    except BaseException:
        os.close(made)
        raise
    return made


def renew(jails: dict[str, tuple[int, Bundle]], hierarchies: Hierarchies, directory: str) -> list[str]:
    """Have the files of the lxcfs at `directory` in each jail again: names of those in which it failed.

    `jails`: name to init's pidfd and what it was started with. A child for each goes into the jail's mount namespaces
    and no further: what the guest has done to its processes and cgroups, or set as limits to them, is not in its way.
    """
    children: dict[int, tuple[str, int]] = {}
    for name, (init, bundle) in jails.items():
        pid = os.fork()
        if pid == 0:
            process.trap("lxcfs", _note, partial(_renew, init, bundle, hierarchies, directory))
        children[os.pidfd_open(pid)] = (name, pid)
    failed = []
    deadline = monotonic() + RENEW_SECONDS + len(jails) * JAIL_SECONDS
    for pidfd, (name, pid) in children.items():
        if not process.has_ended(pidfd, deadline - monotonic()):
            # A child that waits for a file system of the guest's waits as long as that likes: the reaper reaps it then.
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            process.has_ended(pidfd, 0.1)
        if os.waitpid(pid, os.WNOHANG) != (pid, 0) and not process.has_ended(jails[name][0], 0):
            failed.append(name)
        os.close(pidfd)
    return failed


def _note(told: dict[str, Any]) -> None:
    print("lxcfs:", told["error"]["why"], file=sys.stderr, flush=True)


def _renew(init: int, bundle: Bundle, hierarchies: Hierarchies, directory: str) -> None:
    """The child. The files are taken while the host's mounts are in sight; all else happens with the guest's rights."""
    kernel.close_all_but(init)
    process.shut_imports()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    spaces = _mount_namespaces(members(hierarchies, bundle.cgroup))
    fresh = {fd: {path: open_file(path, directory) for path in files_of(bundle)} for fd in (init, *spaces)}
    kernel.setns(init, kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
    os.setresgid(0, 0, 0)
    os.setgroups([])
    os.setresuid(0, 0, 0)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    _put(fresh.pop(init))
    for space, files in fresh.items():
        try:
            kernel.setns(space, kernel.CLONE_NEWNS)
            _put(files)
        except OSError:
            continue  # of a user namespace of the guest's, whose mounts hold each other


def _mount_namespaces(pids: list[int]) -> list[int]:
    """Those of these processes, each once: of services that have one of their own, and init's. A pid that is not of the
    jail any more does no harm: the guest's root may enter no namespace of the host's.
    """
    found: dict[int, int] = {}
    for pid in pids:
        try:
            fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        if len(found) == _NAMESPACES_MAX or found.setdefault(os.fstat(fd).st_ino, fd) != fd:
            os.close(fd)
    return list(found.values())


def _put(fresh: dict[str, int | None]) -> None:
    """In the mount namespace that this process is in."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for path, made in [*fresh.items(), *((path, None) for path in _RETIRED)]:
        if made is None and path not in _RETIRED:
            continue
        folder, name = os.path.split(path)
        directory = _open_directory(root, folder)
        if directory is None:
            continue
        os.fchdir(directory)
        target = _uncover(directory, name)
        if made is not None and target is not None:
            kernel.move_mount(made, target)


def _open_directory(root: int, path: str) -> int | None:
    """A directory of the jail's /proc or /sys, where that is one: not a link, and not what the guest may have mounted
    there.
    """
    top, _, rest = path.partition("/")
    try:
        mounted = kernel.openat2(root, top, os.O_PATH | os.O_DIRECTORY, _BENEATH)
        if fs_type(mounted) != _MAGIC[top]:
            return None
        own = _BENEATH | kernel.RESOLVE_NO_XDEV
        return kernel.openat2(mounted, rest, os.O_PATH | os.O_DIRECTORY, own) if rest else mounted
    except OSError:
        return None


def _uncover(directory: int, name: str) -> int | None:
    """The kernel's file itself, dead mounts on it taken away; None where the guest, or a living lxcfs, has one there.

    The working directory is `directory`: a name in it is one step, and there are no links by these names.
    """
    for _ in range(_LAYERS_MAX):
        try:
            return kernel.openat2(directory, name, os.O_PATH | os.O_NOFOLLOW, _BENEATH | kernel.RESOLVE_NO_XDEV)
        except OSError as error:
            if error.errno != errno.EXDEV or not _is_dead(directory, name):
                return None
        kernel.umount(name, kernel.MNT_DETACH | kernel.UMOUNT_NOFOLLOW)
    return None


def _is_dead(directory: int, name: str) -> bool:
    """Whether what lies on the file is of a FUSE file system that nobody serves any more."""
    top = kernel.openat2(directory, name, os.O_PATH | os.O_NOFOLLOW, _BENEATH)
    try:
        os.fstatvfs(top)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    finally:
        os.close(top)
    return False
