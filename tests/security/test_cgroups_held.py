"""Wall: the bounds of a jail.

Mechanism: limits are files of the host's root, in groups above the group that is delegated to the guest. That group is
the root of the guest's cgroup namespace (cgroup_namespaces(7)), so that no process of the guest can be moved out of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jailmgr.runtime.cgroup_hierarchies import relative
from tests.security.guest import OK, Guest
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, until

CLONE_NEWUSER, CLONE_NEWCGROUP = 0x10000000, 0x02000000
GIVEN = {"cgroup.procs", "cgroup.subtree_control", "cgroup.threads", "memory.oom.group", "memory.reclaim"}
"""Files of the delegated group that may be the guest's (cgroups(7), "Delegation"; /sys/kernel/cgroup/delegate)."""
LIMITS = ("--memory", "64MiB", "--processes", "60", "-c", "limits.cpu.allowance=50ms/100ms")
BOUNDS = (
    "memory.max", "memory.high", "memory.swap.max", "pids.max", "cpu.max", "cpu.weight", "cpuset.cpus", "io.max",
    "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes", "cpu.cfs_quota_us",
    "devices.list", "freezer.state", "cgroup.freeze", "cgroup.max.depth", "cgroup.max.descendants", "cpu.shares",
)  # fmt: skip


def groups(jm: Instance, jail: str) -> list[Path]:
    """The jail's groups and those above and below them, in every hierarchy that it is in."""
    found = []
    for at in map(Path, jm.info(jail)["cgroups"].values()):
        found += [at, at.parent, *[below for below in at.rglob("*") if below.is_dir()]]
    return found


def bounds(jm: Instance, jail: str) -> dict[str, str]:
    return {
        str(at / name): (at / name).read_text() for at in groups(jm, jail) for name in BOUNDS if (at / name).exists()
    }


@pytest.fixture
def limited(busybox_jail: MakeJail) -> str:
    return busybox_jail(*LIMITS)


def test_limits_can_not_be_written_from_inside(jm: Instance, limited: str) -> None:
    """Every file of the tree that the guest sees, from v2 and from each hierarchy of v1 that it can mount."""
    jm.exec(limited, "true")
    before = bounds(jm, limited)
    assert any("60" in value for value in before.values()), before
    kinds = " ".join(line.split()[0] for line in Path("/proc/cgroups").read_text().splitlines()[1:])
    script = f"""
        cd /sys/fs/cgroup
        for file in *.max *.high *.min *.low *.weight cpuset.cpus cgroup.freeze cgroup.kill cgroup.max.*; do
            [ -e "$file" ] && echo max 2>/dev/null >"$file" && [ "$file" != cgroup.kill ] && echo "$file"
        done
        mkdir /tmp/v1
        for kind in {kinds}; do
            mount -t cgroup -o $kind none /tmp/v1 2>/dev/null || continue
            for file in $(find /tmp/v1 -type f); do
                case $file in */cgroup.procs|*/tasks|*event_control) continue;; esac
                echo 1 2>/dev/null >$file && echo $file
                echo -1 2>/dev/null >$file && echo $file
            done
            mkdir /tmp/v1/mine 2>/dev/null && echo "$kind: a group"
            umount /tmp/v1
        done
        true"""
    assert jm.sh(limited, script).out == ""
    assert bounds(jm, limited) == before


def test_only_what_is_delegated_belongs_to_the_guest(jm: Instance, limited: str) -> None:
    """Mechanism: the delegated group's files are the host root's, but for those that cgroups(7) names."""
    script = "cd /sys/fs/cgroup; for file in *; do [ -f $file ] && stat -c '%u %n' $file; done"
    owned = {line.split()[1] for line in jm.sh(limited, script).out.splitlines() if line.split()[0] == "0"}
    assert "cgroup.procs" in owned
    assert owned <= GIVEN


def test_processes_stay_in_their_groups(jm: Instance, limited: str) -> None:
    """By names that lead above the root, and by cgroup namespaces of the guest's own."""
    way = "../" * 6
    for path in (f"/sys/fs/cgroup/{way}sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/../cgroup.procs"):
        jm.sh(limited, f"echo $$ 2>/dev/null >{path}", status=None)
    nested = (
        "unshare -C sh -c 'mkdir -p /tmp/c; mount -t cgroup2 none /tmp/c && echo 0 >/tmp/c/../cgroup.procs; ls /tmp/c'"
    )
    assert jm.root.cgroup not in jm.sh(limited, f"{nested} 2>/dev/null", status=None).out
    jm.sh(
        limited,
        "mkdir -p /sys/fs/cgroup/a/b && echo 0 >/sys/fs/cgroup/a/b/cgroup.procs;"
        " sleep 100 >/dev/null 2>&1 </dev/null &",
    )
    base = int(Path(f"/proc/{jm.info(limited)['init_pid']}/uid_map").read_text().split()[1])
    ours = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and _uid(entry) == base]
    assert len(ours) >= 2
    inits = _groups_of(Path(f"/proc/{jm.info(limited)['init_pid']}"))
    # Init is in the delegated group or a child of it, and so may the others be in any child of that.
    inits["0:"] = inits["0:"].partition("/payload")[0]
    for process in ours:
        for hierarchy, group in _groups_of(process).items():
            assert group.startswith(inits[hierarchy]), f"{process}: {hierarchy}{group}"
    held = [group for group in inits.values() if f"{relative(jm.root.cgroup)}/default/{limited}" in group]
    assert len(held) >= len(jm.info(limited)["cgroups"])


def _groups_of(process: Path) -> dict[str, str]:
    """By hierarchy, as /proc/PID/cgroup names it: the group of a process (cgroups(7))."""
    lines = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
    return {f"{number}:{controllers}": group for number, controllers, group in lines}


def _uid(process: Path) -> int:
    try:
        return process.stat().st_uid
    except FileNotFoundError:
        return -1


def test_a_process_of_another_jail_can_not_be_taken(guest: Guest) -> None:
    """Mechanism: cgroup.procs takes pids of the writer's pid namespace."""
    pid = os.getpid()
    assert guest.sh(f"echo {pid} 2>/dev/null >/sys/fs/cgroup/cgroup.procs || echo refused") == "refused\n"


def test_no_program_of_the_hosts_is_set_to_run(guest: Guest) -> None:
    """CVE-2022-0492. Mechanism: release_agent takes CAP_SYS_ADMIN of the host's namespace; here with one's own cgroup
    and user namespace, by each hierarchy that lets itself be mounted.
    """
    kinds = " ".join(line.split()[0] for line in Path("/proc/cgroups").read_text().splitlines()[1:])
    script = f"""
        mkdir -p /tmp/agent
        for kind in {kinds} none,name=systemd none,name=mine; do
            mount -t cgroup -o $kind none /tmp/agent 2>/dev/null || continue
            for file in $(find /tmp/agent -name release_agent -o -name notify_on_release); do
                echo 1 2>/dev/null >$file && echo $file
            done
            umount /tmp/agent
        done"""
    assert guest.sh(script) == ""
    assert guest.sh(f"unshare -U -r -m -C sh -c '{script}' 2>/dev/null", status=None) == ""


def test_a_group_of_the_guests_own_frees_it_of_nothing(jm: Instance, limited: str) -> None:
    """A fork bomb in groups that it made. Mechanism: limits are hierarchical."""
    jm.sh(
        limited,
        "for n in 1 2 3 4; do mkdir -p /sys/fs/cgroup/g$n; sh -c"
        ' "echo 0 >/sys/fs/cgroup/g$n/cgroup.procs; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do'
        ' sleep 100 & done" >/dev/null 2>&1 </dev/null & done',
        status=None,
    )
    until(lambda: jm.info(limited)["usage"]["processes"] >= 50, 20, "it is at its limit")
    assert jm.info(limited)["usage"]["processes"] <= 60
    jm("stop", "--force", limited, within=20)


def test_new_namespaces_free_it_of_nothing(guest: Guest) -> None:
    """Mechanism: a cgroup namespace begins where its maker is; a user namespace gives no right over the groups."""
    asked = guest.ask(("unshare", CLONE_NEWUSER | CLONE_NEWCGROUP), ("openat", -100, "/sys/fs/cgroup/cgroup.freeze", 1))
    assert asked[0] == OK
    assert asked[1] in ("EACCES", "EPERM")
