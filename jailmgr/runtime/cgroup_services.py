"""Groups of our own programs that work for jails: guests make such a program work, and no jail is charged for it.

Where the host has systemd, such a program is in a scope of its own, whose property is the limit. Elsewhere
it is in a group beside those of the tenants, with a name that no tenant can have. Standard library only.
"""

from __future__ import annotations

import errno
import os

from jailmgr.errors import from_os
from jailmgr.runtime.cgroup_bounds import hold
from jailmgr.runtime.cgroup_hierarchies import SYSTEMD, Hierarchies, read, relative, write
from jailmgr.runtime.cgroup_limits import PERIOD_US
from jailmgr.runtime.cgroups import root_group


def make_service(h: Hierarchies, root_name: str, name: str, cpus: float) -> str:
    """Make the group of a program, limited to `cpus`. Returns the file that a process writes 0 to, to move itself.

    Empty with systemd, and on a host without a cpu controller. Raises JailmgrError.
    """
    path = _place(h, root_name, name)
    if SYSTEMD or not path:
        return ""
    quota = int(cpus * PERIOD_US)
    try:
        root_group(h, root_name)
        os.makedirs(path, 0o755, exist_ok=True)
        if "cpu" in h.v2:
            _write(f"{path}/cpu.max", f"{quota} {PERIOD_US}")
            return f"{path}/cgroup.procs"
        hold(path, "cpu.cfs_quota_us", quota)
        return f"{path}/tasks"
    except OSError as error:
        raise from_os(f"cgroup of {name}", error) from error


def has_service(h: Hierarchies, root_name: str, name: str) -> bool:
    """Whether the group is there; never with systemd."""
    path = _place(h, root_name, name)
    return bool(path) and not SYSTEMD and os.path.isdir(path)


def remove_service(h: Hierarchies, root_name: str, name: str) -> None:
    """Remove the group of a program that has ended; fine if it isn't there or is in use. Raises OSError."""
    if not has_service(h, root_name, name):
        return
    try:
        os.rmdir(_place(h, root_name, name))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EBUSY):
            raise


def _place(h: Hierarchies, root_name: str, name: str) -> str:
    mount = h.unified if "cpu" in h.v2 else h.v1.get("cpu", "")
    return f"{mount}/{relative(root_name)}/.{name}" if mount else ""


def _write(path: str, value: str) -> None:
    if read(path) != value:
        write(path, value)
