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
from jailmgr.runtime.cgroup_bounds import tasks_max
from jailmgr.runtime.cgroup_hierarchies import SLICE, SYSTEMD, discover, relative, write

_LEAF = ".supervisors"
"""Leaf of the scope for those who make its other groups: a group with processes can't give controllers on."""
_PATH = "/usr/local/bin:/usr/bin:/bin"
_MANAGER = ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"]


def directory(root_name: str) -> str:
    """The scope's group, whether it is there or not; empty on a host without systemd."""
    return f"{discover().unified}/{relative(root_name)}" if SYSTEMD else ""


def begin(root_name: str, argv: list[str]) -> list[str]:
    """`argv`, to be run so that it begins in the scope: by systemd-run(1) where there is none, or one that has ended.

    Else it is to `enter` it. JailmgrError `unavailable` without systemd-run.
    """
    if os.path.isdir(directory(root_name)) and _is_active(root_name):
        return argv
    program = shutil.which("systemd-run", path=_PATH)
    if program is None:
        raise JailmgrError("supervisor", "this host runs systemd, but has no systemd-run", "", "unavailable")
    # Jails are stopped one by one before the scope is, where the host goes down (jailmgr-autostart.service).
    # TasksMax: systemd's own default for a scope is 15 % of the host's, for all jails together.
    properties = ["Delegate=yes", "Description=Jails of jailmgr", "Before=jailmgr-autostart.service"]
    properties.append(f"TasksMax={tasks_max()}")
    options = ["--scope", "--quiet", "--collect", f"--unit={root_name}.scope", f"--slice={SLICE}"]
    return [program, *options, *(f"--property={text}" for text in properties), "--", *argv]


def _is_active(root_name: str) -> bool:
    """A group that is still there tells nothing: systemd removes it a moment after the scope has ended."""
    program = shutil.which("systemctl", path=_PATH)
    return program is not None and _run([program, "is-active", "--quiet", f"{root_name}.scope"]) == 0


def _run(argv: list[str]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn(argv[0], argv, {"PATH": _PATH}), 0)[1])


def begin_apart(description: str, argv: list[str], *properties: str) -> list[str]:
    """`argv`, to be run so that it begins in a scope of its own, outside of the session or service we are in.

    `properties`: of the scope, as `CPUQuota=50%` (systemd.resource-control(5)). Returns `argv` where the host has no
    systemd, or no systemd-run.
    """
    program = shutil.which("systemd-run", path=_PATH) if SYSTEMD else None
    if program is None:
        return argv
    options = ["--scope", "--quiet", "--collect", f"--slice={SLICE}", f"--description={description}"]
    return [program, *options, *(f"--property={text}" for text in properties), "--", *argv]


def move_apart(unit: str, description: str, pid: int) -> None:
    """Move a process that runs into a scope of its own (org.freedesktop.systemd1(5), StartTransientUnit).

    Nothing is done without systemd; the process stays where it is where systemd won't.
    """
    program = shutil.which("busctl", path=_PATH) if SYSTEMD else None
    if program is None:
        return
    properties = ["PIDs", "au", "1", str(pid), "Slice", "s", SLICE, "Description", "s", description]
    properties += ["CollectMode", "s", "inactive-or-failed"]
    argv = [program, "--quiet", "call", *_MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))", unit, "fail", "4"]
    _run([*argv, *properties, "0"])


def enter(scope: str) -> None:
    """Move the calling process to the supervisors' leaf. Raises OSError.

    From outside of the scope by systemd (AttachProcessesToUnit): written there by ourselves, it could come into the
    group of a scope that systemd has just let go of. JailmgrError `unavailable` where it has ended.
    """
    unit, gone = os.path.basename(scope), "systemd has just ended it"
    try:
        os.mkdir(f"{scope}/{_LEAF}", 0o755)
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise JailmgrError(f"scope {unit}", gone, "Try again.", "unavailable") from error
    with open("/proc/self/cgroup", encoding="ascii") as file:
        within = any(line.rstrip("\n").endswith(f"/{unit}") for line in file)
    if within:
        write(f"{scope}/{_LEAF}/cgroup.procs", "0")
        return
    program = shutil.which("busctl", path=_PATH)
    attach = ["--quiet", "call", *_MANAGER, "AttachProcessesToUnit", "ssau", unit, f"/{_LEAF}", "1", str(os.getpid())]
    if program is None or _run([program, *attach]) != 0:
        raise JailmgrError(f"scope {unit}", gone, "Try again.", "unavailable")
