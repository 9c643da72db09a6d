"""The host's end and its next boot, as the units for them ask for it: which jails start, in which order all stop."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from jailmgr.store import Store
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, alive, until

FOR_EVER = b"while :; do sleep 1; done\n"


def ended(jm: Instance, name: str) -> dict[str, Any]:
    found = json.loads(Path(jm.root.jail_lib("default", name), "last.json").read_text())
    assert isinstance(found, dict)
    return found


def test_what_ran_is_started_again(jm: Instance, busybox_jail: MakeJail) -> None:
    ran, never = busybox_jail(), busybox_jail("-c", "boot.autostart=false")
    always = busybox_jail("-c", "boot.autostart=true", start=False)
    stopped, off = busybox_jail(), busybox_jail()
    jm("stop", "--force", stopped)
    jm.sh(off, "poweroff", status=None)
    until(lambda: jm.status(off) == "Stopped", 15, "it powers off")
    jm("engine", "stop")
    jm("engine", "shutdown")
    assert not jm.json("engine", "status")["running"]
    assert all(jail["status"] == "Stopped" for jail in jm.json("list"))
    assert (ended(jm, ran)["by"], ended(jm, stopped)["by"]) == ("host", "admin")
    jm("engine", "autostart")
    status = {jail["name"]: jail["status"] for jail in jm.json("list")}
    assert (status[ran], status[always]) == ("Running", "Running")
    assert (status[never], status[stopped], status[off]) == ("Stopped", "Stopped", "Stopped")
    before = jm.info(ran)["init_pid"]
    assert jm.json("engine", "autostart") == {}
    assert jm.info(ran)["init_pid"] == before


def test_an_engine_that_begins_after_the_shutdown_starts_none(jm: Instance, busybox_jail: MakeJail) -> None:
    """Where it cut the start after the boot off, which the next engine would otherwise go on with."""
    name = busybox_jail()
    jm("engine", "stop")
    store = Store(jm.root.store)
    store.open()
    store.set_fact("boot_id", "another")
    store.close()
    jm("engine", "shutdown")
    jm("list")
    jm("engine", "stop")
    assert jm.status(name) == "Stopped"
    jm("engine", "autostart")
    assert jm.status(name) == "Running"


def test_all_are_stopped_in_order(jm: Instance, busybox_jail: MakeJail) -> None:
    last = busybox_jail()
    first = busybox_jail("-c", "boot.stop.priority=10")
    inits = [jm.info(name)["init_pid"] for name in (last, first)]
    jm("pause", last)
    jm("engine", "shutdown")
    assert not any(alive(pid) for pid in inits)
    assert ended(jm, first)["at"] < ended(jm, last)["at"]
    jm("engine", "shutdown")


def test_no_tenant_waits_for_what_anothers_jails_say(jm: Instance, busybox_jail: MakeJail) -> None:
    mine = busybox_jail()
    keys = {"boot.autostart": "true", "boot.autostart.priority": "1000000", "boot.autostart.delay": "3600"}
    keys |= {"boot.stop.priority": "1000000", "boot.host_shutdown_timeout": "5"}
    jm("tenant", "create", "greedy")
    try:
        jm("launch", "busybox", "greedy/first", *(word for pair in keys.items() for word in ("-c", "=".join(pair))))
        jm.exec(
            "greedy/first",
            "sh",
            "-c",
            "cat > /sbin/init",
            stdin=b"#!/bin/sh\ntrap '' USR1 USR2 TERM PWR INT\n" + FOR_EVER,
        )
        jm("restart", "--force", "greedy/first")
        jm("engine", "shutdown")
        theirs = json.loads(Path(jm.root.jail_lib("greedy", "first"), "last.json").read_text())
        assert theirs["at"] - ended(jm, mine)["at"] > 3
        start = jm.popen("engine", "autostart", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: jm.status(mine) == "Running", 20, "it is started beside the other tenant's delay")
        start.kill()
        start.wait()
    finally:
        jm("delete", "--force", "greedy/first", status=None)
        jm("tenant", "delete", "greedy")


def test_all_are_stopped_though_the_store_is_damaged(jm: Instance, busybox_jail: MakeJail) -> None:
    names = [busybox_jail("-c", "boot.stop.priority=10"), busybox_jail()]
    inits = [jm.info(name)["init_pid"] for name in names]
    jm("engine", "stop")
    store = Path(jm.root.store)
    whole = store.read_bytes()
    store.write_bytes(b"no database at all, " * 400)
    try:
        done = jm("engine", "shutdown", status=1)
        assert f"Error: store {store}: " in done.err
        assert not any(alive(pid) for pid in inits)
        assert [ended(jm, name)["by"] for name in names] == ["host", "host"]
    finally:
        store.write_bytes(whole)
    jm("engine", "autostart")
    assert [jm.status(name) for name in names] == ["Running", "Running"]


def test_a_stop_by_the_admin_is_remembered_when_the_supervisor_is_new(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    runs = f"{jm.root.jail_lib('default', name)}/runs"
    assert os.path.exists(runs)
    os.kill(jm.info(name)["supervisor_pid"], 9)
    jm("stop", "--force", name)
    assert not os.path.exists(runs)
