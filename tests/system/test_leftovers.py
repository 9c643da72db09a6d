"""`doctor --fix` cleans up after a crash, and touches nothing that may be somebody's: a row can be lost, a jail not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jailmgr.runtime import cgroups
from tests.system.instance import Instance, alive, kill
from tests.system.leftovers import leftovers, running

pytestmark = pytest.mark.xdist_group("doctor-fix")
"""`doctor --fix` raises the host's sysctls, which test_doctor.py lowers: one after the other."""

BUILD_WITHIN = 300


@pytest.fixture
def instance(new_instance: Callable[[], Instance]) -> Instance:
    return new_instance()


def fixed(instance: Instance) -> str:
    """What `doctor` still finds after --fix, without an engine."""
    result = instance("doctor", "--fix", "--format", "json", status=None)
    assert result.out, result.told()
    found = result.json
    return str(next(row for row in found if row["check"] == "leftovers")["detail"])


def test_a_jail_whose_row_is_lost_keeps_all_it_has(instance: Instance) -> None:
    instance("launch", "busybox", "old", within=BUILD_WITHIN)
    instance("delete", "--force", "old")
    instance("engine", "stop")
    store = Path(instance.root.store)
    shutil.copy(store, f"{store}.before")
    instance("launch", "busybox", "new", within=BUILD_WITHIN)
    instance.sh("new", "echo kept > /root/note && sync")
    info = instance.info("new")
    instance("engine", "stop")
    os.rename(store, f"{store}.after")
    for there in (True, False):
        if there:
            shutil.copy(f"{store}.before", store)
        else:
            store.unlink()
        on_host = running(leftovers(instance.root))
        said = fixed(instance)
        assert ("new of a jail that the store does not know" in said) == there, said
        assert alive(info["init_pid"])
        assert alive(info["supervisor_pid"])
        assert on_host <= running(leftovers(instance.root))
    os.rename(f"{store}.after", store)
    assert instance.info("new")["init_pid"] == info["init_pid"]
    assert instance.sh("new", "cat /root/note").out == "kept\n"


def test_what_another_release_runs_is_left_alone(instance: Instance) -> None:
    instance("launch", "busybox", "theirs", within=BUILD_WITHIN)
    info = instance.info("theirs")
    state = Path(instance.root.tenant_run("default"), "theirs.json")
    content = json.loads(state.read_text())
    kill(instance.engine_pid())
    state.write_text(json.dumps(content | {"version": 99}))
    fixed(instance)
    assert alive(info["init_pid"])
    state.write_text(json.dumps(content))
    assert instance.info("theirs")["init_pid"] == info["init_pid"]


def test_a_group_with_processes_of_no_jail_goes(instance: Instance) -> None:
    instance("launch", "busybox", "first", within=BUILD_WITHIN)
    instance("delete", "--force", "first")
    instance("engine", "stop")
    hierarchies = cgroups.discover()
    group = f"{instance.root.cgroup}/default/gone"
    cgroups.tenant_group(hierarchies, instance.root.cgroup, "default")
    cgroups.create_jail_group(hierarchies, group, 0)
    assert group in cgroups.list_groups(hierarchies, instance.root.cgroup)
    assert fixed(instance) == "none"
    assert cgroups.list_groups(hierarchies, instance.root.cgroup) == []
