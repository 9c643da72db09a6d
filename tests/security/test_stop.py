"""A guest cannot keep its jail from being stopped, nor the host from going down.

runtime/reaper.py, manager/boot.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jailmgr.runtime.state import supervisor_process
from tests.security.guest import Guest
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, alive, until
from tests.system.users import ALICE, alices_tenant, run_as


@pytest.fixture
def program(jm: Instance, busybox_jail: MakeJail, tmp_path: Path) -> Guest:
    """A jail of its own, with the program in it."""
    guest = Guest(jm, busybox_jail(), tmp_path)
    guest.install("siblings")
    return guest


def _begin(guest: Guest, *argv: str) -> subprocess.Popen[bytes]:
    """Begin one of the modes, and wait until it is there."""
    words = ("exec", guest.jail, "--", "/root/siblings", *argv)
    process = guest.jm.popen(*words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    if process.stdout.readline() != b"made\n":
        process.kill()
        raise AssertionError(f"siblings {' '.join(argv)}: status {process.wait()}")
    return process


def _supervisor(jm: Instance, tenant: str = "default") -> int:
    found = supervisor_process(jm.root, tenant)
    assert found is not None
    return found.pid


def _zombies(parent: int) -> int:
    done = subprocess.run(["ps", "-o", "stat=", "--ppid", str(parent)], capture_output=True, text=True)
    return sum(line.startswith("Z") for line in done.stdout.split())


def test_siblings_of_a_program_are_reaped(program: Guest) -> None:
    """CLONE_PARENT makes children of the supervisor that it never heard of."""
    program.run("siblings", "make", "100")
    until(lambda: not _zombies(_supervisor(program.jm)), 10)


@pytest.mark.parametrize("how", ["stop --force", "stop --timeout 1", "restart --force", "delete --force"])
@pytest.mark.parametrize("mode", ["make 40", "live 40", "traced", "stops", "hold", "last"])
def test_a_jail_with_siblings_or_tracees_ends_in_seconds(program: Guest, mode: str, how: str) -> None:
    """Process 1 of a pid namespace ends once all others in it were reaped: by the supervisor, whoever made them.

    A tracer of process 1 (`last`) is killed along with it: by the jail's cgroup.
    """
    with _begin(program, *mode.split()):
        begin = time.monotonic()
        program.jm(*how.split(), program.jail, within=20)
        assert time.monotonic() - begin < 10
    if how.startswith("delete"):
        program.jm("launch", "busybox", program.jail)


def test_a_flood_of_siblings_holds_up_nobody_else(program: Guest, busybox_jail: MakeJail) -> None:
    """The supervisor reaps a bounded number at a time; zombies count in the guest's pids cgroup."""
    jm, other = program.jm, busybox_jail()
    jm("set", program.jail, "limits.processes=64")
    with _begin(program, "flood"):
        for _ in range(5):
            jm.exec(other, "true", within=5)
        jm("stop", "--force", program.jail, within=20)
    jm.exec(other, "true", within=5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_program_that_asks_to_be_traced_gets_its_signals(program: Guest, number: signal.Signals) -> None:
    """PTRACE_TRACEME makes the supervisor its tracer, at whose word it waits at each signal."""
    with _begin(program, "traced") as process:
        process.send_signal(number)
        try:
            assert process.wait(10) == 128 + number
        finally:
            process.kill()


def test_an_init_that_asks_to_be_traced_is_stopped(program: Guest) -> None:
    """SIGKILL ends a tracee as well, and the supervisor lets go of one that has stopped."""
    jm, jail = program.jm, program.jail
    program.sh("rm -f /sbin/init && cp /root/siblings /sbin/init")
    for how in (("restart", "--force"), ("stop", "--timeout", "1")):
        jm(*how, jail, within=20)
    assert jm.status(jail) == "Stopped"


def test_a_tracer_in_the_jail_holds_up_nobody(program: Guest, busybox_jail: MakeJail) -> None:
    """The end of a traced process is reported to its tracer first, which keeps it from the supervisor.

    Mechanism: the supervisor never waits for the end of a child but by its event loop.
    """
    jm, other = program.jm, busybox_jail()
    with _begin(program, "hold"):
        held = [jm.popen("exec", program.jail, "--", "sleep", "0.3", stdin=subprocess.DEVNULL) for _ in range(3)]
        for _ in range(5):
            jm.exec(other, "true", within=5)
        assert {process.wait(15) for process in held} <= {0, 125}
        jm("stop", "--force", program.jail, within=20)


def test_exit_statuses_are_right_beside_siblings(program: Guest) -> None:
    """What the reaper takes from the kernel reaches whom it is for."""
    with _begin(program, "live", "5"):
        for status in (0, 7, 255):
            assert program.sh(f"exit {status}", status=status) == ""
        program.sh("kill -KILL $$", status=137)
    jail, jm = program.jail, program.jm
    jm("stop", "--force", jail)
    jm("start", jail)
    jm.sh(jail, "reboot -f", status=None)
    until(lambda: jm.info(jail)["restarts"] == 1, 10)


def test_a_user_of_the_tenant_tries_it(jm: Instance, tmp_path: Path) -> None:
    """A user who is not root, over the door: root's commands end in seconds."""
    with alices_tenant(jm) as tenant:
        guest = Guest(jm, f"{tenant}/web", tmp_path)
        guest.install("siblings")
        for mode in (("make", "50"), ("live", "50")):
            run_as(jm, ALICE, "--tenant", tenant, "exec", "web", "--", "/root/siblings", *mode)
        jm("restart", "--force", f"{tenant}/web", within=20)
        run_as(jm, ALICE, "--tenant", tenant, "exec", "web", "--", "/root/siblings", "live", "50")
        jm("stop", "--force", f"{tenant}/web", within=20)
        run_as(jm, ALICE, "--tenant", tenant, "start", "web")
        run_as(jm, ALICE, "--tenant", tenant, "exec", "web", "--", "/root/siblings", "make", "50")
        jm("delete", "--force", f"{tenant}/web", within=20)


def test_no_command_line_of_ours_is_shown(program: Guest, tmp_path: Path) -> None:
    """The supervisor's has paths of the host and the tenant's name, and its children begin as copies of it."""
    jm, jail = program.jm, program.jail
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    command = ("exec", jail, "--", "/root/siblings", "cmdlines")
    with open(tmp_path / "seen", "wb") as out, jm.popen(*command, stdin=subprocess.DEVNULL, stdout=out) as process:
        while process.poll() is None:
            jm("cp", str(tmp_path / "file"), f"{jail}:/root/")
            jm("cp", f"{jail}:/root/file", str(tmp_path / "back"))
            jm.exec(jail, "true")
    seen = (tmp_path / "seen").read_text(errors="replace")
    assert "siblings cmdlines" in seen
    assert jm.root.at not in seen
    assert "python" not in seen


@pytest.fixture
def instance(new_instance: Callable[[], Instance]) -> Instance:
    made = new_instance()
    made("launch", "busybox", "first", within=300)
    return made


_STUBBORN = "trap '' TERM INT HUP PWR USR1 USR2 WINCH; while :; do sleep 1000 & wait; done"


def test_the_shutdown_ends_in_time_whatever_guests_do(instance: Instance, tmp_path: Path) -> None:
    """Each wait of `engine shutdown` has a deadline: then it goes on with the next jail."""
    for tenant in ("acme", "calm"):
        instance("tenant", "create", tenant)
        instance("launch", "busybox", f"{tenant}/web")
    limits = ("-c", "boot.host_shutdown_timeout=2", "--processes", "40", "--memory", "32MiB")
    for name in ("paused", "stubborn", "full", "frozen"):
        instance("launch", "busybox", name, *limits)
    guest = Guest(instance, "first", tmp_path)
    guest.install("siblings")
    with _begin(guest, "live", "30"), _begin(guest, "stops"):
        instance.sh("stubborn", f"(exec setsid sh -c '{_STUBBORN}') </dev/null >/dev/null 2>&1 &")
        instance.sh("full", "for i in 1 2 3 4 5 6; do dd if=/dev/zero of=/dev/shm/$i bs=1M count=4; done", status=None)
        instance.sh("frozen", "mkdir /sys/fs/cgroup/x; echo 1 >/sys/fs/cgroup/x/cgroup.freeze", status=None)
        instance("pause", "paused")
        inits = [row["init_pid"] for row in instance.json("list", "--all-tenants")]
        Path(instance.root.jail_lib("calm", "web"), "config.json").write_text("{")
        hung = _supervisor(instance, "acme")
        os.kill(hung, signal.SIGSTOP)
        begin = time.monotonic()
        instance("engine", "shutdown", within=60)
        assert time.monotonic() - begin < 45
        assert not any(map(alive, inits))
        assert not alive(hung)
    instance("engine", "autostart", within=60)
