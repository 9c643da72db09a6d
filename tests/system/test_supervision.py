"""How a jail ends and is told of, and what the death of a supervisor or the engine changes: nothing."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from jailmgr.runtime.bundle import FILES_MAX
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, alive, kill, terminal, until


def stopped(jm: Instance, name: str) -> dict[str, Any]:
    """How it ended, once it has."""
    ended = until(lambda: jm.status(name) == "Stopped" and jm.info(name)["last_ended"], 20, f"{name} stops")
    return dict(ended)


def set_init(jm: Instance, name: str, script: str) -> None:
    """Give a running jail another init from the next start on."""
    jm.exec(name, "sh", "-c", "cat > /sbin/init", stdin=f"#!/bin/sh\n{script}\n".encode())
    jm.exec(name, "chmod", "755", "/sbin/init")
    jm("stop", "--force", name)


def test_sigkill_of_the_engine_stops_no_jail(jm: Instance, busybox_jail: MakeJail) -> None:
    names = [busybox_jail(), busybox_jail()]
    before = {name: jm.info(name) for name in names}
    engine = jm.engine_pid()
    kill(engine)
    after = {row["name"]: row for row in jm.json("list")}
    for name in names:
        assert after[name]["status"] == "Running"
        assert after[name]["init_pid"] == before[name]["init_pid"]
        assert jm.info(name)["supervisor_pid"] == before[name]["supervisor_pid"]
        jm.exec(name, "true")
    assert jm.engine_pid() != engine
    jm("stop", "--force", names[0])
    assert jm.status(names[1]) == "Running"


def test_sigkill_of_the_supervisor_stops_no_jail(jm: Instance, busybox_jail: MakeJail) -> None:
    names = [busybox_jail(), busybox_jail()]
    before = {name: jm.info(name) for name in names}
    supervisor = before[names[0]]["supervisor_pid"]
    assert before[names[1]]["supervisor_pid"] == supervisor, "one supervisor for all jails of a tenant"
    kill(supervisor)
    for name in names:
        assert alive(before[name]["init_pid"])
        assert jm.exec(name, "echo", "here").out == "here\n"
    until(lambda: jm.info(names[0])["supervisor_pid"] not in (None, supervisor), 10, "a new supervisor")
    for name in names:
        after = jm.info(name)
        assert (after["status"], after["init_pid"]) == ("Running", before[name]["init_pid"])
    jm("stop", names[0])
    assert stopped(jm, names[0])["by"] == "admin"


def test_an_adopted_jail_gets_a_new_console(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm.sh(name, "echo before-the-gap > /dev/console")
    until(lambda: "before-the-gap" in jm("logs", name).out)
    kill(jm.info(name)["supervisor_pid"])
    jm.exec(name, "true")
    with terminal(jm, "console", name) as term:
        term.expect(b"leaves it")
        term.prompt()
        term.write(b"echo $((6 * 7))\n")
        term.expect(b"42")
        term.write(b"\x1d\x1d\x1d")
        assert term.wait() == 0
    jm.sh(name, "echo after-the-gap > /dev/console")
    log = until(lambda: (text := jm("logs", name).out) and "after-the-gap" in text and text)
    assert log.index("before-the-gap") < log.index("after-the-gap")


def test_an_adopted_jails_end_is_seen(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    kill(jm.info(name)["supervisor_pid"])
    jm.exec(name, "true")
    jm.sh(name, "poweroff -f", status=None)
    assert stopped(jm, name)["kind"] in ("poweroff", "unknown"), "kernels before 6.15 can't tell"
    jm("start", name)
    jm.exec(name, "true")


def test_both_killed_at_once(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    before = jm.info(name)
    kill(jm.engine_pid())
    kill(before["supervisor_pid"])
    assert jm.exec(name, "echo", "here").out == "here\n"
    after = jm.info(name)
    assert (after["status"], after["init_pid"]) == ("Running", before["init_pid"])


def test_a_jail_that_ended_while_nobody_watched(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    before = jm.info(name)
    kill(jm.engine_pid())
    kill(before["supervisor_pid"])
    kill(before["init_pid"])
    assert stopped(jm, name)["kind"] in ("signal", "unknown")
    jm("start", name)
    jm.exec(name, "true")


def test_poweroff_inside(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    began = time.time()
    jm.sh(name, "poweroff -f", status=None)
    ended = stopped(jm, name)
    assert (ended["kind"], ended["by"]) == ("poweroff", "guest")
    assert began - 1 <= ended["at"] <= time.time() + 1
    assert "poweroff" in jm("info", name).out


def test_reboot_inside_brings_it_back(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    before = jm.info(name)
    jm.sh(name, "echo kept > /root/note; reboot -f", status=None)
    until(
        lambda: (now := jm.info(name))["status"] == "Running" and now["init_pid"] != before["init_pid"],
        20,
        "it is back",
    )
    assert jm.exec(name, "cat", "/root/note").out == "kept\n"
    after = jm.info(name)
    assert (after["ipv4"], after["last_ended"]["kind"]) == (before["ipv4"], "reboot")


def test_reboot_inside_needs_no_engine(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    before = jm.info(name)
    jm("engine", "stop")
    jm.sh(name, "reboot -f", status=None)
    until(lambda: not alive(before["init_pid"]), 10)
    until(lambda: jm("exec", name, "--", "true", status=None).status == 0, 10, "it is back")
    assert not jm.json("engine", "status")["running"]
    jm.exec(name, "ping", "-c", "1", "-W", "2", _gateway(jm, name))


def _gateway(jm: Instance, name: str) -> str:
    return jm.sh(name, "ip route show default").out.split()[2]


def test_exit_status_of_init(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    set_init(jm, name, "sleep 0.5; exit 7")
    jm("start", name)
    ended = stopped(jm, name)
    assert (ended["kind"], ended["status"], ended["by"]) == ("exit", 7, "guest")


def test_init_killed_by_a_signal(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    os.kill(jm.info(name)["init_pid"], signal.SIGKILL)
    ended = stopped(jm, name)
    assert (ended["kind"], ended["status"]) == ("signal", signal.SIGKILL)


def test_init_out_of_memory(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--memory", "48MiB", "-c", "limits.memory.swap=false")
    set_init(jm, name, "exec tail /dev/zero")
    jm("start", name)
    ended = stopped(jm, name)
    assert (ended["kind"], ended["by"]) == ("oom", "kernel")


def test_stop_is_graceful_then_not(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm.sh(name, "printf '#!/bin/sh\\necho orderly > /root/note\\n' > /etc/rc.shutdown; chmod 755 /etc/rc.shutdown")
    jm("stop", name)
    assert stopped(jm, name)["by"] == "admin"
    jm("start", name)
    assert jm.exec(name, "cat", "/root/note").out == "orderly\n"
    set_init(jm, name, "trap '' HUP INT TERM USR1 USR2 PWR; while :; do sleep 1; done")
    jm("start", name)
    began = time.monotonic()
    jm("stop", "--timeout", "1", name)
    assert 0.9 < time.monotonic() - began < 10
    ended = stopped(jm, name)
    assert (ended["kind"], ended["status"], ended["by"]) == ("signal", signal.SIGKILL, "admin")


def test_restart_on_failure(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", "restart=on-failure")
    before = jm.info(name)
    os.kill(before["init_pid"], signal.SIGKILL)
    until(
        lambda: (now := jm.info(name))["init_pid"] not in (None, before["init_pid"]) and now["status"] == "Running", 20
    )
    assert jm.info(name)["restarts"] >= 1
    jm("stop", name)
    assert jm.status(name) == "Stopped"
    assert stopped(jm, name)["by"] == "admin"


def test_restart_always_is_held_back(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", "restart=always")
    set_init(jm, name, "exit 1")
    jm("start", name, status=None)
    ends: set[float] = set()

    def tried_again() -> bool:
        ends.add(jm.info(name)["last_ended"]["at"])
        return len(ends) >= 3

    began = time.monotonic()
    until(tried_again, 60, "it is tried again")
    assert time.monotonic() - began > 1


def test_the_supervisor_ends_with_its_last_jail(jm: Instance, busybox_jail: MakeJail) -> None:
    first, second = busybox_jail(), busybox_jail()
    supervisor = jm.info(first)["supervisor_pid"]
    jm("stop", "--force", first)
    assert alive(supervisor)
    jm("stop", "--force", second)
    until(lambda: not alive(supervisor), 10, "the supervisor ends")


@pytest.mark.parametrize("after", [0.02, 0.1, 0.2, 0.4, 0.7])
def test_sigkill_in_the_middle_of_a_launch(jm: Instance, after: float) -> None:
    jm("version")
    engine = jm.json("engine", "status")
    process = jm.popen("launch", "busybox", "halfway", stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    time.sleep(after)  # somewhere in the middle
    if engine["running"]:
        kill(engine["pid"])
    process.kill()
    process.wait()
    if not jm.gone("halfway"):
        assert jm.status("halfway") in ("Running", "Stopped")
        jm("delete", "--force", "halfway")
    jm("launch", "busybox", "halfway")
    jm.exec("halfway", "true")
    jm("delete", "--force", "halfway")


@pytest.mark.parametrize("after", [0.02, 0.1, 0.3])
def test_sigkill_in_the_middle_of_a_delete(jm: Instance, busybox_jail: MakeJail, after: float) -> None:
    name = busybox_jail()
    process = jm.popen("delete", "--force", name, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    time.sleep(after)  # somewhere in the middle
    engine = jm.json("engine", "status")
    if engine["running"]:
        kill(engine["pid"])
    process.kill()
    process.wait()
    if not jm.gone(name):
        jm("delete", "--force", name)
    assert jm.gone(name)


def test_an_engine_whose_starter_was_killed_serves_who_starts_another(jm: Instance) -> None:
    jm("engine", "stop")
    lock = Path(jm.root.run, "engine.lock")
    before, deadline = lock.read_text(), time.monotonic() + 20
    starter = jm.popen("list", stdout=subprocess.DEVNULL)
    while lock.read_text() in ("", before):
        assert time.monotonic() < deadline, "no engine begins"
    engine = int(lock.read_text())
    os.kill(engine, signal.SIGSTOP)
    try:
        starter.kill()
        starter.wait()
        assert not os.path.exists(jm.root.socket)
        second = jm.popen("list", stdout=subprocess.DEVNULL)
        inode = f":{lock.stat().st_ino} "
        until(
            lambda: any("-> FLOCK" in line and inode in line for line in Path("/proc/locks").read_text().splitlines()),
            20,
            "another engine waits for the first one's end",
        )
    finally:
        os.kill(engine, signal.SIGCONT)
    assert second.wait(60) == 0
    assert jm.engine_pid() == engine


def test_a_killed_engine_leaves_nothing_doctor_cannot_name(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    kill(jm.engine_pid())
    kill(jm.info(name)["supervisor_pid"])
    jm.json("list")
    checks = {check["check"]: check for check in jm("doctor", "--format", "json", status=None).json}
    assert checks["leftovers"]["ok"], checks["leftovers"]["detail"]


def test_a_jail_begins_with_limits_of_its_own(jm: Instance, other_tenant: str) -> None:
    """Whatever limits the shell had from which the engine and its supervisors were started."""
    if not has_cap_sys_resource():
        pytest.skip("this host's root lacks CAP_SYS_RESOURCE, and may raise no limit")
    lowered = {resource.RLIMIT_NOFILE: (4096, 4096), resource.RLIMIT_CPU: (7200, 7200)}
    engine = jm.engine_pid()
    before = {which: resource.prlimit(engine, which, low) for which, low in lowered.items()}
    name = f"{other_tenant}/limits"
    try:
        jm("launch", "busybox", name)
    finally:
        for which, limits in before.items():
            resource.prlimit(engine, which, limits)
    begun = jm.exec(name, "cat", "/proc/1/limits", "/proc/self/limits").out.splitlines()
    files = [line.split()[3:5] for line in begun if line.startswith("Max open files")]
    assert files == [["1024", str(FILES_MAX)]] * 2
    assert [line.split()[3:5] for line in begun if line.startswith("Max cpu time")] == [["unlimited"] * 2] * 2


def has_cap_sys_resource() -> bool:
    (effective,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "CapEff" in line]
    return bool(int(effective, 16) >> 24 & 1)
