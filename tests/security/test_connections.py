"""Wall: the host's table of connections (conntrack), which all tenants share. What holds: `limits.connections`, by
nftables' `ct count` in an element for each jail, by its MAC and its addresses, and for each tenant, by the group of its
bridges (network/rules.py).
"""

from __future__ import annotations

import itertools
import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from jailmgr.keys import CONNECTIONS
from tests.security.guest import Guest
from tests.system.conftest import MakeJail, numbers
from tests.system.instance import Instance, until
from tests.system.netns import INSIDE, OUTSIDE, Netns, inside, run
from tests.system.traffic import bound, jail_netns, source_of

FIRST = 10_000
TABLE = Path("/proc/thread-self/net/nf_conntrack")

places = itertools.count(100)


@pytest.fixture
def limited(jm: Instance, guest: Guest, busybox_jail: MakeJail) -> Callable[..., Guest]:
    """Launches jails as `busybox_jail` does, as guests: each with an address that none had before.

    What a deleted jail opened is tracked until it times out.
    """
    (network,) = [row["ipv4"].rpartition(".")[0] for row in jm.json("list") if row["name"] == guest.jail]

    def make(*options: str) -> Guest:
        return Guest(jm, busybox_jail("--ip", f"{network}.{next(places)}", *options), guest.programs)

    return make


@pytest.fixture
def tenant(jm: Instance) -> Iterator[str]:
    """A tenant whose jails may have 60 connections together; it goes with them."""
    name = f"t{next(numbers)}"
    jm("tenant", "create", name, "-c", "limits.connections=60")
    yield name
    for row in jm.json("--tenant", name, "list"):
        jm("delete", "--force", f"{name}/{row['name']}")
    jm("tenant", "delete", name)


def opens(guest: Guest, count: int, address: str = OUTSIDE[0], first: int = FIRST) -> None:
    """Open connections from a jail: one for each of so many ports."""
    guest.run("flows", address, str(first), str(count))


def tracked(guest: Guest) -> int:
    """The host's connections that a jail's address is an end of."""
    row = next(
        row
        for row in guest.jm.json("list", "--all-tenants")
        if guest.jail in (row["name"], f"{row['tenant']}/{row['name']}")
    )
    v6 = socket.inet_pton(socket.AF_INET6, row["ipv6"]).hex()
    own = {row["ipv4"], ":".join(v6[at : at + 4] for at in range(0, 32, 4))}
    ends = (set(re.findall(r"(?:src|dst)=(\S+)", line)) for line in TABLE.read_text().splitlines())
    return sum(bool(own & each) for each in ends)


def test_a_jail_opens_so_many_connections_and_no_more(limited: Callable[..., Guest]) -> None:
    jail = limited("-c", "limits.connections=50")
    opens(jail, 40)
    assert tracked(jail) == 40
    opens(jail, 300)
    assert tracked(jail) == 50
    opens(jail, 300, OUTSIDE[1])
    assert tracked(jail) == 50, "IPv6 counts with IPv4"
    opens(jail, 300, INSIDE[0])
    jail.sh("for n in $(seq 30); do timeout 1 nslookup a$n.invalid & done; wait", status=None)
    assert tracked(jail) == 50, "what leads to the host counts as well"
    free = limited()
    opens(free, 300)
    assert tracked(free) == 300


def test_a_flood_keeps_to_the_limit(limited: Callable[..., Guest]) -> None:
    jail = limited("-c", "limits.connections=50")
    for _ in range(3):
        opens(jail, 20_000)
    assert tracked(jail) == 50


def test_a_jail_without_a_limit_has_the_default(limited: Callable[..., Guest]) -> None:
    jail = limited()
    opens(jail, CONNECTIONS + 3000)
    assert tracked(jail) == CONNECTIONS


def test_packets_of_one_connection_count_once(limited: Callable[..., Guest]) -> None:
    jail = limited("-c", "limits.connections=50")
    jail.run("flows", OUTSIDE[0], str(FIRST), "40", "100")
    opens(jail, 9, first=FIRST + 40)
    assert tracked(jail) == 49


def test_another_limit_holds_at_once(jm: Instance, limited: Callable[..., Guest]) -> None:
    jail = limited("-c", "limits.connections=1000")
    opens(jail, 20)
    jm("set", jail.jail, "limits.connections=30")
    opens(jail, 300, first=FIRST + 1000)
    assert tracked(jail) == 20 + 30, "those open before aren't counted"
    jm("stop", "--force", jail.jail)
    until(lambda: tracked(jail) == 0, 10, "its connections end with it")
    jm("start", jail.jail)
    opens(jail, 300, first=FIRST + 2000)
    assert tracked(jail) == 30, "the limit holds after a restart"
    jm("unset", jail.jail, "limits.connections")
    opens(jail, 300, first=FIRST + 3000)
    assert tracked(jail) == 330
    jm("stop", "--force", jail.jail)
    until(lambda: tracked(jail) == 0, 10, "its connections end with it")
    jm("set", jail.jail, "limits.connections=10")
    jm("start", jail.jail)
    opens(jail, 300, first=FIRST + 4000)
    assert tracked(jail) == 10


def test_a_new_engine_goes_on_counting(jm: Instance, limited: Callable[..., Guest]) -> None:
    jail, other = limited("-c", "limits.connections=50"), limited()
    opens(jail, 40)
    opens(other, CONNECTIONS)
    jm("engine", "stop")
    jm.json("list")
    opens(jail, 300, first=FIRST + 1000)
    opens(other, 300, first=FIRST + CONNECTIONS)
    assert (tracked(jail), tracked(other)) == (50, CONNECTIONS)


def test_flushed_rules_come_back_with_limits(jm: Instance, limited: Callable[..., Guest], netns: Netns) -> None:
    jail = limited("-c", "limits.connections=50")
    run("nft", "delete", "table", "inet", jm.root.table)
    jm("set", jail.jail, "limits.connections=40")
    limited()
    opens(jail, 300)
    assert tracked(jail) == 40


def test_a_neighbour_cannot_use_up_what_a_jail_may_take(jm: Instance, limited: Callable[..., Guest]) -> None:
    """Between jails only who opens a connection pays for it."""
    victim, attacker = limited("-c", "limits.connections=50", "-p", "8070:80"), limited()
    (address,) = [row["ipv4"] for row in jm.json("list") if row["name"] == victim.jail]
    opens(attacker, 300, address)
    opens(attacker, 300, INSIDE[0])
    with (
        jail_netns(jm, victim.jail) as there,
        jail_netns(jm, attacker.jail) as here,
        bound(there, socket.SOCK_STREAM, 80) as server,
    ):
        source_of(server, here, INSIDE[0], 8070)
    opens(victim, 300)
    assert tracked(victim) >= 50


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_the_world_opens_so_many_to_a_jail(
    jm: Instance, limited: Callable[..., Guest], netns: Netns, family: int
) -> None:
    jail = limited("-c", "limits.connections=50", "-p", "8070:80/udp")
    with ExitStack() as opened, inside(netns.outside):
        kind = (socket.AF_INET, socket.AF_INET6)[family]
        for _ in range(300):
            sender = opened.enter_context(socket.socket(kind, socket.SOCK_DGRAM))
            sender.sendto(b"x", (INSIDE[family], 8070))
    assert tracked(jail) == 50
    opens(jail, 40)
    assert tracked(jail) == 90, "the jail can still open its own"


def test_a_tenants_jails_share_its_limit(
    jm: Instance, limited: Callable[..., Guest], guest: Guest, tenant: str
) -> None:
    jails = []
    for name in ("one", "two"):
        jm("launch", "busybox", f"{tenant}/{name}", "-c", "limits.connections=50")
        jails.append(Guest(jm, f"{tenant}/{name}", guest.programs))
    for jail in jails:
        opens(jail, 300)
    assert [tracked(jail) for jail in jails] == [50, 10]
    jm("tenant", "set", tenant, "limits.connections=20")
    for jail in jails:
        opens(jail, 300, first=FIRST + 1000)
    assert [tracked(jail) for jail in jails] == [50, 30], "counted anew from the change on, both to their own limits"
    jm("tenant", "unset", tenant, "limits.connections")
    opens(jails[1], 300, first=FIRST + 2000)
    assert tracked(jails[1]) == 50
    free = limited()
    opens(free, 300)
    assert tracked(free) == 300


def test_the_world_opens_so_many_to_a_tenants_jails(jm: Instance, guest: Guest, netns: Netns, tenant: str) -> None:
    jails = []
    for port, name in enumerate(("one", "two"), 8070):
        jm("launch", "busybox", f"{tenant}/{name}", "-c", "limits.connections=50", "-p", f"{port}:80/udp")
        jails.append(Guest(jm, f"{tenant}/{name}", guest.programs))
    with ExitStack() as opened, inside(netns.outside):
        for port in (8070, 8071):
            for _ in range(100):
                sender = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sender.sendto(b"x", (INSIDE[0], port))
    assert [tracked(jail) for jail in jails] == [50, 10]


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "16385", "1.5"])
def test_bad_limits_are_refused(jm: Instance, guest: Guest, wrong: str) -> None:
    jm.refused("set", guest.jail, f"limits.connections={wrong}", status=2)
    jm.refused("tenant", "set", "default", f"limits.connections={wrong}", status=2)


def test_a_connection_that_was_reset_does_not_come_back_uncounted(
    jm: Instance, limited: Callable[..., Guest], netns: Netns
) -> None:
    """The kernel counts a closed connection no more, and lets a SYN and its answer open it again without a count."""
    jail = limited("-c", "limits.connections=50")
    ports = range(FIRST, FIRST + 10)

    def connected(port: int) -> socket.socket:
        with inside(there):
            made = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("", port))
        made.settimeout(0.2)
        made.connect((OUTSIDE[0], 80))
        return made

    with (
        jail_netns(jm, jail.jail) as there,
        bound(netns.outside, socket.SOCK_STREAM, 80, OUTSIDE[0]) as server,
        ExitStack() as opened,
    ):
        for port in ports:
            with connected(port) as client:
                answering, _ = server.accept()
                answering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                answering.close()
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
        # Has the kernel look for closed ones.
        for first in range(20_000, 20_010):
            opens(jail, 1, first=first)
        for port in ports:
            with suppress(TimeoutError):
                connected(port)
        opens(jail, 300, first=30_000)
        alive = [line for line in TABLE.read_text().splitlines() if "ESTABLISHED" in line or " udp " in line]
        ipv4 = next(row["ipv4"] for row in jm.json("list") if row["name"] == jail.jail)
        assert sum(f"src={ipv4} " in line for line in alive) == 50
