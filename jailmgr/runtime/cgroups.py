"""The groups of tenants and jails: made, joined, removed, listed; and in one place, all else that is done with them.

`ROOT/TENANT/JAIL` is a directory of ours in each hierarchy that is mounted. On v2 it has `payload` below it, the root
of the guest's cgroup namespace, delegated as cgroup-v2.rst has it ("Delegation"). On v1 the guest's processes are in
`JAIL` itself, and the guest may not make groups. Nothing is written outside of ROOT but v2's root
cgroup.subtree_control.

Hierarchies that limit nothing (`Hierarchies.others`) are joined because of names: cgroup_namespaces(7) hides what lies
above and beside the group that a process is in when its namespace is made, and in the hierarchy's root nothing does.
Where such a hierarchy can't be written, the jail starts and sees its names (`jailmgr doctor` reports it).

Joining by cgroup.procs costs 6-10 ms when nobody did it for a while (a grace period of RCU, kernel 6.18). Two ways go
past it: clone3(2) with CLONE_INTO_CGROUP and `leaf_fd` on v2, and `open_tasks` and `join_self` on v1. Standard library
only.
"""

from __future__ import annotations

import errno
import os
import time

from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime.cgroup_bounds import ALL_GROUPS, JAIL_GROUPS, TENANT_GROUPS, hold, hold_processes
from jailmgr.runtime.cgroup_cpuset import host_cpus as host_cpus
from jailmgr.runtime.cgroup_cpuset import make_cpuset
from jailmgr.runtime.cgroup_hierarchies import SYSTEMD, read, relative, write
from jailmgr.runtime.cgroup_hierarchies import Hierarchies as Hierarchies
from jailmgr.runtime.cgroup_hierarchies import directory as directory
from jailmgr.runtime.cgroup_hierarchies import discover as discover
from jailmgr.runtime.cgroup_hierarchies import not_writable as not_writable
from jailmgr.runtime.cgroup_limits import DEFAULT_DEVICES as DEFAULT_DEVICES
from jailmgr.runtime.cgroup_limits import Limits as Limits
from jailmgr.runtime.cgroup_limits import check_limits as check_limits
from jailmgr.runtime.cgroup_limits import device_rules as device_rules
from jailmgr.runtime.cgroup_limits import memory_usage
from jailmgr.runtime.cgroup_limits import oom_kills as oom_kills
from jailmgr.runtime.cgroup_limits import set_limits as set_limits
from jailmgr.runtime.cgroup_limits import usage as usage
from jailmgr.runtime.cgroup_processes import freeze as freeze
from jailmgr.runtime.cgroup_processes import is_frozen as is_frozen
from jailmgr.runtime.cgroup_processes import kill as kill
from jailmgr.runtime.cgroup_processes import members as members
from jailmgr.runtime.cgroup_processes import send_kill as send_kill
from jailmgr.runtime.cgroup_processes import thaw as thaw
from jailmgr.runtime.cgroup_processes import wait_event, wait_members

PAYLOAD = "payload"
EXEC = "payload/.exec"
"""Leaf for what is exec'd; runtime/cgroup_exec.py has further ones."""
OUTSIDE = "exec"
"""Leaf beside the payload for what is exec'd when the guest spoilt `.exec` (made it threaded, used up its groups)."""

_OF_SYSTEMD = frozenset({"name=systemd", "cpu", "cpuacct", "blkio", "memory", "devices", "pids"})
"""v1 hierarchies that systemd(1) keeps a scope's groups in, and removes them from."""
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

DELEGATED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")

MAX_DEPTH = 32
"""Of a guest's groups below each other."""


def tenant_group(h: Hierarchies, root_name: str, tenant: str) -> None:
    """Make `ROOT/TENANT` in every hierarchy in use; fine if it is there. Raises JailmgrError.

    v1's memory and others are hierarchical by themselves on every kernel from 5.11 on (memory.use_hierarchy is 1).
    """
    try:
        for mount in h.mounts:
            os.makedirs(f"{mount}/{relative(f'{root_name}/{tenant}')}", 0o755, exist_ok=True)
        for mount in h.others.values():
            _try_make(f"{mount}/{relative(f'{root_name}/{tenant}')}")
        root_group(h, root_name)
        if h.unified:
            group = f"{h.unified}/{relative(f'{root_name}/{tenant}')}"
            _make(group)
            _enable(h, group)
            hold(group, "cgroup.max.descendants", TENANT_GROUPS)
    except OSError as error:
        raise _failed(f"cgroup {root_name}/{tenant}", error) from error


def root_group(h: Hierarchies, root_name: str) -> None:
    """Make `ROOT`, and hold all jails together to the bounds of runtime/cgroup_bounds.py. Raises OSError.

    With systemd it is the scope, which is there.
    """
    if h.unified:
        top = f"{h.unified}/{relative(root_name)}"
        if not SYSTEMD:
            _enable(h, h.unified)
            _make(top)
        _enable(h, top)
        hold(top, "cgroup.max.descendants", ALL_GROUPS)
    if "pids" in h.v1:
        os.makedirs(f"{h.v1['pids']}/{relative(root_name)}", 0o755, exist_ok=True)
    hold_processes(h, root_name)


def identity(h: Hierarchies, cgroup: str) -> int:
    """Inode of a group, another one once it has been removed and made again; 0 where it isn't there."""
    try:
        return os.stat(f"{h.unified or h.mounts[0]}/{relative(cgroup)}").st_ino
    except FileNotFoundError:
        return 0


def exists(h: Hierarchies, cgroup: str) -> bool:
    """Whether the group is there in any hierarchy."""
    return any(os.path.isdir(f"{mount}/{relative(cgroup)}") for mount in _all(h))


def create_jail_group(h: Hierarchies, cgroup: str, base_uid: int, cpus: str | None = None) -> dict[str, str]:
    """Make `ROOT/TENANT/JAIL`, with a payload that `base_uid` (the host uid and gid of the guest's root) may use.

    `cpus` as Limits has it: on v1 they are needed before anyone joins.

    The tenant's group must be there. What an earlier run left is removed first, its limits too. Returns controller to
    directory, and `unified` to the payload's. Raises JailmgrError; `conflict` where the group still has processes.
    """
    path = relative(cgroup)
    try:
        if exists(h, cgroup):
            remove(h, cgroup, timeout=0)
        for mount in h.mounts:
            _make(f"{mount}/{path}")
        for mount in h.others.values():
            _try_make(f"{mount}/{path}")
        if h.unified:
            _make(f"{h.unified}/{path}")
            _enable(h, f"{h.unified}/{path}")
            payload = f"{h.unified}/{path}/{PAYLOAD}"
            _make(payload)
            write(f"{payload}/cgroup.max.descendants", str(JAIL_GROUPS))
            write(f"{payload}/cgroup.max.depth", str(MAX_DEPTH))
            delegate(payload, base_uid)
        _make_cpuset(h, cgroup, cpus)
    except OSError as error:
        raise _failed(f"cgroup {cgroup}", error) from error
    return directories(h, cgroup)


def delegate(path: str, base_uid: int) -> None:
    """Give a v2 group to the guest, who may then make groups below it (cgroups(7), "Delegation"). Raises OSError."""
    os.chown(path, base_uid, base_uid)
    for name in DELEGATED:
        os.chown(f"{path}/{name}", base_uid, base_uid)


def directories(h: Hierarchies, cgroup: str) -> dict[str, str]:
    """Controller to the group's directory, for people; `unified` is the payload's."""
    found = {controller: f"{mount}/{relative(cgroup)}" for controller, mount in h.v1.items()}
    for controller in h.v2:
        found[controller] = f"{h.unified}/{relative(cgroup)}"
    if h.unified:
        found["unified"] = f"{h.unified}/{relative(cgroup)}/{PAYLOAD}"
    for name, mount in (("cpuset", h.cpuset), *h.others.items()):
        if mount and os.path.isdir(f"{mount}/{relative(cgroup)}"):
            found[name] = f"{mount}/{relative(cgroup)}"
    return found


def _all(h: Hierarchies) -> list[str]:
    """Where groups of ours may be."""
    return [mount for mount in (*h.mounts, *_for_names(h), h.unified) if mount]


def _for_names(h: Hierarchies) -> list[str]:
    """Hierarchies in which a jail may have no group: it could not be made, or an older release started the jail."""
    return [mount for mount in (h.cpuset, *h.others.values()) if mount]


def _make(path: str) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        if not os.path.isdir(path):
            raise


def _make_cpuset(h: Hierarchies, cgroup: str, cpus: str | None) -> None:
    try:
        make_cpuset(h, cgroup, cpus)
    except OSError as error:
        if cpus is not None or error.errno not in _NOT_WRITABLE:
            raise


def _try_make(path: str) -> None:
    """Make a group, and those above it, in a hierarchy that limits nothing; a host may have it read-only."""
    try:
        os.makedirs(path, 0o755, exist_ok=True)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise


def _enable(h: Hierarchies, path: str) -> None:
    """Switch our controllers on for the children of a v2 group."""
    if not h.v2:
        return
    there = read(f"{path}/cgroup.subtree_control").split()
    wanted = " ".join(f"+{controller}" for controller in h.v2 if controller not in there)
    if wanted:
        write(f"{path}/cgroup.subtree_control", wanted)


def _failed(what: str, error: OSError) -> JailmgrError:
    """The error of a group that could not be made or set up."""
    hint = ""
    if error.errno == errno.EAGAIN:
        why = f"there are {TENANT_GROUPS} groups of the tenant, or {ALL_GROUPS} of all jails, and no more may be made"
        return JailmgrError(what, why, "Stop a jail whose guest has made many.", "full")
    if error.errno in _NOT_WRITABLE:
        hint = "jailmgr needs root and a writable cgroup file system."
    if error.errno == errno.EBUSY:
        hint = "The cgroup above has processes of its own; inside a container, move them to a group below it first."
    return from_os(what, error, hint)


def leaf_fd(h: Hierarchies, cgroup: str, leaf: str = PAYLOAD) -> int | None:
    """Directory of a v2 leaf, for clone3(2)'s CLONE_INTO_CGROUP; None on a host without v2. The caller closes it.

    `leaf`: PAYLOAD or OUTSIDE, which is made when it isn't there. Raises JailmgrError.
    """
    if not h.unified:
        return None
    path = f"{h.unified}/{relative(cgroup)}/{leaf}"
    try:
        if leaf != PAYLOAD:
            _make(path)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise from_os(f"cgroup {cgroup}", error) from error


def open_tasks(h: Hierarchies, cgroup: str) -> list[int]:
    """The jail's v1 groups, for `join_self`; the caller closes them. Raises JailmgrError.

    Who opens them must be root; who writes to them may be somebody else by then (cgroup-v1: the opener's rights count).
    """
    opened: list[int] = []
    try:
        opened.extend(os.open(f"{mount}/{relative(cgroup)}/tasks", os.O_WRONLY | os.O_CLOEXEC) for mount in h.mounts)
        for mount in _for_names(h):
            try:
                opened.append(os.open(f"{mount}/{relative(cgroup)}/tasks", os.O_WRONLY | os.O_CLOEXEC))
            except FileNotFoundError:
                continue
    except OSError as error:
        for fd in opened:
            os.close(fd)
        raise from_os(f"joining cgroup {cgroup}", error) from error
    return opened


def join_self(tasks: list[int]) -> None:
    """Move the calling thread (the only one of its process) to the v1 groups of `open_tasks`. Raises OSError.

    Writing 0 to `tasks` needs no lock over all of the host's threads, as writing a pid or to cgroup.procs does.
    """
    for fd in tasks:
        os.write(fd, b"0")
        os.close(fd)


def join(h: Hierarchies, cgroup: str, pid: int, leaf: str = PAYLOAD) -> None:
    """Move a process (0: the caller) to the jail's groups, on v2 to the leaf PAYLOAD or EXEC. Raises JailmgrError."""
    try:
        for mount in h.mounts:
            write(f"{mount}/{relative(cgroup)}/cgroup.procs", str(pid))
        for mount in _for_names(h):
            if os.path.isdir(f"{mount}/{relative(cgroup)}"):
                write(f"{mount}/{relative(cgroup)}/cgroup.procs", str(pid))
        if h.unified:
            _join_leaf(f"{h.unified}/{relative(cgroup)}", pid, leaf)
    except OSError as error:
        raise from_os(f"joining cgroup {cgroup}", error) from error


def _join_leaf(jail: str, pid: int, leaf: str) -> None:
    try:
        if leaf != PAYLOAD:
            _make(f"{jail}/{leaf}")
        write(f"{jail}/{leaf}/cgroup.procs", str(pid))
    except OSError as error:
        if leaf != EXEC or error.errno == errno.ESRCH:
            raise
        _join_leaf(jail, pid, OUTSIDE)


def remove(h: Hierarchies, cgroup: str, timeout: float = 5.0) -> None:
    """Remove the group with all below it, in every hierarchy, once its processes are gone. Fine if it isn't there.

    Kills nothing. Raises JailmgrError, `conflict` where processes are left after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    path = relative(cgroup)
    try:
        if h.unified:
            wait_event(f"{h.unified}/{path}", "populated", 0, deadline)
        else:
            wait_members(h, cgroup, deadline)
        if members(h, cgroup):
            # Before the first rmdir(2): the empty groups that a guest has made are part of a jail that runs.
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        for mount in _all(h):
            remove_tree(f"{mount}/{path}")
    except OSError as error:
        left = members(h, cgroup)
        if error.errno == errno.EBUSY and left:
            raise JailmgrError(
                f"removing cgroup {cgroup}",
                f"it has processes: {' '.join(map(str, left[:10]))}",
                "Stop the jail first (stop --force kills all of it).",
                "conflict",
            ) from error
        raise from_os(f"removing cgroup {cgroup}", error) from error


def remove_tree(path: str, at: int | None = None) -> None:
    """rmdir(2) of a group, of those below it first. By directory fds, as `members` and for the same reason."""
    try:
        os.rmdir(path, dir_fd=at)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    except FileNotFoundError:
        return
    try:
        with os.scandir(fd) as entries:
            below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        for name in below:
            remove_tree(name, fd)
    finally:
        os.close(fd)
    try:
        os.rmdir(path, dir_fd=at)
    except FileNotFoundError:
        return


def list_groups(h: Hierarchies, root_name: str) -> list[str]:
    """`ROOT/TENANT` and `ROOT/TENANT/JAIL` of every group there is in any hierarchy, parents first."""
    found: set[str] = set()
    for mount in _all(h):
        for tenant in _names(f"{mount}/{relative(root_name)}"):
            group = f"{root_name}/{tenant}"
            found.add(group)
            found.update(f"{group}/{jail}" for jail in _names(f"{mount}/{relative(group)}"))
    return sorted(found)


def memory_of_jails(h: Hierarchies, tenant_group: str) -> int | None:
    """Return the memory of the tenant's present jails in bytes; None if not known.

    The tenant's own group counts more: what a removed group was charged for goes to the group above it
    (cgroup-v1/memory.rst, "Reparenting"), mostly page cache.
    """
    path = directory(h, "memory", tenant_group)
    if path is None:
        return None
    return sum(memory_usage(h, f"{tenant_group}/{jail}") or 0 for jail in _names(path))


def _names(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."]
    except FileNotFoundError:
        return []
    return ["tasks" if name == "tasks.d" else name for name in found]


def remove_root(h: Hierarchies, root_name: str, timeout: float = 5.0) -> None:
    """Remove all of our groups, as `remove` does. Raises JailmgrError where any has processes.

    systemd's scope is systemd's: it goes with its last process, but for the hierarchies of which systemd knows nothing.
    """
    if not SYSTEMD:
        remove(h, root_name, timeout)
        return
    known = {mount for name, mount in (*h.v1.items(), *h.others.items()) if _OF_SYSTEMD.intersection(name.split(","))}
    for mount in {*h.mounts, *_for_names(h)} - known:
        remove(Hierarchies("", (), {}, (), mount), root_name, timeout)
