"""The host goes down and comes up again: what ran stops in order, and is there again. A reboot lies between the two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.system.instance import Instance, until
from tests.system.netns import run
from tests.vm.conftest import unit_property

FIRST, SECOND, NEVER, STOPPED = "first", "second", "never", "stopped"


@pytest.mark.before_reboot
def test_before(host: Instance) -> None:
    host("launch", "busybox", FIRST, "-c", "boot.autostart.priority=10", "-c", "boot.stop.priority=5", within=300)
    host("launch", "busybox", SECOND, "-c", "boot.autostart=true", "-c", "boot.stop.priority=10")
    host("launch", "busybox", NEVER, "-c", "boot.autostart=false")
    host("launch", "busybox", STOPPED)
    host("stop", "--force", STOPPED)
    for name in (FIRST, SECOND):
        host.sh(name, "echo kept > /root/note && sync")
    # No engine at the host's end: systemd would start none.
    run("systemctl", "stop", "jailmgr.service")


@pytest.mark.after_reboot
def test_after(host: Instance) -> None:
    until(lambda: unit_property("jailmgr-autostart.service", "ActiveState") == "active", 120, "autostart is done")
    jails = {row["name"]: row for row in host.json("list")}
    assert {name: jails[name]["status"] for name in (FIRST, SECOND, NEVER, STOPPED)} == {
        FIRST: "Running", SECOND: "Running", NEVER: "Stopped", STOPPED: "Stopped",
    }  # fmt: skip
    for name in (FIRST, SECOND):
        assert host.exec(name, "cat", "/root/note").out == "kept\n"
    ended = {name: _last(host, name) for name in (FIRST, SECOND, NEVER, STOPPED)}
    assert {name: last["by"] for name, last in ended.items()} == {
        FIRST: "host", SECOND: "host", NEVER: "host", STOPPED: "admin",
    }  # fmt: skip
    assert ended[SECOND]["kind"] == "poweroff"
    assert ended[SECOND]["at"] < ended[FIRST]["at"], "the highest boot.stop.priority is stopped first"
    begun = {
        name: json.loads(Path(f"/run/jailmgr/tenants/default/{name}.json").read_text()) for name in (FIRST, SECOND)
    }
    assert begun[FIRST]["started_at"] < begun[SECOND]["started_at"]
    assert unit_property("jailmgr-autostart.service", "Result") == "success"
    assert unit_property("jailmgr-autostart.service", "ExecMainStatus") == "0", "a failure of it is no result"
    leftovers = next(row for row in host("doctor", "--format", "json", status=None).json if row["check"] == "leftovers")
    assert leftovers["ok"], leftovers


def _last(host: Instance, name: str) -> dict[str, Any]:
    found = json.loads(Path(host.root.jail_lib("default", name), "last.json").read_text())
    assert isinstance(found, dict)
    return found
