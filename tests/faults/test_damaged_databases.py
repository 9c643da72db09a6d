"""store.db and usage.db damaged in every way we know, with real jails: nothing is lost that isn't lost with the file.

Of a damaged store, every command is refused with an error and a remedy; running jails go on, `exec` too; and after the
remedy all is as before. A damaged usage.db is set aside. tests/system/test_lost_rows.py has what `doctor --fix --adopt`
takes back.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.faults.damage import LOG_OF_ANOTHER, SILENT, TAILS, WAYS, remove
from tests.faults.truth import Key, Reported, marker_of, settled
from tests.system.conftest import _end as end_instance
from tests.system.conftest import _make_instance as make_instance
from tests.system.instance import Instance, Result, alive
from tests.system.netns import Netns

KEYS: tuple[Key, ...] = (("default", "web"), ("default", "off"), ("acme", "db"))
UP = (("default", "web"), ("acme", "db"))
PORT = "18080"
COMMANDS = (
    ("list",), ("launch", "busybox", "new"), ("delete", "--force", "web"),
    ("info", "web"), ("start", "off"), ("stop", "--force", "web"), ("restart", "--force", "acme/db"),
    ("rename", "off", "other"), ("set", "web", "limits.memory=70MiB"), ("port", "publish", "web", "18081:81"),
    ("port", "list"), ("tenant", "create", "more"), ("tenant", "delete", "acme"), ("image", "delete", "busybox"),
    ("create", "busybox", "web"), ("delete", "--force", "--all"),
)  # fmt: skip


class World(NamedTuple):
    """An instance with jails, a copy of each of its databases, and what was reported of them."""

    instance: Instance
    before: Reported
    whole: dict[str, bytes]

    @property
    def store(self) -> Path:
        return Path(self.instance.root.store)

    @property
    def usage(self) -> Path:
        return Path(self.instance.root.usage)

    def unharmed(self) -> None:
        """Nobody has lost an init or a file."""
        for key, (pid, _) in self.before.inits.items():
            assert alive(pid), key
        for key in KEYS:
            if os.path.ismount(self.instance.root.pool):
                assert marker_of(self.instance, key) == f"{key[1]} is kept\n"
            assert Path(self.instance.root.jail_lib(*key)).is_dir()

    def as_before(self) -> None:
        """The jails, their states, inits, addresses, keys and ports are what they were."""
        now = settled(self.instance)
        assert now.inits == self.before.inits
        assert now.ports == self.before.ports
        assert _lasting(now) == _lasting(self.before)
        self.unharmed()


def _lasting(said: Reported) -> dict[Key, Any]:
    return {key: {name: row[name] for name in row if name != "usage"} for key, row in said.jails.items()}


@pytest.fixture(scope="module")
def instance(netns: Netns) -> Iterator[Instance]:
    """Three jails of two tenants, each with a marker."""
    made = make_instance()
    made("launch", "busybox", "web", "--memory", "64MiB", "-p", f"{PORT}:80")
    made("tenant", "create", "acme", "--jails", "5")
    made("launch", "busybox", "acme/db")
    made("launch", "busybox", "off")
    for tenant, name in KEYS:
        made("cp", "-", f"{tenant}/{name}:/root/marker", stdin=f"{name} is kept\n".encode())
    made("stop", "--force", "off")
    yield made
    for row in made.json("list", "--all-tenants"):
        made("delete", "--force", f"{row['tenant']}/{row['name']}")
    made("tenant", "delete", "acme")
    end_instance(made)


@pytest.fixture(scope="module", params=[True, False], ids=["running", "stopped"])
def whole(instance: Instance, request: pytest.FixtureRequest) -> World:
    """The instance with no engine, and with copies of the store that have all of it."""
    for tenant, name in UP:
        status = instance.status(f"{tenant}/{name}")
        if (status == "Running") != request.param:
            instance(*(("start",) if request.param else ("stop", "--force")), f"{tenant}/{name}")
    before = settled(instance)
    instance("engine", "stop")
    instance("tenant", "usage", "--since", "1h")  # an engine copies the store as it begins
    instance("engine", "stop")
    databases = (instance.root.store, instance.root.usage)
    return World(instance, before, {path: Path(path).read_bytes() for path in databases})


@pytest.fixture
def world(whole: World) -> Iterator[World]:
    """The same. Both databases are put back after the test."""
    yield whole
    whole.instance("engine", "stop", status=None)
    for path, content in whole.whole.items():
        remove(Path(path))
        Path(path).write_bytes(content)
    for left in whole.usage.parent.glob("*.db.2*"):
        remove(left)


def refused(world: World, *argv: str) -> Result:
    """A refusal for the store's sake."""
    result = world.instance(*argv, status=125 if argv[0] == "exec" else 1)
    assert result.out == "", result.told()
    assert "Error: " in result.err, result.told()
    assert "store" in result.err, result.told()
    assert "Hint: " in result.err, result.told()
    return result


def put_copy_back(world: World, hint: str) -> None:
    """Do as the hint says; the store of the test where it names no copy (a newer release's)."""
    copies = [word.rstrip(":,.") for word in hint.split() if ".db.good" in word]
    content = Path(copies[0]).read_bytes() if copies else world.whole[str(world.store)]
    for tail in TAILS:
        remove(Path(f"{world.store}{tail}"))
    world.store.write_bytes(content)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in SILENT])
def test_a_damaged_store_is_refused_with_the_remedy(world: World, way: str) -> None:
    WAYS[way](world.store, chance := random.Random(way))
    for argv in chance.sample(COMMANDS, 2):
        hint = refused(world, *argv).err
    world.unharmed()
    if world.before.inits:
        assert world.instance.exec("web", "cat", "/root/marker").out == "web is kept\n"
    assert not world.instance.json("engine", "status")["running"]
    put_copy_back(world, hint)
    world.as_before()
    if way in ("missing", "no JSON"):
        fresh_has_nothing_of_others(world)


@pytest.mark.parametrize("way", SILENT)
def test_scattered_bytes_cost_no_jail(world: World, way: str) -> None:
    """Damage that SQLite sees is an error. Bytes that fell on nothing, or into a value, leave a store that is read."""
    WAYS[way](world.store, random.Random(way))
    for argv in (("list",), ("port", "list"), ("doctor",)):
        result = world.instance(*argv, status=None)
        assert result.status == 0 or "Error: " in result.err or argv[0] == "doctor", result.told()
        assert "UnicodeDecodeError" not in result.err, result.told()
    assert all(alive(pid) for pid, _ in world.before.inits.values())
    world.instance("engine", "stop", status=None)
    put_copy_back(world, "")
    world.as_before()


def test_a_log_of_another_database(world: World) -> None:
    """SQLite plays a log into the file whose checksums are right: then the store is another, which is an error."""
    LOG_OF_ANOTHER(world.store, random.Random(1))
    listed = world.instance("list", "-A", "--format", "json", status=None)
    if listed.status == 0:
        assert {row["name"] for row in json.loads(listed.out)} == {"web", "off", "db"}
        world.as_before()
        return
    hint = refused(world, "list").err
    refused(world, "launch", "busybox", "new")
    world.unharmed()
    put_copy_back(world, hint)
    world.as_before()


def test_an_older_store_put_back(instance: Instance, world: World) -> None:
    """Of a jail that came later nothing is given away, and nothing is deleted."""
    late, port = ("default", "late"), "18090"
    instance("launch", "busybox", "late", "-p", f"{port}:80")
    instance("cp", "-", "late:/root/marker", stdin=b"late is kept\n")
    row = settled(instance).jails[late]
    instance("engine", "stop")
    put_copy_back(world, "")
    try:
        for verb in ("launch", "create"):
            assert "late" in instance.refused(verb, "busybox", "late").err
        assert port in instance.refused("launch", "busybox", "new", "-p", f"{port}:80").err
        instance("launch", "busybox", "new")
        new = instance.info("new")
        assert new["ipv4"] != row["ipv4"]
        assert int(new["idmap"].split()[1]) != _base(row["init_pid"])
        assert alive(row["init_pid"])
        assert marker_of(instance, late) == "late is kept\n"
        instance("delete", "--force", "new")
        instance("engine", "stop")
        instance("doctor", "--fix", "--adopt", status=None)
        assert settled(instance).inits[late][0] == row["init_pid"]
    finally:
        instance("delete", "--force", "late", status=None)
    world.as_before()
    instance("engine", "stop")
    world.whole[instance.root.store] = world.store.read_bytes()


def _base(pid: int) -> int:
    return int(Path(f"/proc/{pid}/uid_map").read_text().split()[1])


def fresh_has_nothing_of_others(world: World) -> None:
    """A new jail gets no address, id or port of one that is there."""
    instance = world.instance
    taken = {world.before.jails[key]["ipv4"] for key in KEYS}
    assert PORT in instance.refused("launch", "busybox", "new", "-p", f"{PORT}:80").err
    instance("launch", "busybox", "new")
    assert instance.info("new")["ipv4"] not in taken
    bases = [_base(pid) for pid, _ in settled(instance).inits.values()]
    assert len(set(bases)) == len(bases)
    instance("delete", "--force", "new")


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_usage_is_set_aside(world: World, way: str) -> None:
    """The engine and every command go on; of the file, nothing is removed."""
    WAYS[way](world.usage, random.Random(way))
    there = world.usage.exists() and not world.usage.is_file()
    world.as_before()
    usage = world.instance.json("tenant", "usage", "--since", "1h")
    assert {row["tenant"] for row in usage} == {"default", "acme"}
    if there:
        assert list(world.usage.parent.glob("usage.db.2*")), "it is set aside"
    if world.before.inits:
        assert world.instance.exec("web", "true").status == 0


def test_a_log_of_another_database_beside_usage(world: World) -> None:
    LOG_OF_ANOTHER(world.usage, random.Random(2))
    world.as_before()
    world.instance("tenant", "usage", "--since", "1h")


def test_both_at_once(world: World) -> None:
    """As after a power cut: both are empty."""
    for path in (world.store, world.usage):
        remove(path)
        path.touch()
    hint = refused(world, "list").err
    world.unharmed()
    shutil.copy(next(word.rstrip(":,") for word in hint.split() if ".db.good" in word), world.store)
    world.as_before()
