"""A jail that waits for its next start is up: whoever of engine and supervisor ends meanwhile, it gets that start."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from jailmgr.runtime.state import load_wait, supervisor_process, waits
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, alive, kill, until
from tests.system.test_supervision import set_init, stopped

FAILS_FIRST = """
n=$(cat /root/n 2>/dev/null || echo 0); echo $((n + 1)) > /root/n
[ $n -lt 4 ] && exit 1
exec sleep 100000
"""
"""An init that fails four times: the back-off after the last of them is 5 s (runtime/jail.py)."""


def in_back_off(jm: Instance, name: str) -> None:
    """Its supervisor waits 5 s before the next start, which will go well."""
    set_init(jm, name, FAILS_FIRST)
    jm("start", name)
    run = jm.root.tenant_run("default")
    until(lambda: (wait := load_wait(run, name)) is not None and wait.tries == 4, 20, "the back-off")
    assert jm.status(name) == "Stopped"


def supervisor_of(jm: Instance) -> int:
    """`info` tells it only of a jail that runs."""
    found = supervisor_process(jm.root, "default")
    assert found is not None
    return found.pid


def gets_up(jm: Instance, name: str) -> None:
    """By itself: no command that is asked here starts an engine."""
    until(lambda: jm("exec", name, "--", "true", status=None).status == 0, 30, "it is started again")
    assert not waits(jm.root, "default", name)


def test_an_engine_that_ends_in_a_back_off_leaves_what_the_jail_needs(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", "restart=always")
    gateway = jm.sh(name, "ip route show default").out.split()[2]
    in_back_off(jm, name)
    jm("engine", "stop")
    assert waits(jm.root, "default", name), "the engine ended in the back-off"
    gets_up(jm, name)
    assert not jm.json("engine", "status")["running"]
    assert jm.sh(name, f"ping -c 1 -W 2 {gateway}").status == 0


def test_engine_and_supervisor_killed_in_a_back_off(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", "restart=on-failure")
    in_back_off(jm, name)
    supervisor = supervisor_of(jm)
    kill(jm.engine_pid())
    kill(supervisor)
    assert jm.status(name) == "Stopped"
    gets_up(jm, name)
    assert jm.info(name)["restarts"] == 4


def test_a_supervisor_killed_in_a_back_off_is_replaced(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", "restart=always")
    in_back_off(jm, name)
    supervisor = supervisor_of(jm)
    kill(supervisor)
    gets_up(jm, name)
    assert jm.info(name)["supervisor_pid"] != supervisor


def test_a_restart_that_fails_is_tried_again(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", "restart=always")
    config = Path(jm.root.jail_lib("default", name), "config.json")
    aside = config.rename(config.with_name("aside"))
    os.kill(jm.info(name)["init_pid"], signal.SIGKILL)
    until(lambda: jm.info(name)["last_ended"]["kind"] == "failed", 20, "a start fails")
    assert os.path.exists(config.with_name("runs"))
    assert waits(jm.root, "default", name)
    aside.rename(config)
    gets_up(jm, name)


def test_a_reboot_that_fails_is_tried_again(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    config = Path(jm.root.jail_lib("default", name), "config.json")
    aside = config.rename(config.with_name("aside"))
    jm.sh(name, "reboot -f", status=None)
    until(lambda: waits(jm.root, "default", name), 20, "it waits")
    aside.rename(config)
    gets_up(jm, name)


def test_a_jail_in_its_back_off_is_stopped_with_the_others(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", "restart=always")
    in_back_off(jm, name)
    supervisor = supervisor_of(jm)
    jm("engine", "stop")
    jm("engine", "shutdown")
    assert not waits(jm.root, "default", name)
    until(lambda: not alive(supervisor), 10, "the supervisor ends")
    assert os.path.exists(f"{jm.root.jail_lib('default', name)}/runs"), "it starts with the host"
    assert stopped(jm, name)["by"] == "host"


def test_what_a_jail_in_its_back_off_is_not_taken_for(jm: Instance, busybox_jail: MakeJail) -> None:
    """A stopped one: it would be started in the midst of that, or forgotten."""
    name = busybox_jail("-c", "restart=always")
    in_back_off(jm, name)
    assert "started again" in jm.refused("rename", name, "another").err
    assert "started again" in jm.refused("cp", f"{name}:/etc/hostname", "-").err
    jm("set", name, "limits.processes=77")
    gets_up(jm, name)
    assert jm.info(name)["limits"]["processes"] == 77
    with open(f"{jm.root.jail_lib('default', name)}/config.json", encoding="utf-8") as file:
        assert '"limit":77' in file.read().replace(" ", "")


def test_a_stop_in_a_back_off_is_for_good(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", "restart=always")
    in_back_off(jm, name)
    supervisor = supervisor_of(jm)
    kill(jm.engine_pid())
    kill(supervisor)
    jm("stop", name)
    assert not waits(jm.root, "default", name)
    assert stopped(jm, name)["by"] == "admin"
    assert not os.path.exists(f"{jm.root.jail_lib('default', name)}/runs")
