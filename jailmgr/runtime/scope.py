"""On a host with systemd: the transient scope in which all supervisors and jails of an instance live.

systemd owns the cgroup tree and delegates the scope's part of it to us (systemd.resource-control(5), Delegate=; its
CGROUP_DELEGATION document). Supervisors are in a leaf of their own there, since a group with processes can't give
controllers to its children. It ends with its last process; none of it is in a service's or a session's group, so
neither `systemctl stop` nor a log-out touches a jail. Standard library only.
"""

from __future__ import annotations

import os
import shutil

from jailmgr.errors import JailmgrError
from jailmgr.runtime.cgroup_hierarchies import SLICE, SYSTEMD, discover, relative, write

_LEAF = ".supervisors"
"""Leaf of the scope for those who make its other groups: a group with processes can't give controllers on."""
_PATH = "/usr/local/bin:/usr/bin:/bin"


def directory(root_name: str) -> str:
    """The scope's group, whether it is there or not; empty on a host without systemd."""
    return f"{discover().unified}/{relative(root_name)}" if SYSTEMD else ""


def begin(root_name: str, argv: list[str]) -> list[str]:
    """`argv`, to be run so that it begins in the scope: by systemd-run(1) where there is no scope yet.

    JailmgrError `unavailable` without systemd-run.
    """
    if os.path.isdir(directory(root_name)):
        return argv
    program = shutil.which("systemd-run", path=_PATH)
    if program is None:
        raise JailmgrError("supervisor", "this host runs systemd, but has no systemd-run", "", "unavailable")
    # Jails are stopped one by one before the scope is, where the host goes down (jailmgr-autostart.service).
    properties = ["Delegate=yes", "Description=Jails of jailmgr", "Before=jailmgr-autostart.service"]
    options = ["--scope", "--quiet", "--collect", f"--unit={root_name}.scope", f"--slice={SLICE}"]
    return [program, *options, *(f"--property={text}" for text in properties), "--", *argv]


def begin_apart(description: str, argv: list[str]) -> list[str]:
    """`argv`, to be run so that it begins in a scope of its own, outside of the session or service we are in.

    The same where the host has no systemd, or no systemd-run.
    """
    program = shutil.which("systemd-run", path=_PATH) if SYSTEMD else None
    if program is None:
        return argv
    options = ["--scope", "--quiet", "--collect", f"--slice={SLICE}", f"--description={description}"]
    return [program, *options, "--", *argv]


def move_apart(unit: str, description: str, pid: int) -> None:
    """Move a process that runs into a scope of its own (org.freedesktop.systemd1(5), StartTransientUnit).

    Nothing is done without systemd; the process stays where it is where systemd won't.
    """
    program = shutil.which("busctl", path=_PATH) if SYSTEMD else None
    if program is None:
        return
    manager = ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"]
    properties = ["PIDs", "au", "1", str(pid), "Slice", "s", SLICE, "Description", "s", description]
    properties += ["CollectMode", "s", "inactive-or-failed"]
    argv = [program, "--quiet", "call", *manager, "StartTransientUnit", "ssa(sv)a(sa(sv))", unit, "fail", "4"]
    child = os.posix_spawn(program, [*argv, *properties, "0"], {"PATH": _PATH})
    os.waitpid(child, 0)


def enter(scope: str) -> None:
    """Move the calling process to the supervisors' leaf. Raises OSError."""
    os.makedirs(f"{scope}/{_LEAF}", 0o755, exist_ok=True)
    write(f"{scope}/{_LEAF}/cgroup.procs", "0")
