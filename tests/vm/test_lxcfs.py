"""Jails see their own share on a host with cgroup v2 alone, AppArmor and systemd, where lxcfs has a scope of its own.

The limit is on the jail's group, and the guest's processes are in groups below it: lxcfs has to walk up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from jailmgr.runtime import apparmor, cgroups
from jailmgr.runtime.cgroup_hierarchies import relative
from tests.system.instance import Instance, alive
from tests.system.netns import run
from tests.system.own_proc import (
    check_view,
    covered,
    cpus,
    kill_lxcfs,
    lxcfs_pid,
    meminfo,
    wait_renewed,
)
from tests.vm.conftest import cgroup_of, unit_property

MakeJail = Callable[..., str]
MIB = 1 << 20
HOST_CPUS = len(os.sched_getaffinity(0))


def host_memory() -> int:
    """KiB."""
    return int(Path("/proc/meminfo").read_text().split()[1])


def check_apart(host: Instance) -> None:
    """In a scope of our slice, neither with the jails nor with the engine."""
    group = cgroup_of(lxcfs_pid(host)).split("/")
    assert group[1] == "jailmgr.slice"
    assert group[2].endswith(".scope")
    assert group[2] != "jailmgr.scope"
    assert cgroup_of(host.engine_pid()) not in ("/".join(group), "")


def test_memory_is_the_jails_own_and_follows_its_limit(host: Instance, jail: MakeJail) -> None:
    name = jail("--memory", "128MiB")
    init = host.info(name)["init_pid"]
    assert cgroup_of(init).endswith("/payload")
    assert not apparmor.enabled() or apparmor.label_of(init) == "jailmgr (enforce)"
    check_view(host, name, 128)
    host("set", name, "limits.memory=200MiB")
    check_view(host, name, 200)
    host("unset", name, "limits.memory")
    assert meminfo(host, name) == host_memory()
    assert "proc/uptime" not in covered(host, name)
    assert float(host.exec(name, "cat", "/proc/uptime").out.split()[0]) < 300


def test_a_tenants_limit_is_seen_where_the_jail_has_none(host: Instance, jail: MakeJail) -> None:
    name, h = jail(), cgroups.discover()
    group = f"{host.root.cgroup}/default"
    cgroups.set_limits(h, group, cgroups.Limits(memory=256 * MIB))
    try:
        assert meminfo(host, name) == 256 << 10
    finally:
        cgroups.set_limits(h, group, cgroups.Limits())
    assert meminfo(host, name) == host_memory()


def test_the_number_of_cpus_follows_limits_cpu_alone(host: Instance, jail: MakeJail) -> None:
    every, one = (HOST_CPUS,) * 3, (1,) * 3
    name = jail("-c", "limits.cpu=1")
    assert cpus(host, name) == one
    host("set", name, "limits.cpu.allowance=20ms/100ms")
    assert cpus(host, name) == one
    host("unset", name, "limits.cpu")
    assert cpus(host, name) == every
    host("unset", name, "limits.cpu.allowance")
    host("set", name, "limits.cpu=1")
    assert cpus(host, name) == one
    pinned = Path("/sys/fs/cgroup", relative(f"{host.root.cgroup}/default/{name}"), "cpuset.cpus").read_text()
    assert pinned.strip().isdigit()


def test_it_is_in_a_scope_of_its_own_and_outlives_the_engine(host: Instance, jail: MakeJail) -> None:
    name = jail("--memory", "128MiB")
    check_apart(host)
    pid = lxcfs_pid(host)
    run("systemctl", "stop", "jailmgr.service")
    assert alive(pid)
    check_view(host, name, 128)
    assert lxcfs_pid(host) == pid


def test_the_distributions_service_does_not_matter(host: Instance, jail: MakeJail) -> None:
    name = jail("--memory", "128MiB")
    for action in ("stop", "start"):
        run("systemctl", action, "lxcfs.service")
        check_view(host, name, 128)


def test_a_killed_one_is_replaced_in_another_scope(host: Instance, jail: MakeJail) -> None:
    name, paused = jail("--memory", "128MiB"), jail("--memory", "64MiB")
    host("pause", paused)
    wait_renewed(host, kill_lxcfs(host))
    check_view(host, name, 128)
    host("resume", paused)
    check_view(host, paused, 64)
    check_apart(host)


def test_with_no_engine_the_next_one_replaces_it(host: Instance, jail: MakeJail) -> None:
    name = jail("--memory", "128MiB")
    run("systemctl", "stop", "jailmgr.service")
    old = kill_lxcfs(host)
    host("list")
    wait_renewed(host, old)
    check_view(host, name, 128)
    check_apart(host)


def test_it_goes_with_the_last_jail_and_the_engine(host: Instance, jail: MakeJail) -> None:
    name = jail()
    pid = lxcfs_pid(host)
    others = [row["name"] for row in host.json("list") if row["name"] != name and row["status"] == "Running"]
    assert not others, "the jails of other tests are gone"
    host("stop", "--force", name)
    host("engine", "stop")
    assert not alive(pid)
    assert host.root.lxcfs not in Path("/proc/self/mountinfo").read_text()
    assert unit_property("jailmgr.service", "Result") == "success"
