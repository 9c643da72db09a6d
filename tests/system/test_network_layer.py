"""Networks without jails around them: what gets through, and what does not."""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.model import Network, Nic, Port, Tenant
from jailmgr.network import bridge, firewall, nft, shaping
from jailmgr.runtime import netlink
from jailmgr.runtime.shaping import attach, detach
from tests.system import lan as world
from tests.system.lan import HOST4, HOST6, OUTSIDE4, OUTSIDE6, Lan, Netns, ask, ethernet, refused, server
from tests.system.netns import inside


@pytest.fixture(scope="module")
def lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    with world.lan(tmp_path_factory.mktemp("lan")) as made:
        yield made


@pytest.fixture(params=["ipv4", "ipv6"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def address(jail: world.Jail, version: str) -> str:
    return str(getattr(jail.nic, version))


def gateway(network: Network, version: str) -> str:
    return str(getattr(network, version)).partition("/")[0]


def port_of(jail: world.Jail, protocol: str, host_address: str = "") -> Port:
    return Port(jail.network.tenant, "web", host_address, 8080, 80, protocol)


def test_a_jail_reaches_its_neighbour(lan: Lan, version: str) -> None:
    with server(lan.b.netns, address(lan.b, version), 80):
        assert ask(lan.a.netns, address(lan.b, version), 80) == address(lan.a, version)


def test_neighbours_reach_each_other_by_link_local_addresses(lan: Lan) -> None:
    own, other = (f"{netlink.link_local(jail.nic.mac)}%eth0" for jail in (lan.a, lan.b))
    with lan.b.netns.socket(socket.AF_INET6, socket.SOCK_DGRAM) as receiving:
        receiving.bind(lan.b.netns.run(socket.getaddrinfo, other, 9)[0][4])
        with lan.a.netns.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sending:
            sending.sendto(b"hello", lan.a.netns.run(socket.getaddrinfo, other, 9)[0][4])
            assert receiving.recvfrom(100)[1][0].partition("%")[0] == own.partition("%")[0]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_jail_reaches_the_outside_with_the_hosts_address(lan: Lan, version: str, protocol: str) -> None:
    outside, host = (OUTSIDE4, HOST4) if version == "ipv4" else (OUTSIDE6, HOST6)
    with server(lan.outside, outside, 80, protocol):
        assert ask(lan.a.netns, outside, 80, protocol) == host


def test_the_host_reaches_a_jail(lan: Lan, version: str) -> None:
    with server(lan.a.netns, address(lan.a, version), 80):
        assert ask(lan.host, address(lan.a, version), 80) == gateway(lan.first, version)


def test_a_jail_cannot_reach_another_network(lan: Lan, version: str) -> None:
    with server(lan.c.netns, address(lan.c, version), 80):
        assert refused(lan.a.netns, address(lan.c, version), 80)
        assert ask(lan.host, address(lan.c, version), 80), "the server was there"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_jail_cannot_reach_services_of_the_host(lan: Lan, version: str, protocol: str) -> None:
    everywhere, host = ("0.0.0.0", HOST4) if version == "ipv4" else ("::", HOST6)
    with server(lan.host, everywhere, 2222, protocol):
        assert ask(lan.outside, host, 2222, protocol), "the server was there"
        for asked in (host, gateway(lan.first, version), gateway(lan.second, version)):
            assert refused(lan.a.netns, asked, 2222, protocol)


def test_the_outside_cannot_reach_a_jail_by_its_own_address(lan: Lan, version: str) -> None:
    way = f"{address(lan.a, version)} via {HOST4 if version == 'ipv4' else HOST6}"
    lan.outside.ip(f"-{version[-1]} route add {way}")
    try:
        with server(lan.a.netns, address(lan.a, version), 80):
            assert refused(lan.outside, address(lan.a, version), 80)
            assert ask(lan.host, address(lan.a, version), 80), "the server was there"
    finally:
        lan.outside.ip(f"-{version[-1]} route del {way}")


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_published_port(lan: Lan, version: str, protocol: str) -> None:
    host = HOST4 if version == "ipv4" else HOST6
    with server(lan.a.netns, address(lan.a, version), 80, protocol):
        assert refused(lan.outside, host, 8080, protocol)
        with lan.published(lan.a, port_of(lan.a, protocol)):
            outside = OUTSIDE4 if version == "ipv4" else OUTSIDE6
            assert ask(lan.outside, host, 8080, protocol) == outside, "the jail sees who asks"
            assert ask(lan.host, host, 8080, protocol) == host
            assert ask(lan.host, gateway(lan.first, version), 8080, protocol)
            if version == "ipv4":
                assert ask(lan.host, "127.0.0.1", 8080, protocol) == gateway(lan.first, version)
            else:
                assert refused(lan.host, "::1", 8080, protocol)
            # Where br_netfilter is on, the packet is turned back within the bridge, and keeps its source.
            seen = {gateway(lan.first, version), address(lan.b, version)}
            assert ask(lan.b.netns, host, 8080, protocol) in seen
            assert ask(lan.b.netns, gateway(lan.first, version), 8080, protocol) in seen
            assert refused(lan.c.netns, host, 8080, protocol), "another network's jail stays out"
        assert refused(lan.outside, host, 8080, protocol)


def test_a_port_published_at_one_address(lan: Lan, version: str) -> None:
    host = HOST4 if version == "ipv4" else HOST6
    with (
        server(lan.a.netns, address(lan.a, version), 80),
        lan.published(lan.a, port_of(lan.a, "tcp", host)),
    ):
        assert ask(lan.outside, host, 8080)
        assert refused(lan.host, "127.0.0.1", 8080)
        assert refused(lan.host, gateway(lan.first, version), 8080)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_published_at_the_hosts_loopback(lan: Lan, protocol: str) -> None:
    with (
        server(lan.a.netns, lan.a.nic.ipv4, 80, protocol),
        lan.published(lan.a, port_of(lan.a, protocol, "127.0.0.1")),
    ):
        assert ask(lan.host, "127.0.0.1", 8080, protocol) == gateway(lan.first, "ipv4")
        assert refused(lan.outside, HOST4, 8080, protocol)
        assert refused(lan.b.netns, HOST4, 8080, protocol)


def test_a_port_at_ipv6s_loopback_is_refused_in_words(lan: Lan) -> None:
    with pytest.raises(JailmgrError, match="::1"):
        lan.host.run(firewall.port_is_free, "::1", 8080, "tcp")


@pytest.fixture(params=["0", "1"], ids=["routed", "bridged"])
def bridged(lan: Lan, version: str, request: pytest.FixtureRequest) -> Iterator[bool]:
    """br_netfilter is off, or on: packets between jails then pass the rules within the bridge."""
    switch = Path(f"/proc/sys/net/bridge/bridge-nf-call-{'iptables' if version == 'ipv4' else 'ip6tables'}")
    before = lan.host.run(switch.read_text)
    lan.host.run(switch.write_text, request.param)
    yield request.param == "1"
    lan.host.run(switch.write_text, before)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_jail_reaches_its_own_published_port(lan: Lan, version: str, protocol: str, bridged: bool) -> None:
    host = HOST4 if version == "ipv4" else HOST6
    with (
        server(lan.a.netns, address(lan.a, version), 80, protocol),
        lan.published(lan.a, port_of(lan.a, protocol)),
    ):
        for asked in (host, gateway(lan.first, version)):
            assert ask(lan.a.netns, asked, 8080, protocol) == gateway(lan.first, version)
        seen = address(lan.b, version) if bridged else gateway(lan.first, version)
        assert ask(lan.b.netns, host, 8080, protocol) == seen


def test_a_jail_does_not_hear_itself(lan: Lan) -> None:
    """Its port hands frames back, but no broadcast or multicast: duplicate address detection would find itself."""
    marker = ethernet(lan.a.nic.mac, lan.a.nic.mac, world.ETH_P_IP, world.udp4(lan.a.nic.ipv4, lan.a.nic.ipv4, b"last"))
    with world.frames(lan.a.netns) as jail, world.frames(lan.b.netns) as neighbour:
        for group in ("ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01", "01:00:5e:00:00:fb"):
            frame = ethernet(group, lan.a.nic.mac, world.ETH_P_IP, world.udp4(lan.a.nic.ipv4, "224.0.0.251", b"to all"))
            jail.send(frame)
            while neighbour.recv(2000) != frame:
                pass
        jail.send(marker)
        back: list[bytes] = []
        while marker not in back:
            got, where = jail.recvfrom(2000)
            if where[2] != socket.PACKET_OUTGOING:
                back.append(got)
        assert not [got for got in back if b"to all" in got]


def test_a_published_port_is_the_hosts_and_nobody_elses(lan: Lan, version: str) -> None:
    """A jail that asks the outside for the same port gets the outside."""
    outside = OUTSIDE4 if version == "ipv4" else OUTSIDE6
    with server(lan.outside, outside, 8080), lan.published(lan.a, port_of(lan.a, "tcp")):
        assert ask(lan.b.netns, outside, 8080) == (HOST4 if version == "ipv4" else HOST6)


@pytest.fixture(params=[False, True], ids=["", "shaped"])
def perhaps_shaped(lan: Lan, request: pytest.FixtureRequest) -> Iterator[None]:
    """What jail a sends comes by way of a queue, or not."""
    tenant = Tenant(1, "default", 0.0, 1)
    ifb = shaping.ifb_name(lan.root, tenant.id, "egress")
    if request.param:
        lan.host.run(shaping.set_tenant, lan.root, tenant, "egress")
        lan.host.run(attach, lan.a.nic.veth, {"egress": (ifb, 0x10002)})
        with server(lan.outside, OUTSIDE4, 8085):
            assert ask(lan.a.netns, OUTSIDE4, 8085) == HOST4
        assert " 0 pkt" not in lan.host.run(world.checked, ["tc", "-s", "qdisc", "show", "dev", ifb]).splitlines()[1]
    yield
    lan.host.run(detach, lan.a.nic.veth, ["egress"])
    lan.host.run(shaping.remove, lan.root, ifb)


def test_jails_cannot_reach_the_hosts_loopback(lan: Lan, perhaps_shaped: None) -> None:
    """Neither with our tables nor when somebody has flushed them: `route_localnet` is behind a filter of its own."""
    name = bridge.bridge_name(lan.root, lan.first.id)
    packet = world.udp4(lan.a.nic.ipv4, "127.0.0.1", b"in", (7, 2222))
    frame = ethernet(_mac_of(lan.host, name), lan.a.nic.mac, world.ETH_P_IP, packet)
    assert lan.host.run(Path(f"/proc/sys/net/ipv4/conf/{name}/route_localnet").read_text) == "1\n"
    with lan.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening, world.frames(lan.a.netns) as jail:
        listening.bind(("127.0.0.1", 2222))
        listening.settimeout(0.3)
        for flushed in (False, True):
            try:
                if flushed:
                    lan.host.run(firewall.remove_all, lan.root)
                jail.send(frame)
                with pytest.raises(TimeoutError):
                    listening.recv(100)
            finally:
                lan.apply()


def _mac_of(netns: Netns, interface: str) -> str:
    said = netns.run(world.checked, ["ip", "-o", "link", "show", interface])
    return said.partition("link/ether ")[2].split()[0]


def spoofed(lan: Lan) -> dict[str, bytes]:
    """Frames that jail a may not send to b."""
    own, victim, stranger = lan.a.nic, lan.b.nic, "0a:ff:ff:ff:ff:ff"
    gateway4, gateway6 = gateway(lan.first, "ipv4"), gateway(lan.first, "ipv6")
    good4, good6 = world.udp4(own.ipv4, victim.ipv4, b"x"), world.ipv6(own.ipv6, victim.ipv6, 59, b"")
    advert = socket.IPPROTO_ICMPV6
    tag = struct.pack("!HH", 7, world.ETH_P_IP)

    def to_victim(kind: int, body: bytes, source: str = own.mac) -> bytes:
        return ethernet(victim.mac, source, kind, body)

    return {
        "MAC of nobody": to_victim(world.ETH_P_IP, good4, stranger),
        "MAC of nobody, IPv6": to_victim(world.ETH_P_IPV6, good6, stranger),
        "IPv4 of nobody": to_victim(world.ETH_P_IP, world.udp4("10.99.99.99", victim.ipv4, b"x")),
        "IPv4 of the gateway": to_victim(world.ETH_P_IP, world.udp4(gateway4, victim.ipv4, b"x")),
        "IPv4 0.0.0.0 that is no DHCP": to_victim(world.ETH_P_IP, world.udp4("0.0.0.0", victim.ipv4, b"x")),
        "a DHCP server": to_victim(world.ETH_P_IP, world.udp4(own.ipv4, victim.ipv4, b"x", (67, 68))),
        "IPv6 of the gateway": to_victim(world.ETH_P_IPV6, world.ipv6(gateway6, victim.ipv6, 59, b"")),
        "link-local IPv6 of another": to_victim(world.ETH_P_IPV6, world.ipv6("fe80::1", victim.ipv6, 59, b"")),
        "IPv6 :: that is no neighbour discovery": to_victim(world.ETH_P_IPV6, world.ipv6("::", victim.ipv6, 59, b"")),
        "a router advertisement": to_victim(
            world.ETH_P_IPV6, world.ipv6(netlink.link_local(own.mac), "ff02::1", advert, b"\x86" + bytes(15))
        ),
        "a neighbour advertisement of the gateway's address": to_victim(
            world.ETH_P_IPV6,
            world.ipv6(own.ipv6, victim.ipv6, advert, world.neighbour_advertisement(gateway6, own.mac)),
        ),
        "duplicate address detection for another's address": to_victim(
            world.ETH_P_IPV6, world.ipv6("::", victim.ipv6, advert, _solicitation(victim.ipv6))
        ),
        "duplicate address detection for another's link-local address": to_victim(
            world.ETH_P_IPV6, world.ipv6("::", victim.ipv6, advert, _solicitation(netlink.link_local(victim.mac)))
        ),
        "ARP for the gateway": to_victim(world.ETH_P_ARP, world.arp(2, own.mac, gateway4, victim.ipv4)),
        "ARP with another MAC inside": to_victim(world.ETH_P_ARP, world.arp(2, stranger, own.ipv4, victim.ipv4)),
        "an ARP probe for another's address": to_victim(world.ETH_P_ARP, world.arp(1, own.mac, "0.0.0.0", victim.ipv4)),
        "ARP answer of 0.0.0.0": to_victim(world.ETH_P_ARP, world.arp(2, own.mac, "0.0.0.0", victim.ipv4)),
        "a VLAN tag": to_victim(world.ETH_P_8021Q, tag + good4),
        "a VLAN tag around another's address": to_victim(
            world.ETH_P_8021Q, tag + world.udp4(gateway4, victim.ipv4, b"x")
        ),
        "a QinQ tag": to_victim(0x88A8, struct.pack("!HH", 7, world.ETH_P_8021Q) + tag + good4),
        "a type that is no IP": to_victim(0x88B5, b"experimental" + bytes(40)),
        "a length for a type": to_victim(64, b"\x42\x42\x03" + bytes(61)),
    }


def _solicitation(target: str) -> bytes:
    """A neighbour solicitation (RFC 4861, 4.3)."""
    return struct.pack("!BBHI", 135, 0, 0, 0) + socket.inet_pton(socket.AF_INET6, target)


def lawful(lan: Lan) -> dict[str, bytes]:
    """Frames of the same shapes that jail a may send to b."""
    own, victim = lan.a.nic, lan.b.nic

    def to_victim(kind: int, body: bytes) -> bytes:
        return ethernet(victim.mac, own.mac, kind, body)

    advert = socket.IPPROTO_ICMPV6
    return {
        "IPv4": to_victim(world.ETH_P_IP, world.udp4(own.ipv4, victim.ipv4, b"x")),
        "IPv6": to_victim(world.ETH_P_IPV6, world.ipv6(own.ipv6, victim.ipv6, 59, b"")),
        "a question for DHCP": to_victim(world.ETH_P_IP, world.udp4("0.0.0.0", "255.255.255.255", b"x", (68, 67))),
        "duplicate address detection": to_victim(
            world.ETH_P_IPV6, world.ipv6("::", "ff02::1:ff00:2", advert, _solicitation(own.ipv6))
        ),
        "duplicate address detection, link-local": to_victim(
            world.ETH_P_IPV6, world.ipv6("::", "ff02::1:ff00:2", advert, _solicitation(netlink.link_local(own.mac)))
        ),
        "a neighbour advertisement of its own": to_victim(
            world.ETH_P_IPV6,
            world.ipv6(own.ipv6, victim.ipv6, advert, world.neighbour_advertisement(own.ipv6, own.mac)),
        ),
        "ARP": to_victim(world.ETH_P_ARP, world.arp(2, own.mac, own.ipv4, victim.ipv4)),
        "an ARP probe": to_victim(world.ETH_P_ARP, world.arp(1, own.mac, "0.0.0.0", own.ipv4)),
    }


def arrived(lan: Lan, frame: bytes, sender: Netns, receiver: Netns, interface: str = "eth0") -> bool:
    """Whether a frame gets from one jail to another. A lawful one is sent after it: no waiting for what won't come."""
    marker = world.udp4(lan.a.nic.ipv4, lan.b.nic.ipv4, b"the last one")
    last = ethernet(lan.b.nic.mac, lan.a.nic.mac, world.ETH_P_IP, marker)
    with world.frames(sender, interface) as sending, world.frames(receiver, interface) as receiving:
        sending.send(frame)
        sending.send(last)
        seen = [receiving.recv(2000)]
        while seen[-1] != last:
            seen.append(receiving.recv(2000))
    # The kernel takes a VLAN tag out of a frame it hands on: the end of it tells.
    return any(got.endswith(frame[-20:]) for got in seen[:-1])


def test_a_jail_cannot_pretend(lan: Lan) -> None:
    got_through = {name for name, frame in spoofed(lan).items() if arrived(lan, frame, lan.a.netns, lan.b.netns)}
    assert got_through == set()


def test_a_jail_can_do_what_it_may(lan: Lan) -> None:
    held = {name for name, frame in lawful(lan).items() if not arrived(lan, frame, lan.a.netns, lan.b.netns)}
    assert held == set()


def test_other_peoples_bridges_are_left_alone(lan: Lan) -> None:
    """On a bridge that isn't ours everything still passes: the very frames that our ports may not send."""
    with ExitStack() as undo:
        ends = [Netns(undo), Netns(undo)]
        lan.host.ip("link add br-other type bridge", "link set br-other up")
        undo.callback(lan.host.ip, "link del br-other")
        for number, end in enumerate(ends):
            end.ip(f"link add eth0 type veth peer name other{number} netns /proc/{os.getpid()}/fd/{lan.host.fd}")
            end.ip("link set eth0 up", f"addr add 10.99.0.{number + 1}/24 dev eth0")
            lan.host.ip(f"link set other{number} master br-other up")
        with server(ends[1], "10.99.0.2", 80):
            assert ask(ends[0], "10.99.0.2", 80) == "10.99.0.1"
        held = {name for name, frame in spoofed(lan).items() if not arrived(lan, frame, ends[0], ends[1])}
        assert held == set()


def test_other_peoples_traffic_is_forwarded(lan: Lan) -> None:
    """The host routes between an interface of its own and the outside as before, masquerading nothing."""
    with ExitStack() as undo:
        other = Netns(undo)
        other.ip(f"link add eth0 type veth peer name other netns /proc/{os.getpid()}/fd/{lan.host.fd}")
        undo.callback(lan.host.ip, "link del other")
        other.ip("link set eth0 up", "addr add 198.51.100.2/24 dev eth0", "route add default via 198.51.100.1")
        lan.host.ip("link set other up", "addr add 198.51.100.1/24 dev other")
        lan.outside.ip(f"route add 198.51.100.0/24 via {HOST4}")
        undo.callback(lan.outside.ip, f"route del 198.51.100.0/24 via {HOST4}")
        with server(lan.outside, OUTSIDE4, 80):
            assert ask(other, OUTSIDE4, 80) == "198.51.100.2"
        with server(other, "198.51.100.2", 80):
            assert ask(lan.outside, "198.51.100.2", 80) == OUTSIDE4


def listed(lan: Lan) -> list[dict[str, dict[str, object]]]:
    """Our tables with what is in them, without the handles that count up."""
    items = lan.host.run(nft.run, [{"list": {"ruleset": None}}])
    return [
        {kind: {key: value for key, value in item.items() if key != "handle"} for kind, item in entry.items()}
        for entry in items
        if "metainfo" not in entry
    ]


def test_a_jail_is_elements_and_no_rule(lan: Lan) -> None:
    lan.apply()
    before = listed(lan)
    nic = Nic("eth0", "default", f"{lan.root.link_prefix}vff", "0a:00:00:00:00:ff", "10.0.0.9", "fd00::9")
    ports = [port_of(lan.a, "tcp"), port_of(lan.a, "udp", HOST6)]
    for _ in range(2):
        lan.host.run(firewall.add_jail, lan.root, lan.first, nic, ports)
    added = listed(lan)
    assert [entry for entry in added if "rule" in entry] == [entry for entry in before if "rule" in entry]
    assert added != before
    for _ in range(2):
        lan.host.run(firewall.remove_jail, lan.root, nic, ports)
    assert listed(lan) == before


def test_a_port_left_by_a_jail_that_is_gone_is_taken_over(lan: Lan) -> None:
    port = port_of(lan.a, "tcp")
    lan.host.run(firewall.publish, lan.root, port, lan.b.nic)
    with server(lan.a.netns, lan.a.nic.ipv4, 80), lan.published(lan.a, port):
        assert ask(lan.outside, HOST4, 8080) == OUTSIDE4
    lan.host.run(firewall.publish, lan.root, port, lan.b.nic)
    lan.host.run(firewall.unpublish, lan.root, port, lan.a.nic)
    with server(lan.b.netns, lan.b.nic.ipv4, 80):
        assert refused(lan.outside, HOST4, 8080)


def test_flushed_tables_are_noticed_and_brought_back(lan: Lan) -> None:
    before = listed(lan)
    lan.host.run(nft.run, [{"flush": {"ruleset": None}}])
    assert not lan.host.run(firewall.is_there, lan.root)
    with pytest.raises(nft.NftError) as caught:
        lan.host.run(firewall.add_jail, lan.root, lan.first, lan.a.nic, [])
    assert caught.value.missing
    lan.apply()
    assert lan.host.run(firewall.is_there, lan.root)
    assert listed(lan) == before


def test_tables_of_others_stay(lan: Lan) -> None:
    other = {"family": "inet", "name": "jailmgr_others"}
    lan.host.run(nft.run, [{"add": {"table": other}}])
    try:
        lan.host.run(firewall.remove_all, lan.root)
        assert [entry["table"]["name"] for entry in listed(lan) if "table" in entry] == ["jailmgr_others"]
    finally:
        lan.host.run(nft.run, [{"delete": {"table": other}}])
        lan.apply()


def test_tables_of_an_older_version_are_replaced(lan: Lan) -> None:
    before = listed(lan)
    lan.host.run(firewall.remove_all, lan.root)
    table = lan.root.table
    lan.host.run(nft.run_text, f"add table inet {table}; add set inet {table} bridges {{ type mark; }}")
    lan.apply()
    assert listed(lan) == before


def test_several_threads_at_once(lan: Lan) -> None:
    before = listed(lan)

    def add_and_remove(number: int) -> None:
        # A thread of the executor is in the test's own namespace: each goes to the host's first.
        with inside(lan.host.fd):
            nic = Nic(
                "eth0",
                "default",
                f"{lan.root.link_prefix}v{number:x}",
                f"0a:00:00:00:00:{number:02x}",
                f"10.9.9.{number}",
                f"fd00::{number:x}",
            )
            ports = [Port("default", "web", "", 9000 + number, 80, "tcp")]
            for _ in range(10):
                firewall.add_jail(lan.root, lan.first, nic, ports)
                firewall.remove_jail(lan.root, nic, ports)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add_and_remove, range(100, 106)))
    assert listed(lan) == before


def test_conntrack_stays_on_whatever_is_added_again(lan: Lan) -> None:
    """The kernel counts who needs it, and wrongly where an element that counts connections is added twice in JSON."""
    for _ in range(30):
        lan.host.run(firewall.add_jail, lan.root, lan.first, lan.a.nic, [])
        lan.apply()
        lan.host.run(firewall.remove_jail, lan.root, lan.a.nic, [])
        lan.host.run(firewall.remove_jail, lan.root, lan.a.nic, [])
    lan.host.run(firewall.add_jail, lan.root, lan.first, lan.a.nic, [])
    with server(lan.outside, OUTSIDE4, 80):
        assert ask(lan.a.netns, OUTSIDE4, 80) == HOST4


def test_limits_that_are_right_are_kept_and_others_put_right(lan: Lan) -> None:
    """`apply_all` keeps what an element has counted."""
    group = bridge.tenant_group(1)
    ports = [(jail.network, jail.nic) for jail in lan.jails]

    def limits(connections: firewall.Connections) -> dict[tuple[str, str], str]:
        lan.host.run(firewall.apply_all, lan.root, [lan.first, lan.second], ports, [], [], connections)
        found = {}
        for name in ("opened", "taken_ipv4", "taken_ipv6", "tenant_opened", "tenant_taken"):
            said = lan.host.run(world.checked, ["nft", "list", "set", "inet", lan.root.table, name])
            for key, limit in re.findall(r'(\S+) ct count over (\d+) comment "\2"', said):
                found[name, key] = limit
        return found

    nics = [jail.nic for jail in lan.jails]
    default = {("opened", nic.mac): "4096" for nic in nics}
    default |= {("taken_ipv4", nic.ipv4): "4096" for nic in nics} | {("taken_ipv6", nic.ipv6): "4096" for nic in nics}
    own = {("opened", lan.a.nic.mac): "7", ("taken_ipv4", lan.a.nic.ipv4): "7", ("taken_ipv6", lan.a.nic.ipv6): "7"}
    total = {("tenant_opened", str(group)): "9", ("tenant_taken", str(group)): "9"}
    try:
        assert limits(firewall.Connections({lan.a.nic.veth: 7}, {group: 9})) == default | own | total
        assert limits(firewall.Connections({lan.a.nic.veth: 7})) == default | own
    finally:
        assert limits(firewall.Connections()) == default


def test_rules_are_as_many_with_more_jails(lan: Lan) -> None:
    def rules() -> int:
        said = lan.host.run(world.checked, ["nft", "-a", "list", "table", "inet", lan.root.table])
        return sum("# handle" in line for line in said.splitlines())

    before = rules()
    lan.host.run(firewall.remove_jail, lan.root, lan.a.nic, [])
    assert rules() == before
    lan.host.run(firewall.add_jail, lan.root, lan.first, lan.a.nic, [], 7)
    assert rules() == before
    lan.apply()
