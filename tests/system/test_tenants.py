"""Tenants: made and changed by the command, and totals that hold whatever the jails in them do, as root."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jailmgr.runtime import cgroups
from jailmgr.runtime.cgroup_hierarchies import directory
from jailmgr.store import Store
from tests.system.conftest import MakeJail, numbers
from tests.system.instance import Instance, terminal, until

MIB = 1 << 20
BACKGROUND = "</dev/null >/dev/null 2>&1 &"
FOR_EVER = f"(while :; do :; done) {BACKGROUND}"
FIELDS = ("tenant", "limits", "allocated", "used", "users", "supervisor_pid")
RESOURCES = ("memory_bytes", "cpu", "processes", "disk_bytes", "instances")

MakeTenant = Callable[..., str]


@pytest.fixture
def make_tenant(jm: Instance) -> Iterator[MakeTenant]:
    """Makes tenants: `make_tenant("--memory", "64MiB")` gives the name. They go with all of their jails."""
    made: list[str] = []

    def make(*options: str) -> str:
        made.append(f"t{next(numbers)}")
        jm("tenant", "create", made[-1], *options)
        return made[-1]

    yield make
    for tenant in made:
        for jail in jm.json("--tenant", tenant, "list"):
            jm("delete", "--force", f"{tenant}/{jail['name']}")
        jm("tenant", "delete", tenant)


def launch(jm: Instance, tenant: str, count: int, *options: str) -> list[str]:
    names = [f"{tenant}/j{index}" for index in range(count)]
    for name in names:
        jm("launch", "busybox", name, *options)
    return names


def show(jm: Instance, tenant: str) -> dict[str, dict[str, float]]:
    found = jm.json("tenant", "show", tenant)
    assert isinstance(found, dict)
    return found


def group(jm: Instance, controller: str, tenant: str, jail: str = "") -> Path:
    found = directory(cgroups.discover(), controller, f"{jm.root.cgroup}/{tenant}{'/' if jail else ''}{jail}")
    assert found is not None
    return Path(found)


def test_from_create_to_delete(jm: Instance, make_tenant: MakeTenant) -> None:
    limits = ("--memory", "1GiB", "--cpus", "1.5", "--disk", "2GiB", "--jails", "3", "--processes", "500")
    name = make_tenant(*limits, "-c", "user.note=hers")
    for command in (("list",), ("usage",)):
        (found,) = [tenant for tenant in jm.json("tenant", *command) if tenant["tenant"] == name]
        assert all(field in found for field in FIELDS)
        assert all(resource in found[kind] for kind in ("limits", "allocated", "used") for resource in RESOURCES)
    (limits_, allocated) = (found["limits"], found["allocated"])
    assert [limits_[resource] for resource in RESOURCES] == [1 << 30, 1.5, 500, 2 << 30, 3]
    assert [allocated[resource] for resource in RESOURCES] == [0, 0, 0, 0, 0]
    launch(jm, name, 1, "--memory", "64MiB", "--cpus", "0.5", "--disk", "100MiB", "--processes", "50")
    (found,) = jm.json("tenant", "usage", name)
    assert [found["allocated"][resource] for resource in RESOURCES] == [64 * MIB, 0.5, 50, 100 * MIB, 1]
    used = found["used"]
    assert used["instances"] == 1
    assert used["processes"] >= 1
    assert 0 < used["memory_bytes"] < 64 * MIB
    assert used["cpu_ns"] > 0
    assert found["supervisor_pid"] == jm.info(f"{name}/j0")["supervisor_pid"]
    jm("tenant", "set", name, "limits.memory=2GiB", "limits.instances=4")
    assert jm("tenant", "get", name, "limits.memory").out == "2GiB\n"
    jm("tenant", "unset", name, "limits.memory")
    assert show(jm, name)["limits"]["memory_bytes"] is None
    for text in (jm("tenant", "list").out, jm("tenant", "show", name).out):
        assert name in text
    assert "has jails" in jm.refused("tenant", "delete", name).err


@pytest.mark.parametrize(
    ("argv", "status", "told"),
    [
        (("tenant", "create", "Not_A_Name"), 2, "DNS label"),
        (("tenant", "create", "x", "-c", "limits.memroy=1GiB"), 2, "limits.memory"),
        (("tenant", "create", "x", "-c", "security.privileged=true"), 2, "no such key"),
        (("tenant", "create", "x", "--memory", "lots"), 2, "size"),
        (("tenant", "create", "x", "--memory", "1GiB", "-c", "limits.memory=2GiB"), 2, "one of the two"),
        (("tenant", "create", "x", "-c", "users=nobody-of-that-name"), 2, "no user"),
        (("tenant", "create", "default"), 1, "already"),
        (("tenant", "set", "nowhere", "limits.memory=1GiB"), 1, "none of that name"),
        (("tenant", "delete", "nowhere"), 1, "none of that name"),
        (("launch", "busybox", "nowhere/web"), 1, "none of that name"),
    ],
)
def test_what_cannot_be_is_refused(jm: Instance, argv: tuple[str, ...], status: int, told: str) -> None:
    before = jm.json("tenant", "list")
    refused = jm.refused(*argv, status=status)
    assert told in refused.err
    assert [tenant["tenant"] for tenant in jm.json("tenant", "list")] == [tenant["tenant"] for tenant in before]


def test_io_is_held_or_refused(jm: Instance, make_tenant: MakeTenant) -> None:
    name = make_tenant()
    if "io" in cgroups.discover().v2:
        jm("tenant", "set", name, "limits.io=1MiB")
        launch(jm, name, 1)
        began = time.monotonic()
        jm.sh(f"{name}/j0", "dd if=/dev/zero of=/root/big bs=1M count=6 conv=fsync 2>/dev/null")
        assert time.monotonic() - began > 4
    else:
        assert "cgroup v1" in jm.refused("tenant", "set", name, "limits.io=1MiB").err
        assert show(jm, name)["config"] == {}


def test_a_hundred_at_once_get_ten(jm: Instance, make_tenant: MakeTenant) -> None:
    name = make_tenant("--jails", "10")

    def create(index: int) -> bool:
        body = {"source": {"type": "template", "alias": "busybox"}, "name": f"j{index}"}
        answer = jm.api("POST", f"/1.0/instances?project={name}", body)
        if answer["type"] == "async":
            answer = jm.api("GET", f"{answer['operation']}/wait?timeout=60")["metadata"]
            told = answer["err"] or ""
        else:
            told = answer["error"]
        assert not told or "limits.instances is 10" in told, answer
        return not told

    with ThreadPoolExecutor(25) as pool:
        assert sum(pool.map(create, range(100))) == 10
    assert len(jm.json("--tenant", name, "list")) == 10


def test_memory_runs_out_for_itself_only(jm: Instance, make_tenant: MakeTenant, busybox_jail: MakeJail) -> None:
    name, other = make_tenant("--memory", "96MiB", "-c", "limits.memory.swap=false"), busybox_jail()
    options = ("--memory", "96MiB", "-c", "limits.memory.swap=false", "-c", "restart=always")
    names = launch(jm, name, 1, *options)
    assert "96.0MiB are promised" in jm.refused("launch", "busybox", f"{name}/j1", *options).err
    jm("tenant", "set", name, "limits.overcommit=true")
    for index in (1, 2):
        names.append(f"{name}/j{index}")
        jm("launch", "busybox", names[-1], *options)
    inits = {jail: jm.info(jail)["init_pid"] for jail in names}
    for jail in names:
        jm.sh(jail, f"(while :; do tail /dev/zero; done) {BACKGROUND}", status=None)
    peak, slowest, until_ = 0, 0.0, time.monotonic() + 6
    while time.monotonic() < until_:
        peak = max(peak, int(show(jm, name)["used"]["memory_bytes"]))
        began = time.monotonic()
        jm.exec(other, "true")
        slowest = max(slowest, time.monotonic() - began)
    assert 48 * MIB < peak <= 96 * MIB
    assert slowest < 5
    for jail in names:
        info = until(lambda jail=jail: (found := jm.info(jail))["status"] == "Running" and found, 20, jail)  # type: ignore[misc]
        if info["init_pid"] != inits[jail]:
            assert info["last_ended"]["kind"] == "oom", info
    assert jm.info(other)["last_ended"] is None


def test_fork_bombs_in_all_of_its_jails(jm: Instance, make_tenant: MakeTenant, busybox_jail: MakeJail) -> None:
    name, other = make_tenant("--processes", "60"), busybox_jail()
    names = launch(jm, name, 3)
    bomb = f"n=0; while [ $n -lt 100 ]; do sleep 60 {BACKGROUND} n=$((n+1)); done"
    for jail in names:
        jm.sh(jail, bomb, status=None)
    assert 55 <= show(jm, name)["used"]["processes"] <= 60
    jm.sh(other, f"n=0; while [ $n -lt 100 ]; do sleep 1 {BACKGROUND} n=$((n+1)); done; wait")
    jm("tenant", "set", name, "limits.processes=200")
    jm.exec(names[0], "true")


def test_its_disk_is_full_for_itself_only(jm: Instance, make_tenant: MakeTenant, busybox_jail: MakeJail) -> None:
    name, other = make_tenant("--disk", "90MiB"), busybox_jail("--disk", "60MiB")
    # Project quotas don't nest: in a pool with these each jail of such a tenant must have one.
    nested = os.path.exists(jm.root.pool_file)
    for index in range(3):
        size = () if nested and index else ("--disk", "30MiB")
        jm("launch", "busybox", f"{name}/j{index}", *size)
    write = "dd if=/dev/zero of=/root/big bs=1M count=80; sync"
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda index: jm.sh(f"{name}/j{index}", write, status=None), range(3)))
    assert all("uota exceeded" in result.err or "No space" in result.err for result in ended), ended
    assert show(jm, name)["used"]["disk_bytes"] <= 90 * MIB
    assert jm.info(f"{name}/j0")["usage"]["disk_bytes"] <= 30 * MIB
    jm.sh(other, "dd if=/dev/zero of=/root/big bs=1M count=40 conv=fsync")
    refused = jm.refused("tenant", "set", name, "limits.disk=40MiB")
    assert ("used" if nested else "promised") in refused.err
    assert jm("tenant", "get", name, "limits.disk").out == "90MiB\n"
    jm("tenant", "set", name, "limits.disk=120MiB")
    if not nested:
        jm("set", f"{name}/j1", "limits.disk=60MiB")
    jm.sh(f"{name}/j1", "dd if=/dev/zero of=/root/more bs=1M count=20 conv=fsync")


def test_each_of_two_tenants_gets_half(jm: Instance, make_tenant: MakeTenant) -> None:
    """All CPUs busy in both: three jails with many processes get no more than one with as many as there are CPUs."""
    many, few = make_tenant(), make_tenant()
    for jail in launch(jm, many, 3):
        jm.sh(jail, FOR_EVER * 4)
    for jail in launch(jm, few, 1):
        jm.sh(jail, FOR_EVER * 4)
    before = [_cpu_ns(jm, tenant) for tenant in (many, few)]
    time.sleep(12)  # what is measured is a rate, with other tests on the same CPUs
    used = [_cpu_ns(jm, tenant) - was for tenant, was in zip((many, few), before, strict=True)]
    assert 0.75 < used[0] / used[1] < 1.33


def test_cpu_of_all_of_its_jails(jm: Instance, make_tenant: MakeTenant) -> None:
    name = make_tenant("--cpus", "0.4")
    for jail in launch(jm, name, 2):
        jm.sh(jail, FOR_EVER * 2)
    assert _cpus(jm, name) < 0.6
    jm("tenant", "set", name, "limits.cpu.allowance=20ms/100ms")
    assert _cpus(jm, name) < 0.35
    jm("tenant", "unset", name, "limits.cpu.allowance")
    assert _quota(jm, name) < 0


def _cpu_ns(jm: Instance, tenant: str) -> int:
    return cgroups.usage(cgroups.discover(), f"{jm.root.cgroup}/{tenant}")[1] or 0


def _cpus(jm: Instance, tenant: str) -> float:
    used, at = _cpu_ns(jm, tenant), time.monotonic()
    time.sleep(2)  # what is measured is a rate
    return (_cpu_ns(jm, tenant) - used) / 1e9 / (time.monotonic() - at)


def test_a_jails_cpu_is_never_more_than_its_tenants(jm: Instance, make_tenant: MakeTenant) -> None:
    """On cgroup v1 the kernel takes no other; both ways, live, for what starts later and for what reboots."""
    name = make_tenant("--cpus", "1", "-c", "limits.overcommit=true")
    (jail,) = launch(jm, name, 1, "--cpus", "2")
    for setting, cpus in (("limits.cpu=1", 1.0), ("limits.cpu.allowance=50ms/100ms", 0.5)):
        jm("tenant", "set", name, setting)
        assert _quota(jm, name) == cpus
        assert _quota(jm, name, "j0") in (cpus, 2.0)
    jm("restart", jail)
    assert _quota(jm, name, "j0") in (0.5, 2.0)
    jm("tenant", "set", name, "limits.cpu=4")
    jm("tenant", "unset", name, "limits.cpu.allowance")
    assert _quota(jm, name, "j0") == 2.0
    jm("set", jail, "limits.cpu=3")
    assert _quota(jm, name, "j0") == 3.0


def _quota(jm: Instance, tenant: str, jail: str = "") -> float:
    """Number of CPUs; negative for no limit."""
    at = group(jm, "cpu", tenant, jail)
    if (at / "cpu.max").exists():
        quota, period = (at / "cpu.max").read_text().replace("max", "-1").split()
    else:
        quota, period = ((at / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
    return int(quota) / int(period)


def test_memory_is_not_lowered_below_use(jm: Instance, make_tenant: MakeTenant) -> None:
    name = make_tenant("--memory", "200MiB", "-c", "limits.memory.swap=false")
    (jail,) = launch(jm, name, 1)
    jm.sh(jail, f"tail -c 80m /dev/zero {BACKGROUND}")
    until(lambda: show(jm, name)["used"]["memory_bytes"] > 70 * MIB, 20, "memory is in use")
    refused = jm.refused("tenant", "set", name, "limits.memory=32MiB")
    assert "in use" in refused.err
    assert "32.0 MiB" in refused.err
    assert jm("tenant", "get", name, "limits.memory").out == "200MiB\n"
    file = "memory.max" if "memory" in cgroups.discover().v2 else "memory.limit_in_bytes"
    assert int((group(jm, "memory", name) / file).read_text()) == 200 * MIB
    jm("stop", "--force", jail)
    jm("tenant", "set", name, "limits.memory=32MiB")


def test_the_page_cache_of_stopped_jails_is_counted_apart(jm: Instance, make_tenant: MakeTenant) -> None:
    """The kernel charges it to the tenant's group once the jail's is gone."""
    name = make_tenant()
    gone, stays = launch(jm, name, 2)
    jm.sh(gone, "head -c 60m /dev/zero >/root/file; sync")
    assert show(jm, name)["used"]["memory_bytes"] > 60 * MIB
    jm("stop", gone)
    used = show(jm, name)["used"]
    assert 0 < used["memory_bytes"] < 20 * MIB
    assert used["cache_bytes"] > 50 * MIB
    assert "left by stopped jails" in jm("tenant", "usage", name).out
    jm("stop", stays)
    assert show(jm, name)["used"]["memory_bytes"] == 0


def test_totals_outlive_the_engine_and_the_last_jail(jm: Instance, make_tenant: MakeTenant) -> None:
    name = make_tenant("--processes", "77")
    (jail,) = launch(jm, name, 1)
    jm("engine", "stop")
    assert (group(jm, "pids", name) / "pids.max").read_text() == "77\n"
    jm("stop", jail)
    jm("engine", "stop")
    jm("start", jail)
    assert (group(jm, "pids", name) / "pids.max").read_text() == "77\n"


@pytest.mark.parametrize("ends", [0.5, 4.0])
def test_a_change_that_a_crash_cut_off_is_gone_on_with(jm: Instance, make_tenant: MakeTenant, ends: float) -> None:
    """The store has it, the kernel and the jail's bundle not yet: lower than the jail's own, and higher."""
    name = make_tenant("--cpus", "1", "--processes", "70", "-c", "limits.overcommit=true")
    (jail,) = launch(jm, name, 1, "--cpus", "2")
    jm("engine", "stop")
    store = Store(jm.root.store)
    store.open()
    store.set_tenant_config(name, {"limits.cpu.allowance": f"{round(ends * 100)}ms/100ms"})
    store.close()
    jm.json("list")
    assert _quota(jm, name) == ends
    assert _quota(jm, name, "j0") in (min(ends, 2.0), 2.0)
    assert (group(jm, "pids", name) / "pids.max").read_text() == "max\n"
    before = jm.info(jail)["init_pid"]
    jm.sh(jail, "reboot", status=None)
    until(lambda: jm.info(jail)["init_pid"] not in (None, before), 20, "it reboots")


def test_memory_that_is_kept(jm: Instance, make_tenant: MakeTenant) -> None:
    name = make_tenant("--memory", "128MiB")
    if "memory" in cgroups.discover().v2:
        launch(jm, name, 1, "-c", "limits.memory.min=32MiB")
        assert int((group(jm, "memory", name, "j0") / "memory.min").read_text()) == 32 * MIB
        jm("set", f"{name}/j0", "limits.memory.min=16MiB")
        assert int((group(jm, "memory", name, "j0") / "memory.min").read_text()) == 16 * MIB
    else:
        refused = jm.refused("launch", "busybox", f"{name}/j0", "-c", "limits.memory.min=32MiB")
        assert "cgroup v1" in refused.err
        assert jm.json("--tenant", name, "list") == []


def test_what_is_restricted(jm: Instance, make_tenant: MakeTenant) -> None:
    name = make_tenant("-c", "restricted.ports=8000-8010", "-c", "restricted.images=debian")
    assert "restricted.images" in jm.refused("launch", "busybox", f"{name}/a").err
    jm("tenant", "set", name, "restricted.images=debian,busybox", "limits.ports=1")
    assert "8000-8010" in jm.refused("launch", "busybox", f"{name}/a", "-p", "8080:80").err
    launch(jm, name, 1, "-p", "8001:80")
    assert "limits.ports is 1" in jm.refused("port", "publish", f"{name}/j0", "8002:80").err
    assert [port["host_port"] for port in jm.json("--tenant", name, "port", "list")] == [8001]


def test_namespaces_run_out_for_itself_only(jm: Instance, make_tenant: MakeTenant) -> None:
    """The kernel counts them for each user, and a tenant's are made by a user of its own."""
    greedy, other = make_tenant(), make_tenant()
    (jail,) = launch(jm, greedy, 1)
    limit = Path("/proc/sys/user/max_user_namespaces")
    before = limit.read_text()
    try:
        limit.write_text("12")
    except PermissionError:
        pytest.skip("this host's root lacks CAP_SYS_RESOURCE, and may not make the limit small enough to reach")
    try:
        took = jm.sh(
            jail,
            f"n=0; while [ $n -lt 30 ]; do unshare -U sleep 60 {BACKGROUND} n=$((n+1)); done; sleep 1; unshare -U true",
            status=None,
        )
        assert took.status != 0, took.told()
        jm.refused("launch", "busybox", f"{greedy}/more")
        launch(jm, other, 2)
    finally:
        limit.write_text(before)


def test_top(jm: Instance, make_tenant: MakeTenant) -> None:
    name = make_tenant()
    idle, busy = launch(jm, name, 2, "--memory", "64MiB")
    jm.sh(busy, FOR_EVER)
    found = jm.json("--tenant", name, "top", "-d", "0.5", "-n", "2")
    assert [view["name"] for view in found] == ["j1", "j0"]
    assert found[0]["cpus"] > 0.2 > found[1]["cpus"]
    assert "/64.0MiB" in jm("--tenant", name, "top").out
    assert jm.info(idle)["usage"]["cpu_ns"] > 0


def test_what_was_used_in_a_span(jm: Instance, make_tenant: MakeTenant) -> None:
    name = make_tenant()
    (jail,) = launch(jm, name, 1)
    jm.sh(
        jail, "n=0; while [ $n -lt 300000 ]; do n=$((n+1)); done; dd if=/dev/zero of=/root/big bs=1M count=8 conv=fsync"
    )
    jm("delete", "--force", jail)
    (found,) = jm.json("tenant", "usage", name, "--since", "1h")
    assert found["jails"][0]["jail"] == "j0"
    assert 0.05 < found["cpu_seconds"] < 30
    assert found["running_hours"] > 0
    assert found["used"]["cpu_ns"] == pytest.approx(found["cpu_seconds"] * 1e9, abs=1e6)
    assert found["used"]["disk_bytes"] > 0
    assert found["allocated"]["instances"] == 0
    rows = jm("tenant", "usage", name, "--since", "1h", "--format", "csv").out.splitlines()
    assert rows[0].startswith("tenant,since,until,")
    assert rows[1].startswith(f"{name},")
    assert jm.json("tenant", "usage", name, "--until", "2h") == []
    jm.refused("tenant", "usage", "nobody", "--since", "1h")
    jm.refused("tenant", "usage", "--since", "yesterday-ish", status=2)
    jm.refused("tenant", "usage", "--since", "1h", "--until", "2h", status=2)


@pytest.mark.parametrize(("answer", "status"), [(b"n", 1), (b"y", 0)])
def test_a_deletion_is_asked_about_at_a_terminal(jm: Instance, answer: bytes, status: int) -> None:
    name = f"asked-{status}"
    jm("tenant", "create", name)
    with terminal(jm, "tenant", "delete", name) as term:
        term.expect(b"[y/N]", 20)
        term.write(answer + b"\n")
        assert term.wait(20) == status
    there = [tenant["name"] for tenant in jm.json("tenant", "list")]
    assert (name in there) == bool(status)
    jm("tenant", "delete", name, status=None)


def test_inotify_is_used_up_for_oneself_only(
    jm: Instance, debian_jail: MakeJail, other_tenant: str, debian: str
) -> None:
    greedy = debian_jail()
    stranger = f"{other_tenant}/stranger"
    jm("launch", debian, stranger, "--wait", within=180)
    count = "$(($(cat /proc/sys/fs/inotify/max_user_instances) + 50))"
    for name in (greedy, stranger):
        jm.sh(name, "touch /run/watched")  # on tmpfs: on an overlay tail polls
    jm.sh(greedy, f"n=0; while [ $n -lt {count} ]; do tail -f /run/watched {BACKGROUND} n=$((n+1)); done")
    until(
        lambda: "inotify" in jm.sh(greedy, "timeout 2 tail -f /run/watched 2>&1", status=None).out.lower(),
        60,
        "it is used up",
    )
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    os.close(fd)
    assert "inotify" not in jm.sh(stranger, "timeout 2 tail -f /run/watched 2>&1", status=None).out.lower()
    assert jm.exec(stranger, "systemctl", "is-system-running").out == "running\n"
