"""Wall: names of other tenants, jails, services and users in the host's cgroups.

Mechanism: cgroup namespaces (cgroup_namespaces(7)). A jail's processes are in a group of the jail's own in each mounted
hierarchy when its namespace is made, so that this group is the root of all that the guest sees. In the root of a v1
hierarchy there is also `release_agent`; the root of the namespace has none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from jailmgr.runtime import cgroups
from tests.security.guest import Guest
from tests.system.conftest import MakeJail
from tests.system.instance import Instance

OWN = re.compile(r"/(\.exec(-[0-9]+)?)?")
"""Groups of the jail's own, and leaves for what is exec'd (runtime/cgroup_exec.py)."""


def hierarchies() -> list[str]:
    """What mounts each v1 hierarchy of the host: its controllers, or its name (cgroups(7))."""
    lines = [line.split(":")[1] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    return [f"none,{each}" if each.startswith("name=") else each for each in lines if each]


def outside(groups: str) -> list[str]:
    """Lines of a /proc/PID/cgroup that show more than the jail: a path above its root, or one with names in it."""
    paths = {line: line.split(":", 2)[2] for line in groups.splitlines()}
    return [line for line, path in paths.items() if not OWN.fullmatch(path)]


def mounted(jm: Instance, jail: str) -> dict[str, list[str]]:
    """Directories and release agents in each v1 hierarchy that root of the jail can mount."""
    script = f"""
        mkdir -p /tmp/h
        for kind in {" ".join(hierarchies())}; do
            mount -t cgroup -o $kind none /tmp/h 2>/dev/null || continue
            echo "= $kind"
            find /tmp/h -mindepth 1 -type d
            find /tmp/h -name release_agent
            umount /tmp/h
        done"""
    found: dict[str, list[str]] = {}
    for line in jm.sh(jail, script).out.splitlines():
        if line.startswith("= "):
            found[line[2:]] = []
        else:
            found[[*found][-1]].append(line)
    return found


@pytest.fixture
def neighbour(jm: Instance, other_tenant: str) -> str:
    """A running jail of another tenant, whose groups are beside those of the guest's tenant."""
    jm("--tenant", other_tenant, "launch", "busybox", "secret-name")
    return "secret-name"


def test_paths_of_init_and_exec_begin_at_the_jail(jm: Instance, busybox_jail: MakeJail, neighbour: str) -> None:
    """/proc/PID/cgroup of all processes in the jail: init, and what is exec'd."""
    jail = busybox_jail()
    said = jm.sh(jail, "cat /proc/1/cgroup /proc/self/cgroup").out
    assert len(said.splitlines()) == 2 * len(Path("/proc/self/cgroup").read_text().splitlines())
    assert outside(said) == []


def test_paths_of_a_jail_with_cpus_of_its_own(jm: Instance, busybox_jail: MakeJail) -> None:
    """A pin that comes while the jail runs moves its processes in v1's cpuset, below the root of its namespace."""
    jail = busybox_jail()
    jm("set", jail, "limits.cpu=1")
    assert outside(jm.sh(jail, "cat /proc/1/cgroup /proc/self/cgroup").out) == []
    pinned = busybox_jail("-c", "limits.cpu=1")
    assert outside(jm.sh(pinned, "cat /proc/1/cgroup /proc/self/cgroup").out) == []
    assert not any(mounted(jm, pinned).values())


def test_mounted_hierarchies_show_nothing_of_the_host(jm: Instance, guest: Guest, neighbour: str) -> None:
    """Root of a jail mounts each v1 hierarchy: no directory is there, and no release_agent."""
    found = mounted(jm, guest.jail)
    if not found:
        assert not hierarchies(), "the guest can mount none of the host's v1 hierarchies"
        pytest.skip("this host has no cgroup v1 hierarchies")
    assert {kind: lines for kind, lines in found.items() if lines} == {}


def test_cp_works_in_the_groups_of_the_jail(jm: Instance, guest: Guest, tmp_path: Path) -> None:
    """The child of `cp` is in the jail's groups, as all processes are that the guest sees while a copy runs."""
    guest.sh("mkdir -p /tmp/held")
    script = """
        for entry in /proc/[0-9]*; do
            [ "$entry" = /proc/1 ] && continue
            cat $entry/cgroup 2>/dev/null
        done
        true"""
    # What is read while the copy runs: a large file keeps the child busy.
    guest.sh("dd if=/dev/zero of=/tmp/held/large bs=1M count=64 2>/dev/null")
    copying = jm.popen("cp", f"{guest.jail}:/tmp/held", str(tmp_path / "copy"))
    try:
        said = ""
        while copying.poll() is None:
            said += guest.sh(script)
    finally:
        copying.wait(60)
    assert copying.returncode == 0
    assert said
    assert outside(said) == []
    guest.sh("rm -r /tmp/held")


def test_every_hierarchy_that_can_be_written_has_a_group_of_the_jail(jm: Instance, guest: Guest) -> None:
    """From outside: init's group in each hierarchy ends in the jail's name, and it goes with the jail."""
    pid = jm.info(guest.jail)["init_pid"]
    h = cgroups.discover()
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    assert len(lines) == len({*h.mounts, *h.others.values()}) + bool(h.cpuset) + bool(h.unified)
    # With systemd our root is a scope of that name.
    held = [line for line in lines if re.search(f"/{jm.root.cgroup}(\\.scope)?/default/{guest.jail}", line)]
    assert held == lines
    assert all(os.path.isdir(path) for path in jm.info(guest.jail)["cgroups"].values())
