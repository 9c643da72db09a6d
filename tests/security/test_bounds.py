"""Wall: what a guest may use up of the things that the host has once for all jails.

Mechanisms: cgroup.max.descendants and pids.max in groups above those that are delegated, a devpts of the jail's own
with a maximum, a CPU quota for lxcfs, which works for all jails.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jailmgr.manager.lxcfs import cpus_most
from jailmgr.manager.plan import PROCESSES
from jailmgr.runtime import cgroups
from jailmgr.runtime.bundle import TERMINALS
from jailmgr.runtime.cgroup_bounds import ALL_GROUPS, JAIL_GROUPS, TENANT_GROUPS, tasks_max
from jailmgr.runtime.cgroup_hierarchies import SYSTEMD, Hierarchies, directory, read, relative
from tests.security.guest import Guest
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, until
from tests.system.own_proc import kill_lxcfs, lxcfs_pid, wait_renewed

PRESSURE = Path("/proc/pressure/cpu")
BOMB = "n=0; while [ $n -lt 400 ]; do sleep 1000 & n=$((n+1)); done 2>/dev/null; echo $n"
"""Bounded by itself, too: never more than 400 processes."""
BOMB_MAX = 60


@pytest.fixture
def h() -> Hierarchies:
    return cgroups.discover()


def psimons() -> int:
    """Number of the kernel's threads for pressure triggers, on the whole host."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += path.read_text() == "psimon\n"
        except OSError:
            continue
    return found


def test_groups_and_their_pressure_threads_are_bounded(h: Hierarchies, guest: Guest) -> None:
    """A guest's root makes groups, and a pressure trigger in each. Mechanism: cgroup.max.descendants.

    One trigger in each group: a further one in the same group gets no further thread. The files of the jail's own group
    are the host's root's.
    """
    if not h.unified:
        pytest.skip("guests make no groups on a host without cgroup v2")
    path = guest.install("psi")
    before = psimons()
    pipe = subprocess.PIPE
    with guest.jm.popen("exec", guest.jail, "--", path, str(2 * JAIL_GROUPS), stdin=pipe, stdout=pipe) as trial:
        assert trial.stdout is not None
        said = trial.stdout.readline().decode().split()
        told = dict(zip(said[::2], said[1::2], strict=True))
        assert int(told["groups"]) < JAIL_GROUPS
        assert told["why"] == "EAGAIN"
        if PRESSURE.exists():
            assert 0 <= psimons() - before <= JAIL_GROUPS
            assert (told["root"], told["host"]) == ("0", "0")
        assert trial.stdin is not None
        trial.stdin.close()
    until(lambda: psimons() <= before, 10, "the triggers' threads have ended")


def test_groups_of_a_tenant_and_of_all_jails_are_bounded(h: Hierarchies, guest: Guest) -> None:
    """Mechanism: cgroup.max.descendants of the groups above, which are not delegated."""
    if not h.unified:
        pytest.skip("guests make no groups on a host without cgroup v2")
    for group, bound in ((guest.jm.root.cgroup, ALL_GROUPS), (f"{guest.jm.root.cgroup}/default", TENANT_GROUPS)):
        assert read(f"{h.unified}/{relative(group)}/cgroup.max.descendants") == str(bound)
    payload = guest.jm.info(guest.jail)["cgroups"]["unified"]
    assert read(f"{payload}/cgroup.max.descendants") == str(JAIL_GROUPS)
    refused = "echo 9999 2>/dev/null >/sys/fs/cgroup/cgroup.max.descendants || echo refused"
    assert guest.sh(refused) == "refused\n"


def test_terminals_of_a_jail_are_bounded(guest: Guest) -> None:
    """Mechanism: the mount option max of the jail's devpts (Documentation/filesystems/devpts.rst)."""
    opened, why = guest.run("pty", str(2 * TERMINALS), "/dev/ptmx").split()
    assert why == "ENOSPC"
    assert TERMINALS - 8 < int(opened) <= TERMINALS


def bound_of(jm: Instance, jail: str, h: Hierarchies) -> str:
    return read(f"{directory(h, 'pids', f'{jm.root.cgroup}/default/{jail}')}/pids.max")


def test_a_jail_without_a_limit_of_processes_has_one(jm: Instance, busybox_jail: MakeJail, h: Hierarchies) -> None:
    """The quickstart's jail. Mechanism: pids.max, of the jail and over all jails; other pids are left to the host."""
    name = busybox_jail()
    assert bound_of(jm, name, h) == str(PROCESSES)
    jm("set", name, "limits.processes=9000")
    assert bound_of(jm, name, h) == "9000"
    jm("unset", name, "limits.processes")
    assert bound_of(jm, name, h) == str(PROCESSES)
    of_all = int(read(f"{directory(h, 'pids', jm.root.cgroup)}/pids.max"))
    assert of_all == tasks_max()
    for most in ("pid_max", "threads-max"):
        assert of_all <= int(read(f"/proc/sys/kernel/{most}")) - 1024


def test_no_process_is_promised_by_the_default(jm: Instance, other_tenant: str, h: Hierarchies) -> None:
    """A tenant's total below the default: jails without a limit start, as many as before, and share the total."""
    jm("tenant", "set", other_tenant, "limits.processes=100")
    for name in ("one", "two"):
        jm("--tenant", other_tenant, "launch", "busybox", name)
    jm("--tenant", other_tenant, "launch", "busybox", "three", "--processes", "100")
    assert read(f"{directory(h, 'pids', f'{jm.root.cgroup}/{other_tenant}')}/pids.max") == "100"


def test_a_fork_bomb_leaves_the_host_usable(jm: Instance, busybox_jail: MakeJail, h: Hierarchies) -> None:
    """Mechanism: pids.max. The bomb stops at the limit, and the host forks meanwhile."""
    name = busybox_jail()
    jm("set", name, f"limits.processes={BOMB_MAX}")
    pids = directory(h, "pids", f"{jm.root.cgroup}/default/{name}")
    assert read(f"{pids}/pids.max") == str(BOMB_MAX), "no bomb without its limit"
    bomb = jm.popen("exec", name, "--", "/bin/sh", "-c", BOMB, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: int(read(f"{pids}/pids.events").split()[1]) >= 1, 20, "a fork of the bomb fails")
        for _ in range(20):
            assert subprocess.run(["true"], timeout=10).returncode == 0
        # The shell ends at the fork that failed; what it has started sleeps on.
        assert BOMB_MAX - 5 <= int(read(f"{pids}/pids.current")) <= BOMB_MAX
    finally:
        jm("stop", "--force", name)
        bomb.wait(20)


def quota(path: str) -> float:
    """CPUs' worth of time that a group may use."""
    if os.path.exists(f"{path}/cpu.max"):
        most, period = read(f"{path}/cpu.max").split()
    else:
        most, period = read(f"{path}/cpu.cfs_quota_us"), read(f"{path}/cpu.cfs_period_us")
    return int(most) / int(period)


def test_lxcfs_has_a_cpu_quota_that_the_next_one_has_too(jm: Instance, busybox_jail: MakeJail, h: Hierarchies) -> None:
    """Guests make it work by reading its files. Mechanism: a group of its own; with systemd, CPUQuota= of its scope."""
    if SYSTEMD or directory(h, "cpu", jm.root.cgroup) is None:
        pytest.skip("no group of ours: it is in a scope of systemd's, or the host has no cpu controller")
    busybox_jail()
    group = f"{directory(h, 'cpu', jm.root.cgroup)}/.lxcfs"
    for _ in range(2):
        pid = lxcfs_pid(jm)
        assert str(pid) in read(f"{group}/cgroup.procs").split()
        assert quota(group) == cpus_most()
        wait_renewed(jm, kill_lxcfs(jm))


def test_the_group_of_lxcfs_goes_with_it(new_instance: Callable[[], Instance], h: Hierarchies) -> None:
    if SYSTEMD or directory(h, "cpu", "x") is None:
        pytest.skip("no group of ours: it is in a scope of systemd's, or the host has no cpu controller")
    instance = new_instance()
    instance("launch", "busybox", "only", within=900)
    group = f"{directory(h, 'cpu', instance.root.cgroup)}/.lxcfs"
    assert os.path.isdir(group)
    instance("delete", "--force", "only")
    instance("engine", "stop")
    assert not os.path.exists(group)
    assert not os.path.exists(os.path.dirname(group))
