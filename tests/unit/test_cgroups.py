"""Choice of hierarchies and paths, and the order of limits, on trees of plain files."""

from __future__ import annotations

from pathlib import Path

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.runtime import cgroups
from jailmgr.runtime.cgroup_hierarchies import Hierarchies, directory, field, relative
from jailmgr.runtime.cgroup_limits import IoLimit, Limits, plan_limits

GROUP = "jailmgr/acme/web"
MIB = 1 << 20


def mountinfo(path: Path, *mounts: tuple[str, str, str, str]) -> str:
    """A mountinfo file of (mount point, mount options, type, super options)."""
    lines = ["22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw"]
    lines += [
        f"{n} 22 0:{n} / {at} {opts} shared:9 - {kind} none {more}"
        for n, (at, opts, kind, more) in enumerate(mounts, 30)
    ]
    file = path / "mountinfo"
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def v2_tree(path: Path, offered: str, passed: str) -> Path:
    path.mkdir()
    (path / "cgroup.controllers").write_text(offered + "\n")
    (path / "cgroup.subtree_control").write_text(passed + "\n")
    return path


def group_files(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text + "\n")


def test_v2_alone_has_every_controller(tmp_path: Path) -> None:
    at = v2_tree(tmp_path / "cgroup", "cpuset cpu io memory hugetlb pids rdma misc", "memory pids io")
    h = cgroups.discover(mountinfo(tmp_path, (str(at), "rw,nosuid", "cgroup2", "rw,nsdelegate")))
    assert h == Hierarchies(str(at), ("cpu", "memory", "pids", "io"), {}, ())
    assert directory(h, "memory", GROUP) == f"{at}/{GROUP}"
    assert directory(h, "devices", GROUP) is None


def test_hybrid_takes_each_controller_where_it_is(tmp_path: Path) -> None:
    unified = v2_tree(tmp_path / "unified", "hugetlb memory", "")
    v1 = {name: str(tmp_path / name) for name in ("cpu", "pids", "devices", "freezer", "memory")}
    mounts = [(at, "rw", "cgroup", f"rw,{name},cpuacct" if name == "cpu" else f"rw,{name}") for name, at in v1.items()]
    h = cgroups.discover(mountinfo(tmp_path, *mounts, (str(unified), "rw", "cgroup2", "rw")))
    assert h.v2 == ("memory",)
    assert h.v1 == {"cpu": v1["cpu"], "pids": v1["pids"], "devices": v1["devices"]}
    assert set(h.mounts) == set(h.v1.values())


def test_hierarchies_that_limit_nothing_are_known_by_their_names(tmp_path: Path) -> None:
    """Each once, however often it is mounted, named ones too; options that are no controller are left out."""
    memory, blkio = str(tmp_path / "memory"), str(tmp_path / "blkio")
    named, net = str(tmp_path / "systemd"), str(tmp_path / "net_cls,net_prio")
    agent = "release_agent=/lib/systemd/systemd-cgroups-agent"
    mounts = [
        (memory, "rw", "cgroup", "rw,memory"),
        (named, "rw", "cgroup", f"rw,xattr,{agent},name=systemd"),
        (net, "rw", "cgroup", "rw,net_cls,net_prio"),
        (blkio, "rw", "cgroup", "rw,blkio"),
        (str(tmp_path / "ro"), "ro", "cgroup", "rw,hugetlb"),
    ]
    file = mountinfo(tmp_path, *mounts)
    again = Path(file).read_text().splitlines()[-2].replace(blkio, str(tmp_path / "again"))
    Path(file).write_text(Path(file).read_text() + again + "\n")
    h = cgroups.discover(file)
    assert h.others == {"name=systemd": named, "net_cls,net_prio": net, "blkio": blkio}
    assert h.mounts == (memory,)
    assert cgroups.not_writable(file) == [str(tmp_path / "ro")]


def test_v1_alone_counts_and_freezes_by_controllers(tmp_path: Path) -> None:
    both = str(tmp_path / "cpu,cpuacct")
    others = [(str(tmp_path / name), "rw", "cgroup", f"rw,{name}") for name in ("memory", "freezer")]
    h = cgroups.discover(mountinfo(tmp_path, (both, "rw", "cgroup", "rw,cpu,cpuacct"), *others))
    assert h.unified == ""
    assert h.v1["cpu"] == h.v1["cpuacct"] == both
    assert h.mounts.count(both) == 1
    assert directory(h, "freezer", GROUP) == f"{tmp_path}/freezer/{GROUP}"


def test_mount_points_are_unescaped_and_read_only_ones_passed_over(tmp_path: Path) -> None:
    at = v2_tree(tmp_path / "a b", "memory", "")
    ro = ("/sys/fs/cgroup", "ro,nosuid", "cgroup2", "rw")
    h = cgroups.discover(mountinfo(tmp_path, ro, (str(at).replace(" ", "\\040"), "rw", "cgroup2", "rw")))
    assert h.unified == str(at)


def test_no_cgroups_is_told_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(JailmgrError) as caught:
        cgroups.discover(mountinfo(tmp_path))
    assert caught.value.code == "unavailable"
    assert "mount -t cgroup2" in caught.value.hint


@pytest.mark.parametrize("name", ["", "/", "/jailmgr", "jailmgr/", "jailmgr/../x", "jailmgr/./x", "a/b/c/d", "a/\0/c"])
def test_only_groups_of_ours_have_a_directory(name: str) -> None:
    with pytest.raises(JailmgrError):
        relative(name)


def test_a_jail_named_tasks_is_not_the_file_tasks() -> None:
    assert relative("jailmgr/tasks/tasks") == "jailmgr/tasks.d/tasks.d"
    assert relative(GROUP) == GROUP


def test_flat_keyed_fields() -> None:
    assert field("populated 1\nfrozen 0\n", "populated") == 1
    assert field("oom 3\noom_kill 2\noom_group_kill 0", "oom_kill") == 2
    assert field("", "populated") == 0


def v2(tmp_path: Path) -> Hierarchies:
    return Hierarchies(str(tmp_path), ("cpu", "memory", "pids"), {}, ())


def v1(tmp_path: Path) -> Hierarchies:
    mounts = {name: str(tmp_path / name) for name in ("cpu", "memory", "pids")}
    return Hierarchies("", (), mounts, tuple(mounts.values()))


def written(h: Hierarchies, limits: Limits) -> list[tuple[str, str]]:
    return [(step.path.rpartition("/")[2], step.value) for step in plan_limits(h, GROUP, limits)]


def test_io_limits_in_v2(tmp_path: Path) -> None:
    """Those of another device go: it was the pool's loop device when they were set."""
    group_files(tmp_path / GROUP, io__max="7:1 rbps=5 wbps=max riops=max wiops=max\n")
    h = v2(tmp_path)._replace(v2=("io",))
    assert written(h, Limits(io=IoLimit("8:0", None, MIB, 500))) == [
        ("io.max", "7:1 rbps=max wbps=max riops=max wiops=max"),
        ("io.max", f"8:0 rbps=max wbps={MIB} riops=500 wiops=max"),
    ]
    assert written(h, Limits()) == [("io.max", "7:1 rbps=max wbps=max riops=max wiops=max")]
    with pytest.raises(JailmgrError) as caught:
        plan_limits(v1(tmp_path)._replace(v1={}), GROUP, Limits(io=IoLimit("8:0", MIB)))
    assert caught.value.code == "unavailable"


def test_limits_in_v2(tmp_path: Path) -> None:
    group_files(tmp_path / GROUP, memory__swap__max="max")
    assert written(v2(tmp_path), Limits(64 * MIB, 0, 150_000, None, 200, 50, memory_min=MIB)) == [
        ("memory.max", str(64 * MIB)),
        ("memory.min", str(MIB)),
        ("memory.swap.max", "0"),
        ("cpu.max", "150000 100000"),
        ("cpu.weight", "200"),
        ("pids.max", "50"),
    ]
    assert written(v2(tmp_path), Limits()) == [
        ("memory.max", "max"),
        ("memory.min", "0"),
        ("memory.swap.max", "max"),
        ("cpu.max", "max 100000"),
        ("cpu.weight", "100"),
        ("pids.max", "max"),
    ]


@pytest.mark.parametrize(
    ("present", "limits", "order"),
    [
        (2**63 - 4096, Limits(64 * MIB, 0), ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]),
        (64 * MIB, Limits(128 * MIB, 0), ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]),
        (128 * MIB, Limits(64 * MIB, 32 * MIB), ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]),
        (64 * MIB, Limits(), ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]),
    ],
)
def test_memory_never_passes_memory_and_swap_in_v1(
    tmp_path: Path, present: int, limits: Limits, order: list[str]
) -> None:
    group_files(tmp_path / "memory" / GROUP, memory__limit_in_bytes=str(present), memory__memsw__limit_in_bytes="0")
    group_files(tmp_path / "cpu" / GROUP, cpu__cfs_period_us="100000")
    assert [name for name, _ in written(v1(tmp_path), limits) if name.startswith("memory.")] == order


def test_memory_and_swap_are_one_figure_in_v1(tmp_path: Path) -> None:
    group_files(tmp_path / "memory" / GROUP, memory__limit_in_bytes="0", memory__memsw__limit_in_bytes="0")
    group_files(tmp_path / "cpu" / GROUP, cpu__cfs_period_us="100000")
    assert ("memory.memsw.limit_in_bytes", str(96 * MIB)) in written(v1(tmp_path), Limits(64 * MIB, 32 * MIB))
    assert ("memory.memsw.limit_in_bytes", "-1") in written(v1(tmp_path), Limits(64 * MIB, None))


def test_a_new_period_goes_in_without_a_quota_in_v1(tmp_path: Path) -> None:
    group_files(tmp_path / "memory" / GROUP, memory__limit_in_bytes="0")
    group_files(tmp_path / "cpu" / GROUP, cpu__cfs_period_us="100000")
    assert written(v1(tmp_path), Limits(cpu_quota=5000, cpu_period=50_000))[1:4] == [
        ("cpu.cfs_quota_us", "-1"),
        ("cpu.cfs_period_us", "50000"),
        ("cpu.cfs_quota_us", "5000"),
    ]


@pytest.mark.parametrize(("weight", "shares"), [(None, 1024), (1, 10), (50, 512), (100, 1024), (10_000, 102_400)])
def test_weights_are_shares_in_v1(tmp_path: Path, weight: int | None, shares: int) -> None:
    group_files(tmp_path / "memory" / GROUP, memory__limit_in_bytes="0")
    group_files(tmp_path / "cpu" / GROUP, cpu__cfs_period_us="100000")
    assert ("cpu.shares", str(shares)) in written(v1(tmp_path), Limits(cpu_weight=weight))


@pytest.mark.parametrize("limits", [Limits(memory=MIB), Limits(cpu_quota=1000), Limits(processes=1)])
def test_a_limit_without_its_controller_is_refused(tmp_path: Path, limits: Limits) -> None:
    bare = Hierarchies(str(tmp_path), (), {}, ())
    with pytest.raises(JailmgrError) as caught:
        plan_limits(bare, GROUP, limits)
    assert caught.value.code == "unavailable"
    assert plan_limits(bare, GROUP, Limits()) == []


@pytest.mark.parametrize("limits", [Limits(cpu_quota=999), Limits(cpu_quota=1000, cpu_period=999)])
def test_a_quota_the_kernel_would_not_take_is_refused(tmp_path: Path, limits: Limits) -> None:
    with pytest.raises(JailmgrError) as caught:
        plan_limits(v2(tmp_path), GROUP, limits)
    assert caught.value.code == "invalid"


def test_device_rules_tell_where_nothing_can_hold_to_them() -> None:
    assert cgroups.device_rules(Hierarchies("", (), {}, ()), GROUP) is False


def test_counts_of_a_group_that_is_not_there(tmp_path: Path) -> None:
    assert cgroups.usage(v2(tmp_path), GROUP) == (None, None, None)
    assert cgroups.oom_kills(v2(tmp_path), GROUP) == 0
    assert cgroups.members(v2(tmp_path), GROUP) == []
    assert cgroups.list_groups(v2(tmp_path), "jailmgr") == []


def test_counts_in_v2(tmp_path: Path) -> None:
    group_files(
        tmp_path / GROUP,
        memory__current="4096",
        memory__events="low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0",
        cpu__stat="usage_usec 1500\nuser_usec 1000\nsystem_usec 500",
        pids__current="3",
    )
    assert cgroups.usage(v2(tmp_path), GROUP) == (4096, 1_500_000, 3)
    assert cgroups.oom_kills(v2(tmp_path), GROUP) == 2
