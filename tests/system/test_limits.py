"""Limits the kernel enforces, and the jail that lives on."""

from __future__ import annotations

import time

import pytest

from jailmgr.runtime import cgroups
from jailmgr.runtime.cgroup_hierarchies import relative
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, until

MIB = 1 << 20
HOG = "tail /dev/zero"
"""Keeps in memory all it reads, for want of a line's end."""
BACKGROUND = "</dev/null >/dev/null 2>&1 &"


def test_disk(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--disk", "100MiB")
    failed = jm.sh(name, "dd if=/dev/zero of=/root/big bs=1M count=200 && sync", status=1)
    assert "Disk quota exceeded" in failed.err
    assert jm.info(name)["usage"]["disk_bytes"] <= 100 * MIB
    jm.sh(name, "rm /root/big && sync")
    until(lambda: jm.info(name)["usage"]["disk_bytes"] < 50 * MIB, 60, "the space is given back")
    jm.sh(name, "dd if=/dev/zero of=/root/small bs=1M count=20 && sync")
    assert jm.status(name) == "Running"


def test_disk_can_grow_and_shrink_while_it_runs(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--disk", "50MiB")
    jm.sh(name, "dd if=/dev/zero of=/root/big bs=1M count=80", status=1)
    jm("set", name, "limits.disk=150MiB")
    jm.sh(name, "dd if=/dev/zero of=/root/big bs=1M count=80 && sync")
    refused = jm.refused("set", name, "limits.disk=20MiB", status=1)
    assert "Hint: " in refused.err
    assert jm("get", name, "limits.disk").out == "150MiB\n"


def test_one_jails_full_disk_is_not_anothers(jm: Instance, busybox_jail: MakeJail) -> None:
    full, other = busybox_jail("--disk", "30MiB"), busybox_jail("--disk", "100MiB")
    jm.sh(full, "dd if=/dev/zero of=/root/big bs=1M count=60", status=1)
    jm.sh(other, "dd if=/dev/zero of=/root/big bs=1M count=60 && sync")


def test_memory(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--memory", "64MiB", "-c", "limits.memory.swap=false")
    init = jm.info(name)["init_pid"]
    jm.sh(name, f"{HOG} & wait $!", status=137)
    after = jm.info(name)
    assert (after["status"], after["init_pid"]) == ("Running", init)
    assert after["usage"]["memory_bytes"] <= 64 * MIB
    jm.exec(name, "true")


def test_memory_can_be_changed_while_it_runs(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--memory", "48MiB", "-c", "limits.memory.swap=false")
    jm.sh(name, "dd if=/dev/zero of=/dev/null bs=80M count=1", status=137)
    said = jm("set", name, "limits.memory=256MiB")
    assert "restart" not in said.out + said.err
    jm.sh(name, "dd if=/dev/zero of=/dev/null bs=80M count=1")
    jm("unset", name, "limits.memory")
    assert jm.info(name)["limits"]["memory_bytes"] is None
    jm.sh(name, "dd if=/dev/zero of=/dev/null bs=300M count=1")


def test_memory_below_use_is_refused_or_kills_but_never_lies(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--memory", "256MiB", "-c", "limits.memory.swap=false")
    jm.sh(name, f"tail -c 100m /dev/zero {BACKGROUND}")
    until(lambda: jm.info(name)["usage"]["memory_bytes"] > 80 * MIB, 20, "memory is in use")
    changed = jm("set", name, "limits.memory=32MiB", status=None)
    told = jm("get", name, "limits.memory").out.strip()
    assert told == ("32MiB" if changed.status == 0 else "256MiB")
    assert jm.status(name) == "Running"
    if changed.status == 0:
        until(lambda: jm.info(name)["usage"]["memory_bytes"] <= 32 * MIB, 10, "the new limit holds")


def test_processes(jm: Instance, busybox_jail: MakeJail) -> None:
    name, other = busybox_jail("--processes", "50"), busybox_jail()
    init = jm.info(name)["init_pid"]
    jm.sh(name, f"bomb() {{ bomb | bomb & }}; bomb {BACKGROUND} sleep 2", status=None)
    assert jm.info(name)["usage"]["processes"] <= 50
    assert (jm.status(name), jm.info(name)["init_pid"]) == ("Running", init)
    jm.exec(other, "true")
    jm("stop", "--force", name, within=30)
    jm("start", name)
    jm.exec(name, "true")


def test_processes_can_be_changed_while_it_runs(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--processes", "20")
    spawn = "n=0; while [ $n -lt 40 ]; do sleep 30 & n=$((n+1)); done; wait"
    failed = jm.sh(name, f"timeout 5 sh -c '{spawn}'", status=None)
    assert "can't fork" in failed.err
    jm("restart", "--force", name)
    jm("set", name, "limits.processes=200")
    done = jm.sh(name, spawn.replace("sleep 30", "sleep 1"))
    assert done.err == ""


def test_cpu(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--cpus", "0.5")
    jm.sh(name, f"(while :; do :; done) {BACKGROUND} (while :; do :; done) {BACKGROUND}")
    assert _cpus_used(jm, name) < 0.75
    jm("set", name, "limits.cpu.allowance=20ms/100ms")
    assert _cpus_used(jm, name) < 0.35
    jm("unset", name, "limits.cpu.allowance")
    assert jm.info(name)["limits"]["cpu"] is None


def test_io(jm: Instance, busybox_jail: MakeJail) -> None:
    """On cgroup v1, where buffered writes go past any limit, none is taken."""
    name = busybox_jail()
    if "io" not in cgroups.discover().v2:
        refused = jm.refused("set", name, "root.limits.write=1MiB")
        assert "cgroup v1" in refused.err
        return
    write = "dd if=/dev/zero of=/root/big bs=1M count=6 conv=fsync 2>/dev/null"
    began = time.monotonic()
    jm.sh(name, write)
    free = time.monotonic() - began
    jm("set", name, "root.limits.write=1MiB")
    began = time.monotonic()
    jm.sh(name, write)
    assert time.monotonic() - began > 4
    jm("unset", name, "root.limits.write")
    began = time.monotonic()
    jm.sh(name, write)
    assert time.monotonic() - began < free + 3


def _cpus_used(jm: Instance, name: str) -> float:
    """CPU time over wall time, by the jail's own account over two seconds."""
    used, at = jm.info(name)["usage"]["cpu_ns"], time.monotonic()
    time.sleep(2)  # what is measured is a rate
    return float(jm.info(name)["usage"]["cpu_ns"] - used) / 1e9 / (time.monotonic() - at)


def test_the_tenants_group_is_above_the_jails(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    for controller, path in jm.info(name)["cgroups"].items():
        assert path.removesuffix("/payload").endswith(f"/{relative(jm.root.cgroup)}/default/{name}"), controller


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--memory", "lots"),
        ("--memory", "-1"),
        ("--disk", "12 apples"),
        ("--cpus", "0"),
        ("--cpus", "many"),
        ("--processes", "0"),
    ],
)
def test_bad_limits_are_refused_before_anything_is_made(jm: Instance, option: str, value: str) -> None:
    jm.refused("launch", "busybox", "bad", option, value, status=2)
    assert jm.gone("bad")
