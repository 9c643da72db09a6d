"""Wall: a published port, and an address, after they are another jail's. What holds: flows of the connection table end
with the rule or the jail that they belong to (network/flows.py), and an address leaves the anti-spoofing sets with its
jail. A stranger outside, or the former owner's root, keeps using what it had.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import NamedTuple

import pytest

from jailmgr import claims
from jailmgr.config import find_root
from jailmgr.errors import JailmgrError
from jailmgr.runtime.state import load_wait, read_state
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, kill, until
from tests.system.lan import ETH_P_ALL, ETH_P_IP, ethernet, udp4
from tests.system.netns import INSIDE, OUTSIDE, Netns, inside, run
from tests.system.traffic import WITHIN, bound, jail_netns

UDP = socket.SOCK_DGRAM
NOTHING_S = 0.2
"""How long a datagram is waited for that must not come; those that come take a millisecond."""


@contextmanager
def outsiders(netns: Netns, port: int) -> Iterator[list[socket.socket]]:
    """A client of each family, which send by one socket all the time."""
    with bound(netns.outside, UDP, port, OUTSIDE[0]) as ipv4, bound(netns.outside, UDP, port, OUTSIDE[1]) as ipv6:
        yield [ipv4, ipv6]


def all_come(receiver: socket.socket, clients: list[socket.socket], port: int = 8080) -> bool:
    """Whether the host's port leads the datagrams of all clients there, or of none."""
    found = {comes(receiver, client, (INSIDE[client.family == socket.AF_INET6], port)) for client in clients}
    assert len(found) == 1, "IPv4 and IPv6 differ"
    return found.pop()


def comes(receiver: socket.socket, sender: socket.socket, to: tuple[str, int]) -> bool:
    """Whether a datagram arrives."""
    receiver.settimeout(NOTHING_S)
    sender.sendto(b"a secret", to)
    try:
        return receiver.recv(100) == b"a secret"
    except TimeoutError:
        return False


@contextmanager
def listening(jm: Instance, jail: str) -> Iterator[socket.socket]:
    """A server in the jail. Its namespace, and with it the jail's address, lives on when the jail has ended."""
    with jail_netns(jm, jail) as there, bound(there, UDP, 80) as server:
        yield server


def unpublish(jm: Instance, jail: str) -> None:
    jm("port", "unpublish", jail, "8080")


def stop_first(jm: Instance, jail: str) -> None:
    jm("stop", "--force", jail)
    unpublish(jm, jail)
    jm("start", jail)


def stop_among_others(jm: Instance, jail: str) -> None:
    """Another jail ends again and again, so that flows of ended jails are not ended yet (manager/batches.py)."""
    done = Event()

    def end_again_and_again() -> None:
        while not done.is_set():
            jm("stop", "--force", "spare")
            jm("start", "spare")

    jm("launch", "busybox", "spare")
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(end_again_and_again)
        try:
            stop_first(jm, jail)
        finally:
            done.set()
        other.result()
    jm("delete", "--force", "spare")


def poweroff(jm: Instance, jail: str) -> None:
    """From inside, and at once unpublish what nobody has taken back yet."""
    jm.sh(jail, "poweroff -f", status=None)
    until(lambda: jm.info(jail)["init_pid"] is None)
    unpublish(jm, jail)
    jm("start", jail)


def end_without_engine(jm: Instance, jail: str) -> None:
    """Power the jail off from inside, by its supervisor, while no engine runs."""
    kill(jm.engine_pid())
    jm.sh(jail, "poweroff -f", status=None)
    until(lambda: read_state(jm.root, "default", jail) is None)


def without_engine(jm: Instance, jail: str) -> None:
    """The jail ends while no engine runs, and what was its is unpublished by the next one."""
    end_without_engine(jm, jail)
    unpublish(jm, jail)
    jm("start", jail)


def test_a_port_unpublished_in_a_back_off(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    """A jail that waits for its next start is up, but its flows to that port end all the same."""
    jail = busybox_jail("-c", "restart=always")
    jm("port", "publish", jail, "8080:80/udp")
    with outsiders(netns, 5000) as clients:
        with listening(jm, jail) as server:
            assert all_come(server, clients)
            while (wait := load_wait(jm.root.tenant_run("default"), jail)) is None or wait.tries < 4:
                if (init := jm.info(jail)["init_pid"]) is not None:
                    kill(init)
            unpublish(jm, jail)
        until(lambda: jm.info(jail)["init_pid"] is not None, 20, "it is started again")
        with listening(jm, jail) as again:
            assert not all_come(again, clients)


@pytest.mark.parametrize("take_back", [unpublish, stop_first, stop_among_others, poweroff, without_engine])
def test_a_port_of_another_tenant_by_now(
    jm: Instance,
    netns: Netns,
    busybox_jail: MakeJail,
    other_tenant: str,
    take_back: Callable[[Instance, str], None],
) -> None:
    """Clients send to nobody, to the first jail, to nobody, and to the other tenant's."""
    first, second = busybox_jail(), f"{other_tenant}/second"
    jm("launch", "busybox", second)
    with outsiders(netns, 5000) as clients:
        with listening(jm, first) as server:
            assert not all_come(server, clients)
            jm("port", "publish", first, "8080:80/udp")
            assert all_come(server, clients)
            take_back(jm, first)
            assert not all_come(server, clients)
        with listening(jm, first) as again, listening(jm, second) as other:
            assert not all_come(again, clients)
            jm("port", "publish", second, "8080:80/udp")
            assert all_come(other, clients)
            assert not all_come(again, clients)


@pytest.mark.parametrize("engine", [True, False], ids=["running", "ended without engine"])
def test_a_deleted_jails_port(
    jm: Instance, netns: Netns, busybox_jail: MakeJail, other_tenant: str, engine: bool
) -> None:
    """Launched with the port, which is another's as soon as the jail has been deleted."""
    first = busybox_jail("-p", "8080:80/udp")
    with outsiders(netns, 5001) as clients:
        with listening(jm, first) as server:
            assert all_come(server, clients)
            if not engine:
                end_without_engine(jm, first)
            jm("delete", "--force", first)
        jm("launch", "busybox", f"{other_tenant}/second", "-p", "8080:80/udp")
        with listening(jm, f"{other_tenant}/second") as other:
            until(lambda: all_come(other, clients), 5)


def test_the_next_engine_takes_back_the_port_of_a_jail_that_ended(
    jm: Instance, busybox_jail: MakeJail, tmp_path: Path
) -> None:
    """With it, another instance of jailmgr on the host may publish the port."""
    first = busybox_jail("-p", "8080:80/udp")
    other = find_root(str(tmp_path))
    try:
        with pytest.raises(JailmgrError, match="8080"):
            claims.claim_port(other, "another jail", "", 8080, "udp")
        end_without_engine(jm, first)
        jm("list")
        claims.claim_port(other, "another jail", "", 8080, "udp")
        for name in ("any_ipv4", "any_ipv6"):
            assert "8080" not in run("nft", "list", "map", "inet", jm.root.table, name)
    finally:
        claims.release_all(other)


def test_a_client_that_was_there_before_the_jail(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    """It reaches a port that is published as the jail starts, and after the jail has started again by itself."""
    with outsiders(netns, 5002) as clients:
        for client, host in zip(clients, INSIDE, strict=True):
            client.sendto(b"is anybody there?", (host, 8080))
        first = busybox_jail("-p", "8080:80/udp")
        with listening(jm, first) as server:
            until(lambda: all_come(server, clients), 5)
        before = jm.info(first)["init_pid"]
        jm.sh(first, "reboot -f", status=None)
        until(lambda: jm.info(first)["init_pid"] not in (None, before))
        with listening(jm, first) as server:
            until(lambda: all_come(server, clients), 5)


class Address(NamedTuple):
    ipv4: str
    ipv6: str
    mac: str


def address_of(jm: Instance, jail: str) -> Address:
    (row,) = [row for row in jm.json("list") if row["name"] == jail]
    return Address(row["ipv4"], row["ipv6"], jm.sh(jail, "cat /sys/class/net/eth0/address").out.strip())


def delete(jm: Instance, jail: str) -> None:
    jm("delete", "--force", jail)


def move(jm: Instance, jail: str) -> None:
    jm("stop", "--force", jail)
    address = address_list(jm)[jail].rpartition(".")[0] + ".200"
    jm("set", jail, f"eth0.ipv4.address={address}")
    jm("start", jail)


def address_list(jm: Instance) -> dict[str, str]:
    return {row["name"]: row["ipv4"] for row in jm.json("list")}


def delete_without_engine(jm: Instance, jail: str) -> None:
    end_without_engine(jm, jail)
    jm("delete", jail)


@pytest.mark.parametrize("leave", [delete, move, delete_without_engine])
def test_a_strangers_answers_to_the_former_owner_of_an_address(
    jm: Instance, netns: Netns, busybox_jail: MakeJail, leave: Callable[[Instance, str], None]
) -> None:
    first = busybox_jail()
    own = address_of(jm, first)
    with outsiders(netns, 6000) as strangers:
        masqueraded = []
        with jail_netns(jm, first) as there, bound(there, UDP, 7000) as asking:
            for stranger, address in zip(strangers, (f"::ffff:{OUTSIDE[0]}", OUTSIDE[1]), strict=True):
                asking.sendto(b"hello", (address, 6000))
                masqueraded.append(stranger.recvfrom(100)[1])
                assert comes(asking, stranger, masqueraded[-1])
        leave(jm, first)
        second = busybox_jail("--ip", own.ipv4)
        with jail_netns(jm, second) as there, bound(there, UDP, 7000) as later:
            for stranger, to in zip(strangers, masqueraded, strict=True):
                assert not comes(later, stranger, to)


def test_a_former_owner_of_an_address_cannot_use_it(jm: Instance, busybox_jail: MakeJail) -> None:
    """Its root knows the address and its MAC, which both are a neighbour's by now."""
    first, victim = busybox_jail(), busybox_jail()
    own, to = address_of(jm, first), address_of(jm, victim)
    move(jm, first)
    second = busybox_jail("--ip", own.ipv4)
    assert address_of(jm, second) == own
    frame = ethernet(to.mac, own.mac, ETH_P_IP, udp4(own.ipv4, to.ipv4, b"in its name", (7, 7)))
    with jail_netns(jm, victim) as there, bound(there, UDP, 7) as receiving:
        for sender, arrives in ((second, True), (first, False)):
            with jail_netns(jm, sender) as netns:
                with inside(netns):
                    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
                with raw:
                    raw.bind(("eth0", 0))
                    raw.send(frame)
            receiving.settimeout(WITHIN if arrives else NOTHING_S)
            if arrives:
                assert receiving.recv(100) == b"in its name"
            else:
                with pytest.raises(TimeoutError):
                    receiving.recv(100)


def test_names_follow_an_address(jm: Instance, busybox_jail: MakeJail) -> None:
    """Neighbours that ask for the jail by its name don't reach the next owner of its address."""
    first, asker = busybox_jail(), busybox_jail()
    before = address_list(jm)[first]
    move(jm, first)
    said = jm.sh(asker, f"nslookup {first}.jailmgr || true").out
    assert address_list(jm)[first] in said
    assert before not in said.split()
