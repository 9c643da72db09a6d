"""set, get, unset, show, and the formats results come in."""

from __future__ import annotations

import csv
import io
import json

import pytest
import yaml

from tests.system.conftest import MakeJail
from tests.system.instance import Instance


def test_set_get_unset_show(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    jm("set", name, "limits.memory=256MiB", "user.owner=anna", "environment.COLOUR=blue")
    assert jm("get", name, "limits.memory").out == "256MiB\n"
    assert jm("get", name, "user.owner").out == "anna\n"
    shown = jm.json("show", name)
    assert shown["config"]["environment.COLOUR"] == "blue"
    jm("unset", name, "user.owner")
    assert jm("get", name, "user.owner").out == "\n"
    assert "user.owner" not in jm.json("show", name)["config"]


def test_what_needs_a_restart_is_said(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    assert "restart" in jm("set", name, "environment.COLOUR=blue").err
    assert jm.sh(name, "tr '\\0' '\\n' < /proc/1/environ | grep -c COLOUR", status=1).out == "0\n"
    jm("restart", "--force", name)
    assert jm.sh(name, "tr '\\0' '\\n' < /proc/1/environ").out.count("COLOUR=blue") == 1
    assert jm("set", name, "limits.processes=100").err == ""


def test_nothing_is_changed_where_one_of_several_is_wrong(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("--memory", "128MiB")
    for wrong in (
        "limits.memroy=1GiB",
        "limits.processes=many",
        "nonsense",
        "eth0.colour=blue",
        "security.nesting=true",
    ):
        refused = jm.refused("set", name, "limits.memory=512MiB", wrong, status=2)
        assert wrong.partition("=")[0].rpartition(".")[2] in refused.err
        assert jm("get", name, "limits.memory").out == "128MiB\n"


def test_a_near_miss_is_told(jm: Instance) -> None:
    for wrong, meant in (
        ("limits.memroy", "limits.memory"),
        ("limits.cpus", "limits.cpu"),
        ("boot.autostrat", "boot.autostart"),
    ):
        refused = jm.refused("launch", "busybox", "bad", "-c", f"{wrong}=1", status=2)
        assert meant in refused.err.partition("Hint: ")[2]
    assert jm.gone("bad")


def test_short_names_are_the_long_ones(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", "limits.disk=64MiB", "-c", "limits.cpu=2")
    shown = jm.json("show", name)
    assert shown["devices"]["root"]["size"] == "64MiB"
    assert jm("get", name, "limits.disk").out == jm("get", name, "root.size").out == "64MiB\n"
    assert jm.info(name)["limits"]["cpu"] == 2


def test_changes_to_a_stopped_jail_hold_when_it_starts(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail(start=False)
    jm("set", name, "limits.memory=48MiB", "limits.memory.swap=false")
    jm("start", name)
    jm.sh(name, "dd if=/dev/zero of=/dev/null bs=80M count=1", status=137)


def test_formats_tell_the_same(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    table = jm("list").out
    assert name in table
    assert "\x1b" not in table
    assert [row["name"] for row in json.loads(jm("list", "--format", "json").out)] == [name]
    assert [row["name"] for row in json.loads(jm("--format", "json", "list").out)] == [name]
    assert [row["name"] for row in yaml.safe_load(jm("list", "--format", "yaml").out)] == [name]
    rows = list(csv.reader(io.StringIO(jm("list", "--format", "csv").out)))
    assert any(name in row for row in rows)


@pytest.mark.parametrize("argv", [("info", "nowhere"), ("start", "nowhere"), ("exec", "nowhere", "--", "true")])
def test_an_error_as_json(jm: Instance, argv: tuple[str, ...]) -> None:
    result = jm("--format", "json", *argv, status=125 if argv[0] == "exec" else 1)
    assert result.out == ""
    told = json.loads(result.err)
    assert "nowhere" in told["error"]
    assert told["error_code"] == 404
