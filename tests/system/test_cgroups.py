"""Groups on the host's own hierarchies, below a root of the test's own; nothing is mocked.

Where the host has v1, all is done a second time as on a host without v2, by hiding that tree from `discover`.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from jailmgr.config import find_root
from jailmgr.errors import JailmgrError
from jailmgr.runtime import cgroups, scope
from jailmgr.runtime.cgroup_exec import exec_leaves
from jailmgr.runtime.cgroup_hierarchies import SYSTEMD, Hierarchies, directory, read, relative, write
from jailmgr.runtime.cgroups import Limits
from tests.system.instance import until

MIB = 1 << 20
BASE = 0x7000_0000
FORK_BOMB = """
import os, sys
made = 0
while made < 200:
    try:
        if os.fork() == 0:
            import signal
            while True:
                signal.pause()
    except BlockingIOError:
        break
    made += 1
print(made, flush=True)
sys.stdin.read()
"""
HOLD = "import sys; held = bytearray({size}); print('held', flush=True); sys.stdin.read()"
SUPERVISOR = """
import sys
from jailmgr.runtime import scope
scope.enter(sys.argv[1])
print("in", flush=True)
sys.stdin.read()
"""
TICK = "import os\nwhile True: os.write(1, b'.')"


class Jail:
    """A jail's group with its tenant's, and the processes the test put there."""

    def __init__(self, h: Hierarchies, root_name: str) -> None:
        self.h, self.root_name, self.tenant = h, root_name, f"{root_name}/acme"
        self.cgroup = f"{self.tenant}/web"
        self.started: list[subprocess.Popen[bytes]] = []
        cgroups.tenant_group(h, root_name, "acme")
        cgroups.create_jail_group(h, self.cgroup, BASE)

    def run(self, program: str, leaf: str = cgroups.PAYLOAD) -> subprocess.Popen[bytes]:
        """Python in the group from its first instruction on; stdin and stdout are pipes."""
        process = subprocess.Popen(
            ["/bin/sh", "-c", 'read go; exec "$@"', "sh", sys.executable, "-u", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.started.append(process)
        cgroups.join(self.h, self.cgroup, process.pid, leaf)
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
        return process

    def said(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    def place(self, controller: str, name: str) -> str:
        return f"{directory(self.h, controller, self.cgroup)}/{name}"


def hierarchies(kind: str, path: Path) -> Hierarchies:
    if kind == "host":
        return cgroups.discover()
    lines = Path("/proc/self/mountinfo").read_text().splitlines(keepends=True)
    if not any(" - cgroup " in line for line in lines):
        pytest.skip("this host has no cgroup v1 hierarchies")
    file = path / "mountinfo"
    file.write_text("".join(line for line in lines if " - cgroup2 " not in line))
    return cgroups.discover(str(file))


@contextmanager
def new_jail(kind: str, path: Path) -> Iterator[Jail]:
    h = hierarchies(kind, path)
    root_name = find_root(str(path)).cgroup
    with supervised(root_name):
        made = Jail(h, root_name)
        try:
            yield made
        finally:
            cgroups.kill(h, made.cgroup)
            for process in made.started:
                process.communicate()
            cgroups.remove(h, made.cgroup)
            cgroups.remove(h, made.tenant)
            cgroups.remove_root(h, root_name)
    gone = [f"{mount}/{relative(root_name)}" for mount in (*h.mounts, h.cpuset, *h.others.values(), h.unified) if mount]
    until(lambda: not any(os.path.exists(path) for path in gone), 10, gone)


@contextmanager
def supervised(root_name: str) -> Iterator[None]:
    """On a host with systemd, a process in the scope that supervisors are in: the groups are only there with one."""
    if not SYSTEMD:
        yield
        return
    argv = scope.begin(root_name, [sys.executable, "-c", SUPERVISOR, scope.directory(root_name)])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        yield


@pytest.fixture(params=["host", "v1 alone"])
def jail(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Jail]:
    with new_jail(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def v2_jail(tmp_path: Path) -> Iterator[Jail]:
    """For what there is on v2 only."""
    if not cgroups.discover().unified:
        pytest.skip("this host has no cgroup v2 hierarchy")
    with new_jail("host", tmp_path) as made:
        yield made


def test_a_process_is_in_every_group_of_the_jail(jail: Jail) -> None:
    process = jail.run("import sys; print(open('/proc/self/cgroup').read().replace(chr(10), ' ')); sys.stdin.read()")
    groups = jail.said(process).decode().split()
    at = {line.split(":")[1]: line.split(":", 2)[2] for line in groups}
    for controller in jail.h.v1:
        assert next(where for names, where in at.items() if controller in names.split(",")).endswith(f"/{jail.cgroup}")
    if jail.h.unified:
        assert at[""].endswith(f"/{relative(jail.cgroup)}/payload")
    assert cgroups.members(jail.h, jail.cgroup) == [process.pid]
    assert cgroups.members(jail.h, jail.tenant) == [process.pid]
    memory, cpu, processes = cgroups.usage(jail.h, jail.cgroup)
    assert memory is not None
    assert memory > 0
    assert cpu is not None
    assert cpu > 0
    assert processes == 1


def test_a_child_joins_by_itself(jail: Jail) -> None:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        cgroups.join_self(cgroups.open_tasks(jail.h, jail.cgroup))
        with open("/proc/self/cgroup", "rb") as file:
            os.write(write_end, file.read())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        groups = file.read()
    os.waitpid(pid, 0)
    joined = [*jail.h.mounts, *filter(None, [jail.h.cpuset]), *jail.h.others.values()]
    assert groups.count(f"/{jail.cgroup}\n") == len(joined)


def test_a_memory_hog_is_killed_and_counted(jail: Jail) -> None:
    cgroups.set_limits(jail.h, jail.cgroup, Limits(memory=32 * MIB, swap=0))
    lives = jail.run(HOLD.format(size=1))
    assert jail.said(lives) == b"held"
    assert cgroups.oom_kills(jail.h, jail.cgroup) == 0
    hog = jail.run(HOLD.format(size=128 * MIB))
    assert hog.wait(30) == -signal.SIGKILL
    assert cgroups.oom_kills(jail.h, jail.cgroup) == 1
    assert lives.poll() is None


def test_a_tenants_total_holds_over_its_jails(jail: Jail) -> None:
    cgroups.set_limits(jail.h, jail.tenant, Limits(memory=32 * MIB, swap=0))
    assert jail.run(HOLD.format(size=128 * MIB)).wait(30) == -signal.SIGKILL


def test_a_fork_bomb_is_held_and_killed(jail: Jail) -> None:
    cgroups.set_limits(jail.h, jail.cgroup, Limits(processes=20))
    bomb = jail.run(FORK_BOMB)
    assert jail.said(bomb) == b"19"
    assert cgroups.usage(jail.h, jail.cgroup)[2] == 20
    assert len(cgroups.members(jail.h, jail.cgroup)) == 20
    cgroups.kill(jail.h, jail.cgroup)
    assert cgroups.members(jail.h, jail.cgroup) == []
    assert bomb.wait(5) == -signal.SIGKILL


def test_a_live_fork_bomb_does_not_outrun_the_kill(jail: Jail) -> None:
    cgroups.set_limits(jail.h, jail.cgroup, Limits(memory=512 * MIB, swap=0, processes=400))
    bomb = jail.run("import os\nos.write(1, b'go\\n')\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert jail.said(bomb) == b"go"
    cgroups.kill(jail.h, jail.cgroup, timeout=60)
    assert cgroups.members(jail.h, jail.cgroup) == []


def test_a_cpu_quota_throttles(jail: Jail) -> None:
    cgroups.set_limits(jail.h, jail.cgroup, Limits(cpu_quota=10_000, cpu_period=50_000))
    burner = jail.run("print('on', flush=True)\nwhile True: pass")
    jail.said(burner)
    began, before = time.monotonic(), cgroups.usage(jail.h, jail.cgroup)[1]
    with pytest.raises(subprocess.TimeoutExpired):
        burner.wait(1)
    after = cgroups.usage(jail.h, jail.cgroup)[1]
    assert before is not None
    assert after is not None
    assert (after - before) / 1e9 < 0.2 * (time.monotonic() - began) + 0.05
    stat = Path(jail.place("cpu", "cpu.stat")).read_text()
    assert int(stat.partition("nr_throttled ")[2].split()[0]) > 0


def test_frozen_processes_do_nothing_until_thawed(jail: Jail) -> None:
    ticker = jail.run(TICK)
    assert ticker.stdout is not None
    ticks = ticker.stdout.fileno()
    os.read(ticks, 1)
    cgroups.freeze(jail.h, jail.cgroup)
    assert cgroups.is_frozen(jail.h, jail.cgroup)
    os.set_blocking(ticks, False)
    while select.select([ticks], [], [], 0)[0]:
        os.read(ticks, 1 << 20)
    assert not select.select([ticks], [], [], 0.2)[0]
    os.set_blocking(ticks, True)
    cgroups.thaw(jail.h, jail.cgroup)
    assert not cgroups.is_frozen(jail.h, jail.cgroup)
    assert os.read(ticks, 1) == b"."
    cgroups.thaw(jail.h, jail.cgroup)


def test_frozen_processes_can_be_killed(jail: Jail) -> None:
    ticker = jail.run(TICK)
    cgroups.freeze(jail.h, jail.cgroup)
    cgroups.kill(jail.h, jail.cgroup)
    assert ticker.wait(5) == -signal.SIGKILL
    cgroups.remove(jail.h, jail.cgroup)


def test_limits_change_under_running_processes(jail: Jail) -> None:
    assert jail.said(jail.run(HOLD.format(size=MIB))) == b"held"
    period = "cpu.max" if "cpu" in jail.h.v2 else "cpu.cfs_period_us"
    memory = "memory.max" if "memory" in jail.h.v2 else "memory.limit_in_bytes"
    for limits, wanted in (
        (Limits(64 * MIB, 0, 20_000, 50_000, 200, 30), (str(64 * MIB), "30", "50000")),
        (Limits(128 * MIB, 32 * MIB, 40_000, 100_000, 50, 60), (str(128 * MIB), "60", "100000")),
        (Limits(48 * MIB, None, None, None, None, 10), (str(48 * MIB), "10", "100000")),
        (Limits(), (None, "max", "100000")),
    ):
        cgroups.set_limits(jail.h, jail.cgroup, limits)
        assert wanted[0] is None or read(jail.place("memory", memory)) == wanted[0]
        assert read(jail.place("pids", "pids.max")) == wanted[1]
        assert read(jail.place("cpu", period)).split()[-1] == wanted[2]


def test_cpus_of_processes_that_run_and_of_those_that_come(jail: Jail) -> None:
    every = cgroups.host_cpus(jail.h, jail.root_name)
    if len(every) < 2:
        pytest.skip("one CPU, or no cpuset controller")
    first = jail.run(HOLD.format(size=1))
    assert jail.said(first) == b"held"
    cgroups.set_limits(jail.h, jail.cgroup, Limits(cpus=str(every[1])))
    assert os.sched_getaffinity(first.pid) == {every[1]}
    second = jail.run("import os, sys; print(os.sched_getaffinity(0), flush=True); sys.stdin.read()")
    assert jail.said(second).decode() == f"{{{every[1]}}}"
    assert cgroups.directories(jail.h, jail.cgroup)["cpuset"].endswith(relative(jail.cgroup))
    for cpus, has in ((str(every[0]), {every[0]}), (None, {*every})):
        cgroups.set_limits(jail.h, jail.cgroup, Limits(cpus=cpus))
        assert [os.sched_getaffinity(process.pid) for process in (first, second)] == [has, has]


def test_a_fork_bomb_is_pinned_whole(jail: Jail) -> None:
    every = cgroups.host_cpus(jail.h, jail.root_name)
    if len(every) < 2:
        pytest.skip("one CPU, or no cpuset controller")
    cgroups.set_limits(jail.h, jail.cgroup, Limits(processes=40))
    bomb = jail.run("import os\nos.write(1, b'go\\n')\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert jail.said(bomb) == b"go"
    cgroups.set_limits(jail.h, jail.cgroup, Limits(processes=40, cpus=str(every[0])))
    assert {frozenset(os.sched_getaffinity(pid)) for pid in cgroups.members(jail.h, jail.cgroup)} == {
        frozenset({every[0]})
    }


def test_a_jail_begins_on_its_cpus_and_those_that_are_gone_are_left_out(jail: Jail) -> None:
    every = cgroups.host_cpus(jail.h, jail.root_name)
    if not jail.h.cpuset or len(every) < 2:
        pytest.skip("one CPU, or no cpuset hierarchy of v1")
    for cpus, has in ((f"{every[1]},4095", {every[1]}), ("4095", {*every})):
        cgroups.create_jail_group(jail.h, jail.cgroup, BASE, cpus)
        process = jail.run("import os, sys; print(sorted(os.sched_getaffinity(0)), flush=True); sys.stdin.read()")
        assert jail.said(process).decode() == str(sorted(has))
        cgroups.kill(jail.h, jail.cgroup)
        process.communicate()


def test_memory_below_use_is_refused_with_figures_and_nothing_changes(jail: Jail) -> None:
    before = Limits(128 * MIB, 0, 50_000, None, None, 30)
    cgroups.set_limits(jail.h, jail.cgroup, before)
    holder = jail.run(HOLD.format(size=64 * MIB))
    assert jail.said(holder) == b"held"
    with pytest.raises(JailmgrError) as caught:
        cgroups.set_limits(jail.h, jail.cgroup, before._replace(memory=16 * MIB, processes=10))
    assert caught.value.code == "conflict"
    assert "16.0 MiB" in caught.value.why
    used = float(caught.value.why.split(" MiB")[0])
    assert 64 <= used <= 128
    assert holder.poll() is None
    memory = "memory.max" if "memory" in jail.h.v2 else "memory.limit_in_bytes"
    assert read(jail.place("memory", memory)) == str(128 * MIB)
    assert read(jail.place("pids", "pids.max")) == "30"


def test_a_cpu_quota_above_the_tenants(jail: Jail) -> None:
    """v1 refuses it, v2 takes it and the tenant's holds."""
    cgroups.set_limits(jail.h, jail.tenant, Limits(cpu_quota=50_000))
    wanted = Limits(memory=64 * MIB, cpu_quota=80_000)
    if "cpu" in jail.h.v2:
        cgroups.set_limits(jail.h, jail.cgroup, wanted)
        return
    with pytest.raises(JailmgrError) as caught:
        cgroups.set_limits(jail.h, jail.cgroup, wanted)
    assert caught.value.code == "conflict"
    assert "80000 us in each 100000 us is above the tenant's 50000 us" in caught.value.why
    cgroups.set_limits(jail.h, jail.cgroup, Limits(cpu_quota=40_000))
    with pytest.raises(JailmgrError) as caught:
        cgroups.set_limits(jail.h, jail.tenant, Limits(cpu_quota=30_000))
    assert "below what a jail in it has" in caught.value.why


def without_v1_devices(h: Hierarchies) -> Hierarchies:
    """As on a host with cgroup v2 alone, which has no controller for devices."""
    return h._replace(v1={controller: mount for controller, mount in h.v1.items() if controller != "devices"})


def test_devices_are_the_usual_ones_and_no_others(jail: Jail) -> None:
    check_devices(jail)


def test_devices_are_the_usual_ones_by_bpf(v2_jail: Jail) -> None:
    v2_jail.h = without_v1_devices(v2_jail.h)
    check_devices(v2_jail)


@pytest.mark.parametrize(
    ("rules", "opens"),
    [
        ([], "zero- null-"),
        ([{"allow": True}], "zero+ null+"),
        ([{"allow": True}, {"allow": False, "type": "c", "major": 1, "minor": 5, "access": "w"}], "zero- null+"),
        ([{"allow": False}, {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "rw"}], "zero+ null-"),
        ([{"allow": False}, {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "r"}], "zero- null-"),
        ([{"allow": False}, {"allow": True, "type": "b"}], "zero- null-"),
        ([{"allow": True, "type": "c", "major": 1}, {"allow": False, "minor": 3}], "zero+ null-"),
    ],
)
def test_the_last_rule_that_fits_counts(v2_jail: Jail, rules: list[dict[str, object]], opens: str) -> None:
    """For reading and writing together, by BPF."""
    assert cgroups.device_rules(without_v1_devices(v2_jail.h), v2_jail.cgroup, rules)
    program = """
import os, sys
def mark(path):
    try:
        os.close(os.open(path, os.O_RDWR))
    except PermissionError:
        return "-"
    return "+"
print(*(name + mark(f"/dev/{name}") for name in ("zero", "null")), flush=True)
sys.stdin.read()
"""
    assert v2_jail.said(v2_jail.run(program)).decode() == opens


def check_devices(jail: Jail) -> None:
    assert cgroups.device_rules(jail.h, jail.cgroup) is True
    assert cgroups.device_rules(jail.h, jail.cgroup) is True
    program = """
import os, stat, sys
def tell(work):
    try:
        work()
    except OSError as error:
        return error.errno
    return 0
path = sys.stdin.readline().strip()
usual = ("null", "zero", "full", "random", "ptmx")
opened = [tell(lambda: os.close(os.open(f"/dev/{name}", os.O_RDWR))) for name in usual]
made = [tell(lambda: os.mknod(f"{path}/{number}", stat.S_IFBLK | 0o600, os.makedev(number, 0))) for number in (7, 8)]
print(*opened, *made, tell(lambda: os.open(f"{path}/kmsg", os.O_RDONLY)), flush=True)
"""
    process = jail.run(program)
    assert process.stdin is not None
    shared = f"/tmp/{jail.root_name}"
    os.mkdir(shared, 0o700)
    try:
        os.mknod(f"{shared}/kmsg", 0o020600, os.makedev(1, 11))
        process.stdin.write(f"{shared}\n".encode())
        process.stdin.flush()
        assert jail.said(process).split() == [b"0"] * 5 + [str(errno.EPERM).encode()] * 3
    finally:
        for name in os.listdir(shared):
            os.unlink(f"{shared}/{name}")
        os.rmdir(shared)


def as_guest_root(work: Callable[[], object]) -> int:
    """What `work` meets as the guest's root, who has no rights of the host's: errno, 0 for success."""
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            os.setgroups([])
            os.setresgid(BASE, BASE, BASE)
            os.setresuid(BASE, BASE, BASE)
            work()
            status = 0
        except OSError as error:
            status = error.errno or 255
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def nest(path: str, name: str, levels: int) -> None:
    os.chdir(path)
    for _ in range(levels):
        os.mkdir(name)
        os.chdir(name)


def test_groups_the_guest_made_are_removed(v2_jail: Jail) -> None:
    payload = f"{v2_jail.h.unified}/{relative(v2_jail.cgroup)}/payload"
    # 30 levels of names of 200 bytes: longer than PATH_MAX.
    assert as_guest_root(lambda: nest(payload, "n" * 200, 30)) == 0
    assert as_guest_root(lambda: os.makedirs(f"{payload}/system.slice/a.service")) == 0
    cgroups.remove(v2_jail.h, v2_jail.cgroup)
    assert cgroups.list_groups(v2_jail.h, v2_jail.root_name) == [v2_jail.tenant]
    cgroups.remove(v2_jail.h, v2_jail.cgroup)


def test_the_guest_is_held_in_its_payload(v2_jail: Jail) -> None:
    at = f"{v2_jail.h.unified}/{relative(v2_jail.cgroup)}"
    for name in ("cgroup.freeze", "cgroup.procs", "cgroup.kill", "payload/cgroup.max.descendants"):
        assert as_guest_root(partial(write, f"{at}/{name}", "1")) == errno.EACCES
    assert as_guest_root(lambda: os.mkdir(f"{at}/mine")) == errno.EACCES
    assert as_guest_root(lambda: os.rmdir(f"{at}/payload")) == errno.EACCES
    assert as_guest_root(lambda: nest(f"{at}/payload", "n", 40)) == errno.EAGAIN
    assert as_guest_root(lambda: os.mkdir(f"{at}/payload/mine")) == 0
    assert as_guest_root(lambda: write(f"{at}/payload/mine/cgroup.freeze", "1")) == 0


def test_exec_finds_a_place_the_guest_can_not_spoil(v2_jail: Jail) -> None:
    at = f"{v2_jail.h.unified}/{relative(v2_jail.cgroup)}"
    first = v2_jail.run(HOLD.format(size=1), cgroups.EXEC)
    v2_jail.said(first)
    assert Path(f"{at}/payload/.exec/cgroup.procs").read_text().split() == [str(first.pid)]
    cgroups.kill(v2_jail.h, v2_jail.cgroup)
    os.rmdir(f"{at}/payload/.exec")

    def spoil() -> None:
        # With a threaded group beside it, `.exec` can hold no process (cgroup-v2.rst, "Threads").
        os.mkdir(f"{at}/payload/other")
        write(f"{at}/payload/other/cgroup.type", "threaded")

    assert as_guest_root(spoil) == 0
    second = v2_jail.run(HOLD.format(size=1), cgroups.EXEC)
    v2_jail.said(second)
    assert Path(f"{at}/exec/cgroup.procs").read_text().split() == [str(second.pid)]
    assert cgroups.members(v2_jail.h, v2_jail.cgroup) == [second.pid]


def test_a_leaf_of_an_older_release_becomes_the_guests(v2_jail: Jail) -> None:
    path = f"{v2_jail.h.unified}/{relative(v2_jail.cgroup)}/payload/.exec"
    os.mkdir(path)
    assert as_guest_root(lambda: os.mkdir(f"{path}/nested")) == errno.EACCES
    leaf = next(exec_leaves(v2_jail.h, v2_jail.cgroup, BASE))
    assert leaf is not None
    os.close(leaf)
    assert as_guest_root(lambda: os.mkdir(f"{path}/nested")) == 0


def test_a_leaf_that_is_refused_is_made_again(v2_jail: Jail) -> None:
    """Where a command has left controllers on, clone3(2) fails; tests/vm/test_debian.py has that, by a real one."""
    path = f"{v2_jail.h.unified}/{relative(v2_jail.cgroup)}/payload/.exec"
    for leaf in exec_leaves(v2_jail.h, v2_jail.cgroup, BASE):
        assert leaf is not None
        os.close(leaf)
        break
    assert as_guest_root(lambda: os.mkdir(f"{path}/nested")) == 0
    found = []
    for leaf in exec_leaves(v2_jail.h, v2_jail.cgroup, BASE):
        assert leaf is not None
        found.append(os.fstat(leaf).st_ino)
        os.close(leaf)
    outside = os.stat(f"{v2_jail.h.unified}/{relative(v2_jail.cgroup)}/exec").st_ino
    assert found[1:] == [os.stat(path).st_ino, outside]
    assert found[0] not in found[1:]
    assert not os.path.exists(f"{path}/nested")


def test_a_group_with_processes_is_neither_removed_nor_made_again(jail: Jail) -> None:
    process = jail.run(HOLD.format(size=1))
    jail.said(process)
    for attempt in (
        lambda: cgroups.remove(jail.h, jail.cgroup, timeout=0.1),
        lambda: cgroups.create_jail_group(jail.h, jail.cgroup, BASE),
    ):
        with pytest.raises(JailmgrError) as caught:
            attempt()
        assert caught.value.code == "conflict"
        assert str(process.pid) in caught.value.why
    assert process.poll() is None


def test_remove_waits_for_processes_that_end(jail: Jail) -> None:
    process = jail.run("import sys, time; print('on', flush=True); sys.stdin.read(); time.sleep(0.2)")
    jail.said(process)
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    cgroups.remove(jail.h, jail.cgroup)
    assert process.wait(5) == 0


def test_a_new_start_begins_with_nothing_of_the_last(jail: Jail) -> None:
    cgroups.set_limits(jail.h, jail.cgroup, Limits(processes=7))
    if jail.h.unified:
        assert as_guest_root(lambda: os.mkdir(f"{jail.h.unified}/{relative(jail.cgroup)}/payload/old")) == 0
    cgroups.create_jail_group(jail.h, jail.cgroup, BASE)
    assert read(jail.place("pids", "pids.max")) == "max"
    assert not os.path.exists(f"{jail.h.unified}/{relative(jail.cgroup)}/payload/old")


def test_groups_are_listed_and_a_jail_may_be_named_tasks(jail: Jail) -> None:
    cgroups.tenant_group(jail.h, jail.root_name, "tasks")
    cgroups.create_jail_group(jail.h, f"{jail.root_name}/tasks/tasks", BASE)
    assert cgroups.list_groups(jail.h, jail.root_name) == [
        jail.tenant, jail.cgroup, f"{jail.root_name}/tasks", f"{jail.root_name}/tasks/tasks",
    ]  # fmt: skip


def test_groups_that_are_not_there_are_no_error(jail: Jail) -> None:
    nobody = f"{jail.root_name}/nobody/nothing"
    cgroups.kill(jail.h, nobody)
    cgroups.remove(jail.h, nobody)
    assert cgroups.members(jail.h, nobody) == []
    assert not cgroups.is_frozen(jail.h, nobody)
    assert cgroups.usage(jail.h, nobody) == (None, None, None)
    with pytest.raises(JailmgrError):
        cgroups.set_limits(jail.h, nobody, Limits(processes=1))
