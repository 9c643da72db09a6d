"""Rates of jails and tenants, measured: what comes through, from where, and what a guest can't do about it."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import pytest

from jailmgr.config import Root, find_root
from jailmgr.manager.configure import configure
from jailmgr.manager.create import launch
from jailmgr.manager.delete import delete
from jailmgr.manager.host import Manager
from jailmgr.manager.leftovers import find_leftovers
from jailmgr.manager.opening import close_manager, open_manager
from jailmgr.manager.tenants import create_tenant, delete_tenant, set_tenant
from jailmgr.network import bridge, shaping
from jailmgr.runtime.state import read_state
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, until
from tests.system.netns import OUTSIDE, Netns, inside, run
from tests.system.traffic import MEASURED, bound, jail_netns, megabits

RATE = "8Mbit"
HELD = 10.0
"""Megabits of payload a second under RATE, with what a queue lets through at once."""
SLOW = 2.0
"""Far less than RATE, for a machine with other things to do."""
FREE = 60.0
"""Far more than RATE, and far less than a veth pair can."""


@pytest.mark.parametrize("receives", [False, True], ids=["egress", "ingress"])
@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_a_jail_is_held_to_its_rate(
    jm: Instance, netns: Netns, busybox_jail: MakeJail, receives: bool, family: int
) -> None:
    limited, other = ("ingress", "egress") if receives else ("egress", "ingress")
    name = busybox_jail("-c", f"limits.{limited}={RATE}")
    assert jm.json("show", name)["devices"]["eth0"][f"limits.{limited}"] == RATE
    with jail_netns(jm, name) as jail:
        assert SLOW < megabits(jail, netns.outside, OUTSIDE[family], receives=receives) < HELD
        assert megabits(jail, netns.outside, OUTSIDE[family], receives=not receives) > FREE, other


def test_the_way_to_a_neighbour_counts(jm: Instance, busybox_jail: MakeJail) -> None:
    one, two = busybox_jail("-c", f"eth0.limits.max={RATE}"), busybox_jail()
    with jail_netns(jm, one) as limited, jail_netns(jm, two) as free:
        assert SLOW < megabits(limited, free, jm.info(two)["ipv4"]) < HELD
        assert SLOW < megabits(free, limited, jm.info(one)["ipv6"]) < HELD


def test_rates_change_while_it_runs(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    with jail_netns(jm, name) as jail:
        assert megabits(jail, netns.outside, OUTSIDE[0]) > FREE
        assert _ifbs(jm.root) == []
        assert jm("set", name, f"limits.egress={RATE}").err == ""
        assert jm("get", name, "limits.egress").out == f"{RATE}\n"
        assert SLOW < megabits(jail, netns.outside, OUTSIDE[0]) < HELD
        jm("set", name, "eth0.limits.egress=1Gbit", "limits.ingress=8Mbit")
        assert megabits(jail, netns.outside, OUTSIDE[0]) > FREE
        assert SLOW < megabits(jail, netns.outside, OUTSIDE[0], receives=True) < HELD
        jm("unset", name, "limits.egress", "limits.ingress")
        assert megabits(jail, netns.outside, OUTSIDE[0], receives=True) > FREE
    (veth,) = _links(jm.root, "v")
    assert "mirred" not in run("tc", "filter", "show", "dev", veth, "ingress")
    assert "mirred" not in run("tc", "filter", "show", "dev", veth, "egress")
    jm("restart", "--force", name)
    with jail_netns(jm, name) as jail:
        assert megabits(jail, netns.outside, OUTSIDE[0]) > FREE


def test_bad_rates_are_refused(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", f"limits.egress={RATE}", start=False)
    for wrong in ("limits.egress=fast", "eth0.limits.max=10MB", "limits.ingress=1bit", "eth0.limits.ingress=-1"):
        jm.refused("set", name, wrong, status=2)
    jm.refused("launch", "busybox", "both", "-c", "limits.egress=1Mbit", "-c", "eth0.limits.egress=2Mbit", status=2)
    assert jm("get", name, "eth0.limits.egress").out == f"{RATE}\n"


def test_a_reboot_inside_keeps_the_rate(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", f"limits.egress={RATE}")
    before = jm.info(name)["init_pid"]
    jm("engine", "stop")
    jm.sh(name, "reboot -f", status=None)
    until(lambda: _init(jm.root, "default", name) not in (0, before), 10, "it is back, with no engine")
    with _netns(jm.root, "default", name) as jail:
        assert SLOW < megabits(jail, netns.outside, OUTSIDE[0]) < HELD


def test_queues_that_are_gone_come_back(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-c", f"limits.egress={RATE}")
    (ifb,) = _ifbs(jm.root)
    jm("engine", "stop")
    run("ip", "link", "delete", ifb)
    jm.json("list")
    with jail_netns(jm, name) as jail:
        assert SLOW < megabits(jail, netns.outside, OUTSIDE[0]) < HELD


def test_a_priority_set_inside_chooses_no_class(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    slow, fast = busybox_jail("-c", f"limits.egress={RATE}"), busybox_jail("-c", "limits.egress=1Gbit")
    (ifb,) = _ifbs(jm.root)
    # Linux 6.1 lists the flows of a leaf queue as well.
    listed = [line.split()[2] for line in run("tc", "class", "show", "dev", ifb).splitlines()]
    classes = [handle for handle in listed if handle.startswith("1:")]
    assert len(classes) == 4
    with jail_netns(jm, slow) as jail, jail_netns(jm, fast) as other:
        assert megabits(other, netns.outside, OUTSIDE[0]) > FREE
        for handle in classes:
            major, _, minor = handle.partition(":")
            priority = int(major, 16) << 16 | int(minor, 16)
            assert megabits(jail, netns.outside, OUTSIDE[0], priority=priority) < HELD, handle


def test_an_ifb_of_the_guests_own_leads_past_no_queue(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    """What an ifb sends on skips the next filters (`tc_skip_classify`): those at the host's end of the veth too."""
    name = busybox_jail("-c", f"limits.egress={RATE}")
    sometimes = "4,32 0 0 4294963256,53 0 1 2147483648,6 0 0 4294967295,6 0 0 0"
    """Classic BPF: for one packet in two, by a random number (SKF_AD_RANDOM), so that it meets no filter again."""
    with jail_netns(jm, name) as jail, inside(jail):
        run("ip", "link", "add", "mine", "type", "ifb")
        run("ip", "link", "set", "mine", "up")
        run("tc", "qdisc", "add", "dev", "eth0", "clsact")
        redirect = ["action", "mirred", "egress", "redirect", "dev", "mine"]
        run("tc", "filter", "add", "dev", "eth0", "egress", "bpf", "bytecode", sometimes, *redirect)
    with jail_netns(jm, name) as jail:
        assert _flood(jail, netns.outside) < HELD


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_nothing_of_it_is_seen_behind_the_bridge(
    jm: Instance, netns: Netns, busybox_jail: MakeJail, family: int
) -> None:
    """Marks and priorities mean something to the host's own rules and queues."""
    name = busybox_jail("-c", "limits.egress=100Mbit")
    chain = "type filter hook forward priority -200; policy accept"
    rules = "meta mark != 0 counter\nmeta priority != 0 counter\ncounter"
    run("nft", "-f", "-", stdin=f"table inet probe {{\nchain seen {{\n{chain};\n{rules}\n}}\n}}\n")
    try:
        with jail_netns(jm, name) as jail:
            megabits(jail, netns.outside, OUTSIDE[family])
        marked, prior, every = _packets("probe")
    finally:
        run("nft", "delete", "table", "inet", "probe")
    assert every > 100
    assert (marked, prior) == (0, 0)


@pytest.fixture
def m(netns: Netns) -> Iterator[Manager]:
    """An instance without an engine; nothing is left of it."""
    with tempfile.TemporaryDirectory(prefix="jmrates") as directory:
        made = Manager(find_root(directory))
        open_manager(made)
        try:
            yield made
        finally:
            for jail in made.store.jails():
                delete(made, jail.tenant, jail.name, force=True)
            close_manager(made)
        assert _ifbs(made.root) == []
        # Held-back connections keep a jail's network namespace: its link is removed as its supervisor ends.
        until(lambda: not find_leftovers(made.root), 10, "nothing is left")


def test_a_tenant_is_held_to_its_total(m: Manager, netns: Netns) -> None:
    create_tenant(m, "acme", {"limits.egress": RATE, "limits.ingress": RATE})
    for name in ("one", "two"):
        launch(m, "acme", name, "busybox", {}, {})
    for receives in (False, True):
        rates = _at_once(m, netns, receives)
        assert SLOW < sum(rates) < HELD
        assert min(rates) > 1, "they share"
    configure(m, "acme", "one", {"limits.egress": "2Mbit"}, {})
    rates = _at_once(m, netns, False)
    assert rates[0] < 3
    assert sum(rates) < HELD
    delete(m, "acme", "one", force=True)
    delete(m, "acme", "two", force=True)
    assert _ifbs(m.root) == []
    delete_tenant(m, "acme")


def test_a_total_changes_while_jails_run(m: Manager, netns: Netns) -> None:
    create_tenant(m, "acme", {})
    for name in ("one", "two"):
        launch(m, "acme", name, "busybox", {}, {})
    assert sum(_at_once(m, netns, False)) > FREE
    set_tenant(m, "acme", {"limits.egress": RATE})
    assert SLOW < sum(_at_once(m, netns, False)) < HELD
    assert sum(_at_once(m, netns, True)) > FREE
    set_tenant(m, "acme", {"limits.egress": "1Gbit"})
    assert sum(_at_once(m, netns, False)) > FREE
    set_tenant(m, "acme", {"limits.egress": None})
    assert sum(_at_once(m, netns, False)) > FREE
    veth = bridge.veth_name(m.root, m.store.jail("acme", "one").id)
    assert "mirred" not in run("tc", "filter", "show", "dev", veth, "ingress")


def test_tenants_have_queues_of_their_own(m: Manager, netns: Netns) -> None:
    for tenant in ("acme", "other"):
        create_tenant(m, tenant, {})
        launch(m, tenant, "one", "busybox", {}, {})
    set_tenant(m, "acme", {"limits.egress": RATE})
    with _netns(m.root, "acme", "one") as limited, _netns(m.root, "other", "one") as free:
        assert SLOW < megabits(limited, netns.outside, OUTSIDE[0]) < HELD
        assert megabits(free, netns.outside, OUTSIDE[0]) > FREE


def test_doctor_finds_queues_of_nobody(m: Manager) -> None:
    create_tenant(m, "acme", {})
    tenant = m.store.tenant("acme")
    for direction in ("ingress", "egress"):
        shaping.set_tenant(m.root, tenant, direction)
    found = {leftover.what: leftover.remove for leftover in find_leftovers(m.root)}
    assert set(found) == {f"queues on {name}" for name in _ifbs(m.root)}
    assert len(found) == 2
    for remove in found.values():
        assert remove is not None
        remove()
    assert _ifbs(m.root) == []


def _at_once(m: Manager, netns: Netns, receives: bool) -> list[float]:
    """Megabits a second of both jails, that send (or receive) at the same time."""
    with ExitStack() as opened, ThreadPoolExecutor(2) as pool:
        jails = [opened.enter_context(_netns(m.root, "acme", name)) for name in ("one", "two")]
        started = [
            pool.submit(megabits, jail, netns.outside, OUTSIDE[0], port, receives=receives)
            for port, jail in enumerate(jails, 5001)
        ]
        return [ended.result(30) for ended in started]


def _flood(jail: int, outside: int) -> float:
    """Megabits a second of UDP's payload that come outside from a jail that sends all it can."""
    over = threading.Event()
    with bound(outside, socket.SOCK_DGRAM, 5001) as receiver, ExitStack() as sockets:
        with inside(jail):
            senders = [sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(8)]
        threads = [threading.Thread(target=_send_until, args=(sender, over)) for sender in senders]
        for thread in threads:
            thread.start()
        try:
            receiver.recv(2000)
            began, count = time.monotonic(), 0
            while (taken := time.monotonic() - began) < MEASURED:
                count += len(receiver.recv(2000))
            return count * 8 / taken / 1e6
        finally:
            over.set()
            for thread in threads:
                thread.join()


def _send_until(sender: socket.socket, over: threading.Event) -> None:
    """A send waits for room in the socket's buffer: what is in a queue still takes some of it."""
    sender.settimeout(1)
    while not over.is_set():
        with suppress(TimeoutError):
            sender.sendto(bytes(1400), (OUTSIDE[0], 5001))


def _packets(table: str) -> list[int]:
    """What the counters of a table have counted."""
    listed = json.loads(run("nft", "--json", "list", "table", "inet", table))["nftables"]
    expressions = [expression for entry in listed for expression in entry.get("rule", {}).get("expr", [])]
    return [expression["counter"]["packets"] for expression in expressions if "counter" in expression]


def _links(root: Root, letter: str) -> list[str]:
    return [name for _, name in socket.if_nameindex() if name.startswith(f"{root.link_prefix}{letter}")]


def _ifbs(root: Root) -> list[str]:
    return [*_links(root, "i"), *_links(root, "e")]


def _init(root: Root, tenant: str, name: str) -> int:
    """Pid of a running jail's init, with no engine asked; 0 where it isn't running."""
    state = read_state(root, tenant, name)
    return state.pid if state is not None else 0


@contextmanager
def _netns(root: Root, tenant: str, name: str) -> Iterator[int]:
    fd = os.open(f"/proc/{_init(root, tenant, name)}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
