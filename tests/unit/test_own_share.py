"""What a jail is to see of its share: the CPUs it is given, and both in its bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from jailmgr.manager.pins import choose_cpus
from jailmgr.runtime import cgroups
from jailmgr.runtime.bundle import Limits, Plan, compile_bundle, read_bundle
from jailmgr.runtime.cgroup_cpuset import format_cpus, parse_cpus
from jailmgr.runtime.lxcfs import files_of
from tests.unit.test_cgroups import mountinfo, v2_tree

PLAN = Plan("t", "j", "j", 1000, 100000, 65536, "jailmgr/t/j", "/lower", "/volume", ["/sbin/init"], "/lib")


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", []), ("0", [0]), ("0-2,5", [0, 1, 2, 5]), ("1,3\n", [1, 3]), ("10-11", [10, 11])],
)
def test_the_kernels_lists(text: str, cpus: list[int]) -> None:
    assert parse_cpus(text) == cpus
    assert parse_cpus(format_cpus(cpus)) == cpus


@pytest.mark.parametrize(
    ("taken", "number", "chosen"),
    [
        ([], 1, "0"),
        (["0"], 1, "1"),
        (["0", "1", "2"], 2, "0,3"),
        (["0-3", "0-3"], 2, "0,1"),
        (["0", "0", "1", "2,3"], 3, "1,2,3"),
        (["7"], 4, "0,1,2,3"),
    ],
)
def test_the_least_taken_are_chosen(taken: list[str], number: int, chosen: str) -> None:
    assert choose_cpus([0, 1, 2, 3], taken, number) == chosen


def test_v1s_cpuset_is_not_for_every_jail(tmp_path: Path) -> None:
    v1 = [(f"/c/{name}", "rw", "cgroup", f"rw,{name}") for name in ("cpu", "cpuset", "memory")]
    h = cgroups.discover(mountinfo(tmp_path, *v1))
    assert h.cpuset == "/c/cpuset"
    assert h.mounts == ("/c/cpu", "/c/memory")
    # Mounted together with one that all join, it can't be left to some.
    h = cgroups.discover(mountinfo(tmp_path, ("/c/all", "rw", "cgroup", "rw,cpu,cpuset")))
    assert (h.cpuset, h.mounts) == ("", ("/c/all",))


def test_v2s_cpuset_is_of_the_jails_group(tmp_path: Path) -> None:
    at = v2_tree(tmp_path / "cgroup", "cpuset cpu memory pids", "cpuset memory")
    h = cgroups.discover(mountinfo(tmp_path, (str(at), "rw", "cgroup2", "rw")))
    assert (h.cpuset, "cpuset" in h.v2) == ("", True)
    group = at / "jailmgr"
    group.mkdir()
    (at / "cpuset.cpus.effective").write_text("0-3\n")
    assert cgroups.host_cpus(h, "jailmgr") == [0, 1, 2, 3]
    (group / "cpuset.cpus.effective").write_text("2-3\n")
    assert cgroups.host_cpus(h, "jailmgr") == [2, 3]


def test_cpus_are_ocis() -> None:
    config = compile_bundle(PLAN._replace(limits=Limits(cpu_quota=200_000, cpus="0,3")))
    assert config["linux"]["resources"]["cpu"] == {"quota": 200_000, "period": 100_000, "cpus": "0,3"}
    assert read_bundle(config).limits.cpus == "0,3"
    assert read_bundle(compile_bundle(PLAN)).limits == Limits()


def test_the_list_of_cpus_is_for_those_with_some_of_them() -> None:
    def files(limits: Limits) -> tuple[str, ...]:
        return files_of(read_bundle(compile_bundle(PLAN._replace(limits=limits))))

    assert "proc/meminfo" in files(Limits())
    assert not any("cpu/online" in path for path in files(Limits(memory=1 << 30, cpu_quota=50_000)))
    assert set(files(Limits(cpus="0"))) - set(files(Limits())) == {"sys/devices/system/cpu/online"}
    assert "proc/stat" not in files(Limits(cpus="0")), "its btime is the host's"


def test_the_bundle_says_where_lxcfs_would_be() -> None:
    config = compile_bundle(PLAN._replace(lxcfs="/run/jailmgr/lxcfs/mount"))
    assert config["annotations"]["org.jailmgr.lxcfs"] == "/run/jailmgr/lxcfs/mount"
    assert read_bundle(config).lxcfs == "/run/jailmgr/lxcfs/mount"
