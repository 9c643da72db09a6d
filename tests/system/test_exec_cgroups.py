"""The cgroup of what is exec'd: a leaf that the guest may make groups in, and that no other command is in."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jailmgr.runtime import cgroups
from jailmgr.runtime.cgroup_exec import EXECS
from tests.system.conftest import MakeJail
from tests.system.instance import Instance

SHOW = "sed -n s/^0:://p /proc/self/cgroup"


@pytest.fixture
def jail(busybox_jail: MakeJail) -> str:
    if not cgroups.discover().unified:
        pytest.skip("a guest makes no groups on a host without cgroup v2")
    return busybox_jail()


@contextmanager
def commands(jm: Instance, jail: str, count: int) -> Iterator[list[str]]:
    """Commands that run at the same time, and the group of each."""
    pipe = subprocess.PIPE
    running: list[subprocess.Popen[bytes]] = []
    groups = []
    try:
        for _ in range(count):
            running.append(jm.popen("exec", jail, "--", "sh", "-c", f"{SHOW}; cat", stdin=pipe, stdout=pipe))
            assert running[-1].stdout is not None
            groups.append(running[-1].stdout.readline().decode().strip())
        yield groups
    finally:
        for process in running:
            process.communicate(timeout=20)


def test_a_command_makes_groups_below_its_own(jm: Instance, jail: str) -> None:
    """As systemd-nspawn(1) does with --keep-unit, and podman(1) with --cgroups=split."""
    own = f"cd /sys/fs/cgroup$({SHOW})"
    assert jm.sh(jail, f"{own} && mkdir x && echo $$ >x/cgroup.procs && {SHOW}").out == "/.exec/x\n"
    assert jm.sh(jail, f"{own} && rmdir x && stat -c %u . cgroup.procs cgroup.subtree_control").out == "0\n0\n0\n"


def test_commands_at_the_same_time_are_apart(jm: Instance, jail: str) -> None:
    with commands(jm, jail, 3) as groups:
        assert groups == ["/.exec", "/.exec-1", "/.exec-2"]
    assert jm.sh(jail, SHOW).out == "/.exec\n"


def test_more_commands_than_leaves(jm: Instance, jail: str) -> None:
    """They share: the jail's groups (cgroup_bounds.JAIL_GROUPS) are for the guest."""
    with commands(jm, jail, EXECS + 2) as groups:
        assert len(set(groups)) == EXECS
        assert groups[EXECS:] == ["/.exec", "/.exec"]
