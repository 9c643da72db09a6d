"""The cgroups of what is exec'd: leaves beside those of the guest, each the guest's own to make groups below.

cgroup-v2.rst, "No Internal Process Constraint": a group whose children have controllers holds no process. So process 1
of a guest whose systemd gives controllers to its units can't share its group with what is exec'd, and two commands that
make groups of their own (systemd-nspawn(1), podman(1)) can't share one either. A command therefore gets the first leaf
without processes, and `EXECS` bounds the jail's groups that go to them. A leaf stays for the next command.

A host without cgroup v2 has no such groups: v1's can't be delegated. Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from jailmgr.runtime.cgroup_hierarchies import Hierarchies, field, read, relative
from jailmgr.runtime.cgroups import EXEC, OUTSIDE, delegate, leaf_fd, remove_tree

EXECS = 16
"""Further commands that run at the same time share these leaves: all but a sixteenth of JAIL_GROUPS is the guest's."""


def exec_leaves(h: Hierarchies, cgroup: str, base_uid: int) -> Iterator[int | None]:
    """Yield directories of leaves for clone3(2)'s CLONE_INTO_CGROUP, the best first; None on a host without v2.

    Ask for the next one where clone3 fails with EBUSY, EOPNOTSUPP or EAGAIN: the guest has set up the leaf, or one
    beside it, in a way that keeps processes out. The last one, beside the payload, the guest can't reach. The caller
    closes them. Raises JailmgrError.
    """
    in_use: list[str] = []
    for number in range(EXECS if h.unified else 0):
        path = f"{h.unified}/{relative(cgroup)}/{EXEC}" + (f"-{number}" if number else "")
        try:
            made = _make(path, base_uid)
            if not made and field(read(f"{path}/cgroup.events"), "populated"):
                in_use.append(path)
                continue
            if not made and os.stat(path).st_uid != base_uid:
                # A release before this one made it, for a jail that still runs.
                os.rmdir(path)
                _make(path, base_uid)
            yield _open(path)
            if not made:
                # Whoever was in it has left controllers on.
                remove_tree(path)
                _make(path, base_uid)
                yield _open(path)
        except OSError:
            # No room for another group, or a process has come in: the leaves that are in use remain.
            break
        break
    for path in in_use:
        try:
            yield _open(path)
        except FileNotFoundError:
            continue
    yield leaf_fd(h, cgroup, OUTSIDE)


def _make(path: str, base_uid: int) -> bool:
    """Make a leaf that is the guest's; False where it is there. Raises OSError."""
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        return False
    delegate(path, base_uid)
    return True


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
