"""Jails that are there and that the store does not know: an older store was put back, or it was lost.

Nothing of theirs is removed or given away, whatever is asked for, and `doctor --fix --adopt` takes them back.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.instance import Instance, Result, alive

pytestmark = pytest.mark.xdist_group("doctor-fix")
"""`doctor --fix` raises the host's sysctls, which test_doctor.py lowers: one after the other."""

BUILD_WITHIN = 300
LAUNCH = ("launch", "busybox")
PING = "busybox ping -c 1 -w 5 $(ip route | awk '/^default/ { print $3 }')"


@pytest.fixture
def instance(new_instance: Callable[[], Instance]) -> Instance:
    made = new_instance()
    made(*LAUNCH, "old", "--memory", "64MiB", within=BUILD_WITHIN)
    made("engine", "stop")
    return made


@contextmanager
def older_store(instance: Instance) -> Iterator[None]:
    """What the body does is lost: the store of before is put back, as our own hint says, and the engine is stopped."""
    store = Path(instance.root.store)
    shutil.copy(store, f"{store}.before")
    yield
    instance("engine", "stop")
    os.replace(f"{store}.before", store)


def change_store(instance: Instance, *statements: str) -> None:
    db = sqlite3.connect(instance.root.store)
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


def mark(instance: Instance, jail: str) -> dict[str, Any]:
    """Leave something in a jail; what `info` says of it."""
    instance.sh(jail, f"echo {jail} is kept > /root/note && sync")
    return instance.info(jail)


def unharmed(instance: Instance, jail: str, before: dict[str, Any]) -> None:
    """It runs on as it was: the same init, address, limits and files, and its network is whole."""
    assert alive(before["init_pid"])
    now = instance.info(jail)
    for field in ("init_pid", "ipv4", "ipv6", "limits", "config", "devices", "idmap", "uuid", "created_at", "source"):
        assert now[field] == before[field], field
    assert instance.sh(jail, "cat /root/note").out == f"{jail} is kept\n"
    instance.sh(jail, PING)


def bridges(instance: Instance) -> dict[str, str]:
    """The bridge of each tenant's network."""
    return {row["tenant"]: row["bridge"] for row in instance.ok("GET", "/1.0/networks?recursion=1&all-projects=true")}


def adopt(instance: Instance) -> Result:
    instance("engine", "stop")
    result = instance("doctor", "--fix", "--adopt", "--format", "json", status=None)
    found = {check["check"]: check for check in result.json}
    assert found["leftovers"]["ok"], result.told()
    return result


def refused(instance: Instance, *argv: str) -> str:
    """What a refusal says; it names the remedy."""
    error = instance.refused(*argv).err
    assert "jailmgr doctor --fix --adopt" in error, error
    return error


def test_a_name_of_which_anything_is_there_is_refused_and_keeps_it(instance: Instance) -> None:
    with older_store(instance):
        instance(*LAUNCH, "web", "-p", "18080:80", "--memory", "96MiB")
        before = mark(instance, "web")
    for command in ("launch", "create"):
        error = refused(instance, command, "busybox", "web")
        assert "volume" in error
        assert "directory" in error
        assert "state file" in error
    assert alive(before["init_pid"])
    adopt(instance)
    unharmed(instance, "web", before)
    instance("delete", "--force", "web")
    assert not alive(before["init_pid"])
    instance(*LAUNCH, "web")


@pytest.mark.parametrize("left", ["volume", "directory", "state", "cgroup"])
def test_each_thing_alone_is_enough(instance: Instance, left: str) -> None:
    root = instance.root
    instance("list")
    path = {
        "volume": f"{root.volume('default', 'web')}",
        "directory": root.jail_lib("default", "web"),
        "state": f"{root.tenant_run('default')}/web.json",
        "cgroup": next(
            f"{mount}/{root.cgroup}/default/web"
            for mount in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")
            if os.path.isdir(f"{mount}/{root.cgroup}/default")
        ),
    }[left]
    if left == "state":
        Path(path).write_text("{}")
    else:
        os.mkdir(path)
    try:
        assert left in refused(instance, *LAUNCH, "web")
        assert os.path.exists(path)
        instance("stop", "--force", "old")
        assert left in refused(instance, "rename", "old", "web")
        assert os.path.exists(path)
        assert [row["name"] for row in instance.json("list")] == ["old"]
    finally:
        os.unlink(path) if left == "state" else os.rmdir(path)
    instance("rename", "old", "web")


def test_what_a_lost_jail_has_is_given_to_nobody(instance: Instance) -> None:
    with older_store(instance):
        instance("tenant", "create", "acme", "--memory", "1GiB")
        instance(*LAUNCH, "web", "-p", "18080:80")
        instance(*LAUNCH, "acme/db")
        before = mark(instance, "web")
        base, netns = int(before["idmap"].split()[1]), os.open(before["netns"], os.O_RDONLY)
        acme = instance.info("acme/db")
    refused(instance, "tenant", "create", "acme")
    assert "18080" in instance.refused(*LAUNCH, "second", "-p", "18080:80").err
    instance(*LAUNCH, "other")
    other = instance.info("other")
    assert other["ipv4"] != before["ipv4"]
    assert int(other["idmap"].split()[1]) not in (base, int(acme["idmap"].split()[1]))
    assert before["ipv4"] in instance.refused(*LAUNCH, "third", "--ip", before["ipv4"]).err
    # The rules were made anew with the first start: those of the unknown jail are among them.
    subprocess.run(
        ["nsenter", f"--net=/proc/self/fd/{netns}", "sh", "-c", PING], check=True, pass_fds=[netns], timeout=10
    )
    os.close(netns)
    instance("tenant", "create", "new")
    instance(*LAUNCH, "new/x")
    networks = bridges(instance)
    instance("delete", "--force", "old", "other", "new/x")
    refused(instance, "image", "delete", "busybox")
    adopt(instance)
    unharmed(instance, "web", before)
    assert instance.info("acme/db")["init_pid"] == acme["init_pid"]
    assert instance.json("tenant", "list")[0]["limits"]["memory_bytes"] == 1 << 30
    assert len(set(bridges(instance).values())) == 3
    assert bridges(instance).items() > networks.items()
    assert instance.json("port", "list")[0]["host_port"] == 18080
    instance("restart", "--force", "web")
    unharmed(instance, "web", before | {"init_pid": instance.info("web")["init_pid"]})
    instance("delete", "--force", "acme/db")
    instance("tenant", "delete", "acme")
    instance("tenant", "delete", "new")


@pytest.mark.parametrize("loss", ["gone", "empty", "no schema", "no rows"])
def test_a_lost_store_is_refused_and_jails_are_taken_back(instance: Instance, loss: str) -> None:
    before, store = mark(instance, "old"), Path(instance.root.store)
    copies = sorted(path for path in store.parent.glob("store.db.good*") if "-" not in path.name)
    assert copies
    instance("engine", "stop")
    kept = {path: path.read_bytes() for path in copies}
    if loss == "no rows":
        change_store(instance, *(f"DELETE FROM {table}" for table in ("ports", "nics", "jails", "networks", "tenants")))
    else:
        for tail in ("", "-wal", "-shm"):
            Path(f"{store}{tail}").unlink(missing_ok=True)
        if loss == "empty":
            store.touch()
        elif loss == "no schema":
            sqlite3.connect(store).execute("VACUUM").connection.close()
    for command in (("list",), (*LAUNCH, "x"), ("create", "busybox", "old"), ("info", "old")):
        error = refused(instance, *command)
        assert "store" in error
        assert f"{store}.good" in error
    assert {path: path.read_bytes() for path in copies} == kept
    assert alive(before["init_pid"])
    adopt(instance)
    unharmed(instance, "old", before)
    instance(*LAUNCH, "x")
    assert instance.info("x")["ipv4"] != before["ipv4"]


def test_the_copy_put_back_as_the_hint_says(instance: Instance) -> None:
    before, store = mark(instance, "old"), Path(instance.root.store)
    instance("engine", "stop")
    store.write_bytes(b"")
    hint = instance.refused("list").err
    copy = next(word.rstrip(":,") for word in hint.split() if ".good" in word)
    for tail in ("", "-wal", "-shm"):
        if os.path.exists(f"{store}{tail}"):
            os.rename(f"{store}{tail}", f"{store}{tail}.aside")
    shutil.copy(copy, store)
    unharmed(instance, "old", before)


def test_a_row_of_an_earlier_jail_of_that_name_touches_nothing(instance: Instance) -> None:
    with older_store(instance):
        instance("delete", "--force", "old")
        instance(*LAUNCH, "old", "-e", "WHO=second")
        before = mark(instance, "old")
    for command in (
        ("delete", "--force", "old"),
        ("start", "old"),
        ("stop", "--force", "old"),
        ("rename", "old", "new"),
        ("set", "old", "user.a=b"),
    ):
        refused(instance, *command)
    assert alive(before["init_pid"])
    adopt(instance)
    unharmed(instance, "old", before)


@pytest.mark.parametrize("state", ["creating", "deleting"])
def test_a_state_of_an_older_store_destroys_nothing(instance: Instance, state: str) -> None:
    """The copy may be of the moment in which a jail was made, or one of that name was deleted."""
    if state == "creating":
        before = mark(instance, "old")
        instance("engine", "stop")
        change_store(instance, "UPDATE jails SET state = 'creating'")
    else:
        with older_store(instance):
            instance("delete", "--force", "old")
            instance(*LAUNCH, "old")
            before = mark(instance, "old")
        change_store(instance, "UPDATE jails SET state = 'deleting'")
    instance("list")
    assert alive(before["init_pid"])
    if state == "deleting":
        adopt(instance)
    unharmed(instance, "old", before)


def test_adopt_is_for_nobody_beside_an_engine_or_without_fix(instance: Instance) -> None:
    instance("list")
    assert "engine stop" in instance.refused("doctor", "--fix", "--adopt").err
    instance.refused("doctor", "--adopt", status=2)


def test_what_cannot_be_taken_back_is_named_and_stays(instance: Instance) -> None:
    with older_store(instance):
        instance(*LAUNCH, "web")
        before = mark(instance, "web")
    config = Path(instance.root.jail_lib("default", "web"), "config.json")
    whole = config.read_text()
    content = json.loads(whole)
    del content["annotations"]["org.jailmgr.store"]
    config.write_text(json.dumps(content))
    instance("engine", "stop")
    result = instance("doctor", "--fix", "--adopt", "--format", "json", status=1)
    assert "not adopted: default/web" in result.err
    assert alive(before["init_pid"])
    instance(*LAUNCH, "other")
    assert instance.info("other")["ipv4"] != before["ipv4"]
    refused(instance, *LAUNCH, "web")
    config.write_text(whole)
    adopt(instance)
    unharmed(instance, "web", before)


def test_a_copy_of_a_jail_does_not_take_its_place(instance: Instance) -> None:
    """An admin's copy of a directory and a volume keeps the id, the address and the row of the first jail in it."""
    root, before = instance.root, mark(instance, "old")
    instance("engine", "stop")
    shutil.copytree(root.jail_lib("default", "old"), root.jail_lib("default", "copy"))
    os.mkdir(root.volume("default", "copy"))
    try:
        result = instance("doctor", "--fix", "--adopt", "--format", "json", status=1)
        assert "not adopted: default/copy" in result.err
        assert [row["name"] for row in instance.json("list")] == ["old"]
        unharmed(instance, "old", before)
    finally:
        shutil.rmtree(root.jail_lib("default", "copy"))
        os.rmdir(root.volume("default", "copy"))
