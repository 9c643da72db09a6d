"""SIGKILL of the process that writes, at any moment: the next one finds every jail whole, or nothing of it."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import pytest

from jailmgr import claims
from jailmgr.config import Root, find_root
from jailmgr.errors import JailmgrError
from jailmgr.manager import networks
from jailmgr.manager.create import create
from jailmgr.manager.delete import delete
from jailmgr.manager.host import Manager
from jailmgr.manager.leftovers import find_leftovers
from jailmgr.manager.opening import close_manager, open_manager
from jailmgr.manager.start import start
from jailmgr.manager.stop import stop
from jailmgr.manager.view import list_jails
from jailmgr.model import Jail, Network
from jailmgr.store import READY
from tests.system.instance import until
from tests.system.netns import Netns
from tests.unit.crash import killed_at

ROUNDS = 15
BUSY = """
import itertools, sys
from jailmgr.config import find_root
from jailmgr.manager.configure import configure, rename
from jailmgr.manager.create import launch
from jailmgr.manager.delete import delete
from jailmgr.manager.host import Manager
from jailmgr.manager.opening import close_manager, open_manager
from jailmgr.manager.stop import stop
m = Manager(find_root(sys.argv[1]))
open_manager(m)
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
    open_manager(m)
    delete(m, "default", create(m, "default", None, "busybox", {}, {}).name)
    close_manager(m)
    for _ in range(ROUNDS):
        with subprocess.Popen([sys.executable, "-c", BUSY, root.at], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            # Not a wait for anything: the moment of the crash.
            time.sleep(chance.random() * 0.35)
            child.kill()
        m = Manager(root)
        open_manager(m)
        try:
            assert {row.state for row in m.store.rows()} <= {READY}
            for view in list_jails(m):
                if view.status == "Running":
                    stop(m, "default", view.name, force=True)
                start(m, "default", view.name)
                delete(m, "default", view.name, force=True)
        finally:
            close_manager(m)
        # A link goes with its jail's network namespace, which the kernel takes away when it comes to it.
        until(lambda: not find_leftovers(root), 10, "nothing is left")


@pytest.mark.parametrize("failing", ["the row", "its name"])
def test_a_creation_that_is_undone_is_killed_at_any_line(root: Root, failing: str) -> None:
    """The store can't take the last change, so the row stays in state `creating`, with its config.json.

    Or what follows that change fails: the row is ready then, and is none of a whole jail.
    """

    def no_names(m: Manager, network: Network) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(jail: Jail, state: str, next_name: str | None = None) -> None:
        raise JailmgrError("store", "no space left", "", "full")

    def undone() -> None:
        m = Manager(root)
        open_manager(m)
        if failing == "the row":
            m.store.set_state = refuse  # type: ignore[method-assign]
        else:
            networks.refresh_names = no_names  # in the process that is killed
        with pytest.raises(JailmgrError):
            create(m, "default", "web", "busybox", {}, {})
        close_manager(m)

    m = Manager(root)
    open_manager(m)
    delete(m, "default", create(m, "default", None, "busybox", {}, {}).name)
    close_manager(m)
    line, killed, seen = 0, True, set()
    while killed:
        line += 1
        killed = killed_at(line, ("manager/delete.py",), undone)
        m = Manager(root)
        open_manager(m)
        try:
            views = list_jails(m)
            seen.add(len(views))
            for view in views:
                start(m, "default", view.name)
                delete(m, "default", view.name, force=True)
        finally:
            close_manager(m)
    assert seen == ({0, 1} if failing == "the row" else {0})


def test_what_fails_for_a_running_jail_leaves_its_ports(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that starts sets the network of each running jail up again; one that can't takes nothing away."""

    def fail(*_: object) -> None:
        raise JailmgrError("network default", "no DNS server")

    proxy = {"type": "proxy", "listen": "tcp:0.0.0.0:7000", "connect": "tcp:127.0.0.1:80"}
    m = Manager(root)
    open_manager(m)
    try:
        jail = create(m, "default", "web", "busybox", {}, {"web": proxy})
        start(m, "default", "web")
        monkeypatch.setattr("jailmgr.network.dns.ensure_dns", fail)
        m.networks_up.clear()
        with pytest.raises(JailmgrError):
            networks.up(m, jail)
        assert _published(root, 7000)
        with pytest.raises(JailmgrError):
            claims.claim_port(root, "another", "", 7000, "tcp")
        stop(m, "default", "web", force=True)
        m.networks_up.clear()
        with pytest.raises(JailmgrError):
            start(m, "default", "web")
        assert not _published(root, 7000)
        claims.claim_port(root, "another", "", 7000, "tcp")
        claims.release(root, "port", "another")
        delete(m, "default", "web")
    finally:
        close_manager(m)


def _published(root: Root, port: int) -> bool:
    listed = subprocess.run(
        ["nft", "list", "table", "inet", root.table], check=True, capture_output=True, text=True
    ).stdout
    return f"tcp . {port} : " in listed
