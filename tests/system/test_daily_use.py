"""What was found in daily use: a mistyped root, a root that goes away, an end of stdin, an init that does not stop."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jailmgr.runtime import attach
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, instance_at, until
from tests.system.test_supervision import set_init

EMPTY = ("list", "list -A", "port list", "tenant list", "tenant usage", "image list", "stop --all")
UNKNOWN = (
    "info x", "show x", "get x user.a", "logs x", "exec x -- true", "console x", "cp x:/etc/passwd -", "stop x",
    "start x", "delete x --force", "set x user.a=1", "rename x y", "port publish x 80:80", "tenant show y",
    "image show z",
)  # fmt: skip


@pytest.mark.parametrize("words", EMPTY)
def test_a_root_that_does_not_exist_is_empty(jm: Instance, tmp_path: Path, words: str) -> None:
    absent = tmp_path / "typo"
    typo = instance_at(str(absent))
    typo(*words.split())
    if words != "stop --all":
        assert typo.json(*words.split()) == []
    assert not absent.exists()


@pytest.mark.parametrize("words", UNKNOWN)
def test_nothing_is_found_in_a_root_that_does_not_exist(jm: Instance, tmp_path: Path, words: str) -> None:
    absent = tmp_path / "typo"
    told = instance_at(str(absent)).refused(*words.split(), status=125 if words.startswith("exec") else 1).err
    assert "not found" in told or "none of that name" in told
    assert not absent.exists()


def test_templates_need_no_root(jm: Instance, tmp_path: Path) -> None:
    absent = tmp_path / "typo"
    assert instance_at(str(absent)).json("template", "list") == jm.json("template", "list")
    assert instance_at(str(absent)).json("template", "show", "busybox") == jm.json("template", "show", "busybox")
    assert not absent.exists()


def test_a_relative_root_is_refused(jm: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = jm.refused("list", status=2, env={"JAILMGR_ROOT": "typo"}).err
    assert f"Hint: Give the whole path, such as {tmp_path}/typo." in told
    jm.refused("list", "--root", "./typo", status=2)
    assert os.listdir(tmp_path) == []


def test_an_engine_ends_with_its_root(new_instance: Callable[[], Instance]) -> None:
    instance = new_instance()
    instance("list")
    engine = os.pidfd_open(instance.engine_pid())
    try:
        shutil.rmtree(instance.root.at)
        assert select.select([engine], [], [], 20)[0], "the engine serves a root that is gone"
    finally:
        os.close(engine)
    assert not os.path.exists(instance.root.at)
    os.mkdir(instance.root.at)


def test_the_console_is_left_at_the_end_of_stdin(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm("console", name, within=20)
    process = jm.popen("console", name, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process.communicate(b"echo typed > /typed\n", timeout=20)
    assert process.returncode == 0
    until(lambda: jm.sh(name, "cat /typed", status=None).out == "typed\n", what="the last line is typed")


def test_a_stop_that_ends_in_a_kill_is_reported(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    assert jm("stop", name).err == ""
    assert jm.info(name)["last_ended"]["timed_out"] is False
    jm("start", name)
    os.kill(jm.info(name)["init_pid"], signal.SIGSTOP)
    told = jm("stop", name, "--timeout", "3").err
    assert "waiting for init to end" in told
    assert "killed after 3 s" in told
    assert jm.info(name)["last_ended"]["timed_out"] is True
    assert "init had not ended in time" in jm("info", name).out
    jm("start", name)
    os.kill(jm.info(name)["init_pid"], signal.SIGSTOP)
    assert jm.json("stop", name, "--timeout", "1")[0]["killed_after"] == 1
    jm("start", name)
    jm("stop", name, "--force")
    assert jm.info(name)["last_ended"]["timed_out"] is False


LATE = "sleep 2; trap 'exit 0' USR2; while :; do sleep 0.1; done"
"""An init that installs its handler late."""


def test_a_stop_waits_for_inits_handler(jm: Instance, busybox_jail: MakeJail) -> None:
    """The kernel drops a signal that init has no handler for, and an init that has just begun has none."""
    name = busybox_jail()
    set_init(jm, name, LATE)
    jm("start", name)
    assert "killed_after" not in jm.json("stop", name, "--timeout", "20")[0]
    ended = jm.info(name)["last_ended"]
    assert (ended["by"], ended["timed_out"], ended["status"]) == ("admin", False, 0)


def test_a_stop_that_waits_outlives_an_upgrade(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    set_init(jm, name, LATE)
    jm("start", name)
    with attach.connect(jm.root, "default", start=False) as supervisor:
        supervisor.tell("stop", jail=name, timeout=20)
        supervisor.ask("reexec", argv=attach.successor(jm.root, "default"))
        ended = supervisor.hear().body["last"]
    assert (ended["by"], ended["timed_out"], ended["status"]) == ("admin", False, 0)


def test_an_init_without_a_handler_is_killed_in_time(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    set_init(jm, name, "while :; do sleep 1; done")
    jm("start", name)
    assert jm.json("stop", name, "--timeout", "1")[0]["killed_after"] == 1


def test_no_rate_of_cpus_before_the_second_look(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm.sh(name, "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done")
    jm("engine", "stop")

    def cpus() -> float | None:
        (tenant,) = [row for row in jm.json("tenant", "list") if row["tenant"] == "default"]
        rate: float | None = tenant["used"]["cpu"]
        return rate

    assert cpus() is None, "the whole count is no difference"
    rate = until(lambda: [found] if (found := cpus()) is not None else None)[0]
    assert 0 <= rate <= (os.cpu_count() or 1) * 1.1


def test_hints_can_be_followed(jm: Instance, busybox_jail: MakeJail, other_tenant: str) -> None:
    """Two jails of one name: what is printed about one of them never leads to the other."""
    name = busybox_jail()
    theirs = f"{other_tenant}/{name}"
    assert jm("launch", "busybox", theirs).out == f"{theirs}\n"
    as_them = {"JAILMGR_TENANT": other_tenant}
    cases: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        (("delete", theirs), {}, theirs),
        (("--tenant", other_tenant, "delete", name), {}, theirs),
        (("delete", name), as_them, name),
        (("delete", f"default/{name}"), as_them, f"default/{name}"),
        (("delete", name), {}, name),
    ]
    for words, env, meant in cases:
        told = jm.refused(*words, env=env).err
        assert f"Error: jail {meant}: " in told
        assert f"(jailmgr stop {meant})" in told
    jm("stop", theirs)
    assert jm.status(name) == "Running"
    assert f"jailmgr start {theirs}" in jm.refused("exec", theirs, "--", "true", status=125).err
    assert f"jail {theirs}x" in jm.refused("info", f"{theirs}x").err
    assert jm("launch", "busybox", "again", env=as_them).out == "again\n"
    jm("delete", "--force", f"{other_tenant}/again")
    jm("delete", theirs)
