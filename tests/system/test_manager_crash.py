"""SIGKILL of the process that writes, at any moment: the next one finds every jail whole, or nothing of it."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import pytest

from jailmgr.config import Root, find_root
from jailmgr.manager.create import create
from jailmgr.manager.delete import delete
from jailmgr.manager.host import Manager
from jailmgr.manager.leftovers import find_leftovers
from jailmgr.manager.start import start
from jailmgr.manager.stop import stop
from jailmgr.manager.view import list_jails
from jailmgr.store import READY
from tests.system.instance import until
from tests.system.netns import Netns

ROUNDS = 15
BUSY = """
import itertools, sys
from jailmgr.config import find_root
from jailmgr.manager.configure import configure, rename
from jailmgr.manager.create import launch
from jailmgr.manager.delete import delete
from jailmgr.manager.host import Manager
from jailmgr.manager.stop import stop
m = Manager(find_root(sys.argv[1]))
m.open()
print("open", flush=True)
for number in itertools.count():
    name, port = f"k{number % 3}", 7000 + number % 3
    proxy = {"type": "proxy", "listen": f"tcp:0.0.0.0:{port}", "connect": "tcp:127.0.0.1:80"}
    launch(m, "default", name, "busybox", {"limits.egress": "8Mbit"}, {"web": proxy})
    configure(m, "default", name, {"limits.memory": "80MiB", "limits.egress": None}, {"web": None})
    stop(m, "default", name, force=True)
    rename(m, "default", name, f"{name}x")
    delete(m, "default", f"{name}x")
"""


@pytest.fixture
def root(netns: Netns) -> Iterator[Root]:
    with tempfile.TemporaryDirectory(prefix="jmcrash") as directory:
        yield find_root(directory)


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_moment(root: Root, seed: int) -> None:
    chance = random.Random(seed)
    m = Manager(root)
    m.open()
    delete(m, "default", create(m, "default", None, "busybox", {}, {}).name)
    m.close()
    for _ in range(ROUNDS):
        with subprocess.Popen([sys.executable, "-c", BUSY, root.at], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            # Not a wait for anything: the moment of the crash.
            time.sleep(chance.random() * 0.35)
            child.kill()
        m = Manager(root)
        m.open()
        try:
            assert {row.state for row in m.store.rows()} <= {READY}
            for view in list_jails(m):
                if view.status == "Running":
                    stop(m, "default", view.name, force=True)
                start(m, "default", view.name)
                delete(m, "default", view.name, force=True)
        finally:
            m.close()
        # A link goes with its jail's network namespace, which the kernel takes away when it comes to it.
        until(lambda: not find_leftovers(root), 10, "nothing is left")
