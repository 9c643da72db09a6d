"""A supervisor touches a jail only by a config.json of that jail, and clears away only what its own call made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from jailmgr.runtime import attach
from jailmgr.runtime.state import supervisor_process
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, alive, kill


def test_cp_after_a_rename_goes_to_the_jail_of_that_name(jm: Instance, busybox_jail: MakeJail, tmp_path: Path) -> None:
    """The old name is another jail's by then, and it runs."""
    first = busybox_jail()
    jm("stop", "--force", first)
    jm("rename", first, "renamed")
    jm("launch", "busybox", first)
    try:
        before = jm.info(first)
        jm("cp", "-", "renamed:/root/note", stdin=b"for the renamed one")
        assert jm("cp", "renamed:/root/note", "-").out == "for the renamed one"
        assert jm.info(first)["init_pid"] == before["init_pid"]
        assert alive(before["init_pid"])
        jm.exec(first, "test", "-e", "/root/note", status=1)
        jm("start", "renamed")
        assert jm.exec("renamed", "cat", "/root/note").out == "for the renamed one"
        assert jm.exec("renamed", "hostname").out == "renamed\n"
    finally:
        jm("delete", "--force", "renamed")


def test_cp_with_a_jail_that_was_never_started(jm: Instance, tmp_path: Path) -> None:
    jm("create", "busybox", "new")
    try:
        jm("cp", "-", "new:/root/note", stdin=b"early")
        assert jm("cp", "new:/root/note", "-").out == "early"
        jm("start", "new")
        assert jm.exec("new", "cat", "/root/note").out == "early"
    finally:
        jm("delete", "--force", "new")


def test_a_config_of_another_jail_is_refused(jm: Instance, busybox_jail: MakeJail, tmp_path: Path) -> None:
    """By start, cp and a restart alike; the jail whose it is runs on."""
    one, other = busybox_jail(), busybox_jail()
    before = jm.info(one)
    jm("stop", "--force", other)
    config, theirs = (Path(jm.root.jail_lib("default", name), "config.json") for name in (other, one))
    own = config.read_text()
    mixed = json.loads(own)
    mixed["root"]["path"] = json.loads(theirs.read_text())["root"]["path"]
    for content in (theirs.read_text(), json.dumps(mixed)):
        config.write_text(content)
        error = jm.refused("cp", "-", f"{other}:/root/note").err
        assert "config.json" in error
        assert alive(before["init_pid"])
        jm.exec(one, "test", "-e", "/root/note", status=1)
    config.write_text(own)
    jm("start", other)


def test_a_start_kills_nothing_that_is_not_its_own(jm: Instance, busybox_jail: MakeJail) -> None:
    """The group has processes that no state file tells of: the start fails, and they live."""
    jail = busybox_jail()
    state = Path(jm.root.tenant_run("default"), f"{jail}.json")
    supervisor = supervisor_process(jm.root, "default")
    assert supervisor is not None
    pid = jm.info(jail)["init_pid"]
    kept = f"{jm.root.at}/{jail}.json"
    kill(supervisor.pid)
    shutil.move(state, kept)
    try:
        assert "processes" in jm.refused("start", jail).err
        assert alive(pid)
    finally:
        # As it was: the next supervisor adopts the jail.
        found = supervisor_process(jm.root, "default")
        if found is not None:
            kill(found.pid)
        shutil.move(kept, state)
    assert jm.info(jail)["init_pid"] == pid
    jm.exec(jail, "true")
    assert os.path.exists(state)


@pytest.mark.parametrize("damage", ["{", "{}", '{"annotations":[]}'])
def test_a_damaged_config_keeps_nobody_from_a_running_jail(jm: Instance, busybox_jail: MakeJail, damage: str) -> None:
    """The engine writes it again as it begins, before a new supervisor reads it."""
    jail = busybox_jail()
    before = jm.info(jail)
    jm("engine", "stop")
    Path(jm.root.jail_lib("default", jail), "config.json").write_text(damage)
    kill(before["supervisor_pid"])
    assert jm.info(jail)["init_pid"] == before["init_pid"]
    assert jm.exec(jail, "echo", "here").out == "here\n"
    jm("stop", "--force", jail)
    assert not alive(before["init_pid"])


def test_a_supervisor_takes_a_jail_once_its_config_is_mended(jm: Instance, busybox_jail: MakeJail) -> None:
    """One that begins, and one that goes over to another release, take the tenant's other jails."""
    jail, other = busybox_jail(), busybox_jail()
    before = jm.info(jail)
    config = Path(jm.root.jail_lib("default", jail), "config.json")
    jm("engine", "stop")
    own = config.read_text()
    for way in ("reexec", "killed"):
        config.write_text("{")
        with attach.connect(jm.root, "default") as supervisor:
            pid = supervisor.ask("hello").body["pid"]
            if way == "reexec":
                supervisor.ask("reexec", argv=attach.successor(jm.root, "default"))
            else:
                kill(pid)
        with attach.connect(jm.root, "default") as supervisor:
            assert set(supervisor.ask("status").body["jails"]) & {jail, other} == {other}
        config.write_text(own)
        assert jm.exec(jail, "echo", "here").out == "here\n"
        with attach.connect(jm.root, "default") as supervisor:
            assert supervisor.ask("status").body["jails"][jail]["pid"] == before["init_pid"]
    jm("stop", "--force", jail)
    assert not alive(before["init_pid"])
