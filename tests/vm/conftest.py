"""The lab VM: a Debian with systemd as process 1, cgroup v2 alone and AppArmor, where jailmgr is installed as it is on
a host. Nothing is put back: the VM is thrown away."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator

import pytest

from jailmgr.config import find_root
from tests.system.instance import COMMAND, Instance
from tests.system.netns import run

LAB = "/lab/guest.py"
UNITS = ("jailmgr.socket", "jailmgr.service", "jailmgr-autostart.service")

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def host() -> Instance:
    """The host's own instance, with its units."""
    assert os.path.exists(LAB), "these tests change the machine they run on: script/test vm runs them in a lab VM"
    if not os.path.lexists("/usr/bin/jailmgr"):
        os.symlink(COMMAND, "/usr/bin/jailmgr")
        for unit in UNITS:
            run("install", "-m", "644", f"packaging/systemd/{unit}", f"/etc/systemd/system/{unit}")
        run("systemctl", "daemon-reload")
        run("systemctl", "enable", "--now", "jailmgr.socket", "jailmgr-autostart.service")
    return Instance(find_root())


@pytest.fixture
def jail(host: Instance) -> Iterator[Callable[..., str]]:
    """Launches busybox jails, and gives their names."""
    made: list[str] = []

    def make(*options: str, name: str = "") -> str:
        made.append(name or f"v{next(_numbers)}")
        host("launch", "busybox", made[-1], *options, within=300)
        return made[-1]

    yield make
    for name in made:
        host("delete", "--force", name)


def unit_property(unit: str, name: str) -> str:
    return run("systemctl", "show", "--property", name, "--value", unit).strip()


def cgroup_of(pid: int) -> str:
    """A process's v2 group (cgroups(7))."""
    with open(f"/proc/{pid}/cgroup", encoding="ascii") as file:
        return file.read().strip().removeprefix("0::")


def in_a_login_session(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a scope that is gone afterwards with all that is left in it, as a login session may be."""
    scope = ["systemd-run", "--scope", "--quiet", "--unit=login.scope", "--property=KillMode=control-group"]
    done = subprocess.run([*scope, *argv], capture_output=True, text=True, timeout=300)
    subprocess.run(["systemctl", "stop", "login.scope"], capture_output=True, timeout=60)
    return done
