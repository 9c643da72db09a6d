"""The Debian package on a fresh host: installed, upgraded under ten jails and an open `exec`, purged twice.

The tests go on from one another, in their order. Both packages come from script/build-deb, and lie in dist/.
"""

from __future__ import annotations

import glob
import os
import subprocess
from collections.abc import Iterator

import pytest

from jailmgr import __version__
from jailmgr.config import find_root
from jailmgr.runtime import attach
from tests.system import instance
from tests.system.instance import Instance, alive, until
from tests.system.netns import run
from tests.vm.conftest import LAB, unit_property

pytestmark = pytest.mark.package
COMMAND = "/usr/bin/jailmgr"
JAILS = tuple(f"p{number}" for number in range(10))
NEWER = f"{__version__}+1"
PLACES = ("/etc/jailmgr", "/run/jailmgr", "/usr/lib/jailmgr", "/var/lib/jailmgr", COMMAND)
LINKS = "/etc/systemd/system/*/jailmgr*"


@pytest.fixture(autouse=True)
def packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is the package's and not the tree's."""
    assert os.path.exists(LAB), "these tests change the machine they run on: script/test vm runs them in a lab VM"
    monkeypatch.setattr(instance, "COMMAND", COMMAND)


@pytest.fixture
def host() -> Instance:
    return Instance(find_root())


def apt(*argv: str) -> str:
    """What apt-get and the maintainer scripts said. AssertionError where it failed."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "--yes", "--no-install-recommends", *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def install(version: str) -> str:
    with open("/etc/debian_version", encoding="ascii") as file:
        release = file.read().partition(".")[0].strip()
    (found,) = glob.glob(f"{os.getcwd()}/dist/jailmgr_{version}-1~deb{release}_*.deb")
    return apt("install", found)


def processes() -> Iterator[str]:
    for path in glob.glob("/proc/[0-9]*"):
        try:
            with open(f"{path}/cmdline", "rb") as file:
                words = file.read().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(place in words for place in PLACES) and alive(int(os.path.basename(path))):
            yield f"process {words}"


def left() -> list[str]:
    """All that is of the package or of its instance, but for files."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = [f"mount {line.split()[4]}" for line in file if "jailmgr/pool" in line]
    links = [f"link {name}" for name in os.listdir("/sys/class/net") if name.startswith("jmlocal")]
    tables = [line for line in run("nft", "list", "tables").splitlines() if "jailmgr" in line]
    loops = [line for line in run("losetup", "--noheadings", "--output", "BACK-FILE").split() if "jailmgr" in line]
    groups = glob.glob("/sys/fs/cgroup/**/*jailmgr*", recursive=True)
    units = run("systemctl", "list-units", "--all", "--plain", "--no-legend", "jailmgr*").splitlines()
    return [*mounts, *links, *tables, *loops, *groups, *units, *processes()]


def until_nothing_is_left() -> None:
    found: list[str] = []

    def nothing() -> bool:
        found[:] = left()
        return not found

    until(nothing, 30, found)


def inits(host: Instance) -> dict[str, int]:
    return {row["name"]: row["init_pid"] for row in host.json("list") if row["status"] == "Running"}


def test_it_installs_with_its_units(host: Instance) -> None:
    install(__version__)
    for unit in ("jailmgr.socket", "jailmgr-autostart.service"):
        assert (unit_property(unit, "ActiveState"), unit_property(unit, "UnitFileState")) == ("active", "enabled")
    assert host("version").out == f"jailmgr {__version__}\n"
    with open("/proc/sys/fs/inotify/max_user_instances", encoding="ascii") as file:
        assert int(file.read()) == 8192
    assert os.stat("/run/jailmgr").st_mode & 0o777 == 0o700
    assert not glob.glob("/usr/lib/jailmgr/lib/python*/site-packages/pip*")
    assert glob.glob("/usr/lib/jailmgr/lib/python*/site-packages/jailmgr/cli/__pycache__/main.*.pyc")


def test_jails_are_launched_by_the_socket_unit(host: Instance) -> None:
    for name in JAILS:
        host("launch", "busybox", name, within=300)
    assert host.engine_pid() == int(unit_property("jailmgr.service", "MainPID"))
    assert {*inits(host)} == {*JAILS}


def test_an_upgrade_touches_no_jail_and_no_open_exec(host: Instance) -> None:
    before, engine = inits(host), host.engine_pid()
    supervisor = host.info(JAILS[0])["supervisor_pid"]
    with host.popen("exec", JAILS[0], "--", "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as talk:
        assert talk.stdin is not None
        assert talk.stdout is not None
        talk.stdin.write(b"before\n")
        talk.stdin.flush()
        assert talk.stdout.readline() == b"before\n"
        install(NEWER)
        talk.stdin.write(b"after\n")
        talk.stdin.close()
        assert talk.stdout.read() == b"after\n"
    assert talk.returncode == 0
    about = host.json("engine", "status")
    assert about["version"] == NEWER
    assert about["pid"] == int(unit_property("jailmgr.service", "MainPID")) != engine
    assert inits(host) == before
    assert host.info(JAILS[0])["supervisor_pid"] == supervisor
    with attach.connect(host.root, "default", start=False) as connection:
        until(lambda: connection.ask("hello").body["release"] == NEWER, 30, "the supervisor goes over, in place")
    assert host.sh(JAILS[1], "echo still here").out == "still here\n"
    host.sh(JAILS[1], "echo kept > /root/note && sync")


def test_a_purge_stops_all_and_keeps_what_tenants_have(host: Instance) -> None:
    said = apt("purge", "jailmgr")
    assert f"default/{JAILS[0]}" in said
    until_nothing_is_left()
    assert [place for place in PLACES if os.path.exists(place)] == ["/var/lib/jailmgr"]
    assert glob.glob(LINKS) == []


def test_installed_again_the_same_jails_run(host: Instance) -> None:
    install(NEWER)
    assert {*inits(host)} == {*JAILS}
    assert host.exec(JAILS[1], "cat", "/root/note").out == "kept\n"


def test_a_purge_without_jails_leaves_nothing(host: Instance) -> None:
    host("delete", "--force", "--all")
    apt("purge", "jailmgr")
    until_nothing_is_left()
    assert [place for place in PLACES if os.path.exists(place)] == []
    assert glob.glob(LINKS) == []
