"""A jail sees its own share of memory and CPUs; lxcfs comes and goes, and the jail goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jailmgr.runtime import cgroups
from jailmgr.runtime.attach import ANSWER_SECONDS
from jailmgr.runtime.lxcfs import FILES, ONLINE
from jailmgr.runtime.state import supervisor_process
from tests.system.conftest import BUILD_WITHIN, MakeJail
from tests.system.instance import COMMAND, Instance, alive, kill, until
from tests.system.own_proc import (
    NAMES,
    began,
    check_view,
    covered,
    cpus,
    kill_lxcfs,
    lxcfs_pid,
    meminfo,
    mounts,
    wait_renewed,
)

LXCFS = "/usr/bin/lxcfs"
MIB = 1 << 20
DEAD = "Transport endpoint is not connected"
HOST_CPUS = len(os.sched_getaffinity(0))


def host_memory() -> int:
    """KiB."""
    return int(Path("/proc/meminfo").read_text().split()[1])


def test_memory_is_the_jails_own_and_follows_its_limit(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--memory", "128MiB")
    check_view(jm, name, 128)
    jm("set", name, "limits.memory=200MiB")
    check_view(jm, name, 200)
    jm("unset", name, "limits.memory")
    assert meminfo(jm, name) == host_memory()


def test_free_says_the_limit(jm: Instance, debian_jail: MakeJail) -> None:
    name = debian_jail("--memory", "128MiB")
    total = jm.exec(name, "free", "-m").out.splitlines()[1].split()[1]
    assert total == "128"
    assert jm.exec(name, "systemctl", "is-system-running").out == "running\n"


def test_a_tenants_limit_is_seen_where_the_jail_has_none_or_more(
    jm: Instance, other_tenant: str, busybox_jail: MakeJail
) -> None:
    for name, memory in (("none", "0"), ("more", "1GiB"), ("less", "64MiB")):
        options = ["--memory", memory] if memory != "0" else []
        jm("--tenant", other_tenant, "launch", "busybox", name, *options)
    group, h = f"{jm.root.cgroup}/{other_tenant}", cgroups.discover()
    cgroups.set_limits(h, group, cgroups.Limits(memory=256 * MIB))
    assert [meminfo(jm, f"{other_tenant}/{name}") >> 10 for name in ("none", "more", "less")] == [256, 256, 64]
    cgroups.set_limits(h, group, cgroups.Limits())
    assert meminfo(jm, f"{other_tenant}/none") == host_memory()


def test_uptime_and_load_are_the_jails_own(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    assert "proc/uptime" not in covered(jm, name)
    assert float(jm.exec(name, "cat", "/proc/uptime").out.split()[0]) < 60
    running, _, processes = jm.exec(name, "cat", "/proc/loadavg").out.split()[3].partition("/")
    assert int(running) <= int(processes) < 50


def test_fewer_cpus_at_once(jm: Instance, busybox_jail: MakeJail) -> None:
    """But for the list of CPUs in /sys, which is the kernel's until the next start."""
    name = busybox_jail()
    jm("set", name, "limits.cpu=1")
    assert cpus(jm, name) == (1, 1, HOST_CPUS)
    jm("restart", "--force", name)
    assert cpus(jm, name) == (1, 1, 1)


def test_the_number_of_cpus_follows_limits_cpu_alone(jm: Instance, busybox_jail: MakeJail) -> None:
    every, one = (HOST_CPUS,) * 3, (1,) * 3
    name = busybox_jail("-c", "limits.cpu=1")
    assert cpus(jm, name) == one
    assert abs(began(jm, name) - time.time()) < 600, "the jail's boot, not the host's"
    jm("set", name, "limits.cpu.allowance=20ms/100ms")
    assert cpus(jm, name) == one
    jm("unset", name, "limits.cpu")
    assert cpus(jm, name) == every
    jm("set", name, f"limits.cpu={HOST_CPUS + 1}")
    assert cpus(jm, name) == every
    jm.sh(name, "sleep 100 </dev/null >/dev/null 2>&1 & echo $! >/root/pid")
    jm("set", name, "limits.cpu=1")
    assert cpus(jm, name) == one
    allowed = jm.sh(name, "grep Cpus_allowed_list /proc/1/status /proc/$(cat /root/pid)/status").out.split()
    assert allowed[1] == allowed[3]


@pytest.mark.skipif(HOST_CPUS < 2, reason="needs two CPUs")
def test_cpus_are_those_that_the_fewest_jails_have(jm: Instance, busybox_jail: MakeJail) -> None:
    def of(name: str) -> str:
        return jm.sh(name, "grep Cpus_allowed_list /proc/1/status").out.split()[1]

    first, second = busybox_jail("-c", "limits.cpu=1"), busybox_jail("-c", "limits.cpu=1")
    assert of(first) != of(second)
    jm("stop", "--force", first)
    third = busybox_jail("-c", "limits.cpu=1")
    kept = of(third)
    assert kept != of(second)
    jm("stop", "--force", second)
    kill(jm.engine_pid())
    assert of(busybox_jail("-c", "limits.cpu=1")) != kept, "the next engine knows what a jail that runs has"
    jm.sh(third, "reboot -f", status=None)
    until(lambda: jm.status(third) == "Running" and jm.info(third)["restarts"] == 1)
    assert of(third) == kept


@pytest.mark.skipif(HOST_CPUS < 2, reason="needs two CPUs")
def test_programs_count_the_cpus_of_limits_cpu(jm: Instance, debian_jail: MakeJail) -> None:
    """glibc's count is what Python, nginx and make -j use. Processes began with the jail, as ps(1) reckons."""
    name = debian_jail("-c", "limits.cpu=1")
    assert jm.exec(name, "getconf", "_NPROCESSORS_ONLN").out == "1\n"
    since = int(jm.exec(name, "date", "+%s", "-d", jm.exec(name, "ps", "-o", "lstart=", "-p", "1").out.strip()).out)
    assert 0 <= time.time() - since < 600
    jm("set", name, f"limits.cpu={HOST_CPUS}")
    assert jm.exec(name, "getconf", "_NPROCESSORS_ONLN").out == f"{HOST_CPUS}\n"


@pytest.mark.skipif(HOST_CPUS < 2, reason="needs two CPUs")
def test_a_tenants_total_takes_no_jail_off_its_cpus(jm: Instance, other_tenant: str) -> None:
    """On v1 the jail's own quota is set anew with the tenant's."""
    name = f"{other_tenant}/one"
    jm("--tenant", other_tenant, "launch", "busybox", "one", "-c", "limits.cpu=1")
    for total in ("50ms/100ms", "80ms/100ms"):
        jm("tenant", "set", other_tenant, "limits.overcommit=true", f"limits.cpu.allowance={total}")
        assert cpus(jm, name) == (1, 1, 1)
    jm("tenant", "unset", other_tenant, "limits.cpu.allowance")
    assert cpus(jm, name) == (1, 1, 1)


def test_killed_lxcfs_is_replaced_and_jails_go_on(jm: Instance, other_tenant: str, busybox_jail: MakeJail) -> None:
    name, other, paused = busybox_jail("--memory", "64MiB"), f"{other_tenant}/one", busybox_jail("--memory", "32MiB")
    jm("--tenant", other_tenant, "launch", "busybox", "one", "--memory", "96MiB")
    full = busybox_jail()
    jm("set", full, "limits.processes=1")
    jm("pause", paused)
    inits = [jm.info(jail)["init_pid"] for jail in (name, other, paused, full)]
    wait_renewed(jm, kill_lxcfs(jm))
    check_view(jm, name, 64)
    check_view(jm, other, 96)
    jm("resume", paused)
    check_view(jm, paused, 32)
    assert covered(jm, full) == sorted(FILES)
    assert [jm.info(jail)["init_pid"] for jail in (name, other, paused, full)] == inits
    jm("doctor", status=None)


def test_killed_along_with_the_supervisor(jm: Instance, busybox_jail: MakeJail) -> None:
    """The engine sees both ends at once, and takes the supervisor's for the later one, or the earlier."""
    name, supervisor = busybox_jail("--memory", "64MiB"), supervisor_process(jm.root, "default")
    assert supervisor is not None
    engine, old = jm.engine_pid(), lxcfs_pid(jm)
    os.kill(engine, signal.SIGSTOP)
    try:
        kill(supervisor.pid)
        kill_lxcfs(jm)
    finally:
        os.kill(engine, signal.SIGCONT)
    wait_renewed(jm, old)
    check_view(jm, name, 64)


def test_a_supervisor_that_hangs_gets_the_files_later(jm: Instance, other_tenant: str, busybox_jail: MakeJail) -> None:
    name, hanging = busybox_jail("--memory", "64MiB"), f"{other_tenant}/one"
    jm("--tenant", other_tenant, "launch", "busybox", "one", "--memory", "96MiB")
    supervisor = supervisor_process(jm.root, other_tenant)
    assert supervisor is not None
    os.kill(supervisor.pid, signal.SIGSTOP)
    try:
        kill_lxcfs(jm)
        log = Path(jm.root.run, "engine.log")
        told = f"lxcfs: tenant {other_tenant}: supervisor of {other_tenant}: does not answer"
        new = busybox_jail("--memory", "32MiB")
        assert told not in log.read_text(), "a start waited for it"
        until(lambda: told in log.read_text(), ANSWER_SECONDS + 10, "it has been given up")
        until(lambda: covered(jm, name) == covered(jm, new) == sorted(FILES), 10, "the other tenant's have their files")
        check_view(jm, name, 64)
        check_view(jm, new, 32)
    finally:
        os.kill(supervisor.pid, signal.SIGCONT)
    until(lambda: not Path(jm.root.run, "lxcfs", "stale").exists(), 20, "all jails have the files")
    check_view(jm, hanging, 96)


def test_with_no_engine_the_next_one_replaces_it(jm: Instance, busybox_jail: MakeJail) -> None:
    name, rebooting = busybox_jail("--memory", "64MiB"), busybox_jail("--memory", "64MiB")
    jm("engine", "stop")
    old = kill_lxcfs(jm)
    assert DEAD in jm.exec(name, "cat", "/proc/meminfo", status=1).err
    jm.sh(name, "cat /proc/uptime /proc/self/status >/dev/null")
    jm.sh(rebooting, "reboot -f", status=None)
    until(lambda: jm.exec(rebooting, "cat", "/proc/meminfo", status=None).status == 0, 20, "it is up again")
    assert meminfo(jm, rebooting) == host_memory()
    jm("list")
    wait_renewed(jm, old)
    check_view(jm, name, 64)
    check_view(jm, rebooting, 64)


def test_a_killed_engine_finds_its_lxcfs_again(jm: Instance, busybox_jail: MakeJail) -> None:
    name, pid = busybox_jail("--memory", "64MiB"), lxcfs_pid(jm)
    kill(jm.engine_pid())
    jm("list")
    assert lxcfs_pid(jm) == pid
    wait_renewed(jm, kill_lxcfs(jm))
    check_view(jm, name, 64)


HOSTILE = {
    "a tmpfs of links": "umount -l /proc; mount -t tmpfs x /proc; for f in {files}; do ln -s /root/$f /proc/$f; done",
    "a tmpfs of files": "umount -l /proc; mount -t tmpfs none /proc; for f in {files}; do echo mine >/proc/$f; done",
    "a link": "mkdir /root/proc && mount -o move /proc /root/proc && rmdir /proc && ln -s root/proc /proc",
    "nothing": "umount -l /proc; rmdir /proc",
    "files of its own": "for f in {files}; do echo mine >/root/$f; mount --bind /root/$f /proc/$f; done",
    "other files of proc": "for f in {files}; do mount --bind /proc/self/status /proc/$f; done",
}
CPUS = f"/{os.path.dirname(ONLINE)}"
HOSTILE_SYS = {
    "a tmpfs of links": f"mount -t tmpfs x {CPUS}; ln -s /root/meminfo {CPUS}/online",
    "a tmpfs of files": f"umount -l /sys; mount -t tmpfs x /sys; mkdir -p {CPUS}; echo mine >{CPUS}/online",
}
BOUND = f"mount --bind /root/meminfo {CPUS}/online"
"""The same for the list of CPUs in /sys."""


@pytest.mark.parametrize("how", HOSTILE)
def test_what_the_guest_has_put_there_stays(jm: Instance, busybox_jail: MakeJail, how: str) -> None:
    # An engine gives up on an lxcfs that ends too often in too short a time, as here; the next one has seen none end.
    jm("engine", "stop")
    hostile, other = busybox_jail("-c", "limits.cpu=1"), busybox_jail("--memory", "64MiB")
    jm.sh(hostile, f"mount --make-rprivate /; cd /root; for f in {' '.join(NAMES)}; do echo target >$f; done")
    jm.sh(hostile, f"set -e; {HOSTILE[how].format(files=' '.join(NAMES))}; {HOSTILE_SYS.get(how, BOUND)}")
    before = mounts(jm, hostile)
    wait_renewed(jm, kill_lxcfs(jm))
    check_view(jm, other, 64)
    assert mounts(jm, hostile) == before
    content = "mine" if how == "files of its own" else "target"
    assert jm.sh(hostile, f"cd /root; cat {' '.join(NAMES)}").out.split() == [content] * len(NAMES)
    jm("stop", "--force", hostile)


def test_what_the_guest_has_taken_away_comes_back_with_the_next(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--memory", "64MiB")
    jm.sh(name, "umount /proc/meminfo /proc/loadavg")
    assert meminfo(jm, name) == host_memory()
    wait_renewed(jm, kill_lxcfs(jm))
    check_view(jm, name, 64)


MOUNT_STAT = """
import os, sys
from jailmgr.runtime import syscalls as kernel
made = kernel.open_tree(f"{sys.argv[1]}/proc/stat")
kernel.mount_setattr(made, propagation=kernel.MS_PRIVATE)
kernel.setns(os.open(f"/proc/{sys.argv[2]}/ns/mnt", os.O_RDONLY), kernel.CLONE_NEWNS)
kernel.move_mount(made, os.open("/proc/stat", os.O_PATH))
"""


def test_a_jail_of_an_earlier_release_gets_the_kernels_stat(jm: Instance, busybox_jail: MakeJail) -> None:
    """Such a jail has lxcfs' file there, which would answer ENOTCONN after the end of that lxcfs."""
    name = busybox_jail("-c", "limits.cpu=1")
    argv = [sys.executable, "-c", MOUNT_STAT, jm.root.lxcfs, str(jm.info(name)["init_pid"])]
    subprocess.run(argv, check=True, timeout=20)
    assert "proc/stat" in covered(jm, name)
    wait_renewed(jm, kill_lxcfs(jm))
    assert covered(jm, name) == sorted([*FILES, ONLINE])
    assert abs(began(jm, name) - time.time()) < 600


def test_services_with_mounts_of_their_own_get_the_next_ones_files(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--memory", "64MiB", "-c", "limits.cpu=1")
    for options in ("-m", "-m -U -r"):
        jm.sh(name, f"unshare {options} sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >>/root/pids")
    inside = "for pid in $(cat /root/pids); do nsenter -t $pid -m grep -c fuse.lxcfs /proc/self/mountinfo; done"
    files = len(FILES) + (HOST_CPUS > 1)
    until(lambda: jm.sh(name, inside).out.split() == [str(files)] * 2, 10, "both have namespaces of their own")
    wait_renewed(jm, kill_lxcfs(jm))
    first = "nsenter -t $(head -n 1 /root/pids) -m head -n 1 /proc/meminfo"
    assert jm.sh(name, first).out.split()[1] == str(64 << 10)
    assert jm.sh(name, inside).out.split()[0] == str(files)
    assert meminfo(jm, name) == 64 << 10


def test_a_guest_does_not_see_lxcfs_own_tree(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    roots = [
        line.split()[3]
        for line in Path("/proc", str(jm.info(name)["init_pid"]), "mountinfo").read_text().splitlines()
        if "fuse.lxcfs" in line
    ]
    assert sorted(roots) == sorted(f"/{file}" for file in FILES)


def test_without_lxcfs_a_jail_has_what_the_kernel_shows(new_instance: Callable[[], Instance]) -> None:
    """The engine runs where the program is hidden."""
    instance = new_instance()
    hidden = f"mount --bind /dev/null {LXCFS} && exec {COMMAND} engine run"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", hidden],
        env=instance.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as engine:
        try:
            until(lambda: instance.json("engine", "status")["running"], 20, "the engine serves")
            instance("launch", "busybox", "one", "--memory", "64MiB", within=BUILD_WITHIN)
            assert covered(instance, "one") == []
            assert meminfo(instance, "one") == host_memory()
            assert not Path(instance.root.run, "lxcfs").exists()
            instance("delete", "--force", "one")
        finally:
            engine.send_signal(signal.SIGTERM)


def test_nothing_is_left_when_the_last_jail_and_the_engine_have_gone(new_instance: Callable[[], Instance]) -> None:
    instance = new_instance()
    instance("launch", "busybox", "one", within=BUILD_WITHIN)
    pid = lxcfs_pid(instance)
    assert os.path.ismount(instance.root.lxcfs)
    instance("engine", "stop")
    assert alive(pid), "a jail runs"
    instance("delete", "--force", "one")
    instance("engine", "stop")
    assert not alive(pid)
    assert instance.root.lxcfs not in Path("/proc/self/mountinfo").read_text()
    assert not Path(instance.root.run, "lxcfs").exists()


@pytest.mark.xdist_group("doctor-fix")
@pytest.mark.parametrize("by", ["doctor", "engine"])
def test_kill_of_everything_leaves_what_is_found_and_taken_away(new_instance: Callable[[], Instance], by: str) -> None:
    instance = new_instance()
    instance("launch", "busybox", "one", within=BUILD_WITHIN)
    init, supervisor = instance.info("one")["init_pid"], supervisor_process(instance.root, "default")
    assert supervisor is not None
    for pid in (instance.engine_pid(), supervisor.pid, lxcfs_pid(instance), init):
        kill(pid)
    found = {check["check"]: check for check in instance("doctor", "--format", "json", status=None).json}
    assert "lxcfs and its mount" in found["leftovers"]["detail"]
    if by == "doctor":
        instance("doctor", "--fix", status=None)
    else:
        instance("list")
    assert instance.root.lxcfs not in Path("/proc/self/mountinfo").read_text()
    assert not Path(instance.root.run, "lxcfs").exists()
