"""A network namespace and an instance of jailmgr for each worker, jails for each test, and nothing left of them."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from jailmgr.runtime.state import SUPERVISOR_LOG
from tests.system.instance import COMMAND, Instance, instance_at, until
from tests.system.leftovers import leftovers, running, scrap
from tests.system.netns import Netns, session_namespace

MakeJail = Callable[..., str]
DEBIAN = "debian/bookworm"
BUILD_WITHIN = 900
"""Seconds a build of Debian may take with a slow mirror."""
LOG_SHOWN = 4000

numbers = itertools.count(1)


def pytest_itemcollected(item: pytest.Item) -> None:
    """What needs Debian goes to one worker, so that it is built once, and may take as long as a build."""
    if {"debian", "debian_jail"} & set(getattr(item, "fixturenames", [])):
        item.add_marker("debian")
        item.add_marker(pytest.mark.xdist_group("debian"))
        item.add_marker(pytest.mark.timeout(BUILD_WITHIN + 120))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With what failed, the last that the worker's engine and supervisors said: these files go with the instance."""
    report = yield
    instance = getattr(item, "funcargs", {}).get("jm")
    if report.failed and isinstance(instance, Instance):
        run = Path(instance.root.run)
        for log in (run / "engine.log", *sorted(run.glob(f"tenants/*/{SUPERVISOR_LOG}"))):
            if log.exists() and (said := log.read_text(errors="replace")):
                report.sections.append((str(log), said[-LOG_SHOWN:]))
    return report


@pytest.fixture(scope="session")
def netns() -> Iterator[Netns]:
    """The worker's own network namespace: everything run from here on is in it."""
    assert os.geteuid() == 0, "the system tests boot jails, so they must run as root"
    with session_namespace() as made:
        yield made


@pytest.fixture(scope="session")
def jm(netns: Netns) -> Iterator[Instance]:
    """The worker's instance of jailmgr. Its lasting parts (pool, bridge, engine) are made by a first jail."""
    assert os.access(COMMAND, os.X_OK), f"{COMMAND} is missing: script/venv dev makes it"
    instance = _make_instance()
    instance("launch", "busybox", "warm", "-c", "limits.cpu=1", within=BUILD_WITHIN)
    instance("delete", "--force", "warm")
    yield instance
    _end(instance)


@pytest.fixture(scope="session")
def warm(jm: Instance) -> frozenset[str]:
    """What the worker's instance has on the host with no jail in it."""
    until(lambda: not any("supervisor" in line for line in running(leftovers(jm.root))), 15, "the supervisor ends")
    return frozenset(leftovers(jm.root))


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test that uses the worker's instance, there is no more of it than with no jail in it."""
    if "jm" not in request.fixturenames:
        yield
        return
    instance: Instance = request.getfixturevalue("jm")
    before = request.getfixturevalue("warm") | leftovers(instance.root)
    yield
    extra: set[str] = set()

    def clean() -> bool:
        extra.clear()
        extra.update(leftovers(instance.root) - before)
        return not extra

    until(clean, 10, extra)


@pytest.fixture
def new_instance(netns: Netns) -> Iterator[Callable[[], Instance]]:
    """Makes further instances, each thrown away whole after the test, with nothing left of it."""
    made: list[Instance] = []

    def make() -> Instance:
        made.append(_make_instance())
        return made[-1]

    try:
        yield make
        for instance in made:
            _end(instance)
    finally:
        for instance in made:
            if os.path.exists(instance.root.at):
                scrap(instance.root)


def _make_instance() -> Instance:
    return instance_at(tempfile.mkdtemp(prefix="jm-", dir="/tmp"))


def _end(instance: Instance) -> None:
    """Delete all jails, stop the engine, and see that nothing but files is left of the instance; then these go too."""
    try:
        for jail in instance.json("list", "--all-tenants"):
            instance("delete", "--force", f"{jail['tenant']}/{jail['name']}")
        instance("engine", "stop")
        left: set[str] = set()

        def gone() -> bool:
            left.clear()
            left.update(running(leftovers(instance.root)))
            return not left

        until(gone, 15, left)
        shutil.rmtree(instance.root.at)
    except BaseException:
        scrap(instance.root)
        raise


@pytest.fixture
def busybox_jail(jm: Instance) -> Iterator[MakeJail]:
    """Launches jails with a trivial init: `busybox_jail("--memory", "64MiB")` gives the name."""
    yield from _factory(jm, "busybox")


@pytest.fixture(scope="session")
def debian(jm: Instance) -> str:
    """The source of a Debian with systemd, built."""
    jm("create", DEBIAN, "built", within=BUILD_WITHIN)
    jm("delete", "built")
    return DEBIAN


@pytest.fixture
def debian_jail(jm: Instance, debian: str) -> Iterator[MakeJail]:
    """Launches jails with Debian and systemd, and waits until the system is up."""
    yield from _factory(jm, debian, "--wait")


def _factory(instance: Instance, source: str, *always: str) -> Iterator[MakeJail]:
    made: list[str] = []

    def make(*options: str, name: str | None = None, start: bool = True) -> str:
        name = name or f"j{next(numbers)}"
        made.append(name)
        if start:
            instance("launch", source, name, *always, *options)
        else:
            instance("create", source, name, *options)
        return name

    yield make
    for name in made:
        ended = instance("delete", "--force", name, status=None)
        assert ended.status == 0 or instance.gone(name), ended.told()


@pytest.fixture
def other_tenant(jm: Instance) -> Iterator[str]:
    """A second tenant, deleted with its jails after the test."""
    tenant = f"t{next(numbers)}"
    jm.json("list")
    jm.ok("POST", "/1.0/projects", {"name": tenant, "config": {}})
    yield tenant
    for jail in jm.json("--tenant", tenant, "list"):
        jm("--tenant", tenant, "delete", "--force", jail["name"])
    jm.ok("DELETE", f"/1.0/projects/{tenant}")
