"""Interfaces and bridges: made, put right, counted, taken away."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.model import Nic
from jailmgr.network import bridge, firewall
from jailmgr.runtime import netlink
from tests.system import lan as world
from tests.system.lan import HOST6, Lan, Netns, server


@pytest.fixture(scope="module")
def lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    with world.lan(tmp_path_factory.mktemp("lan")) as made:
        yield made


def test_attach_replaces_and_detach_is_idempotent(lan: Lan) -> None:
    with ExitStack() as undo:
        nic = Nic("eth0", "default", f"{lan.root.link_prefix}vee", "0a:00:00:00:00:ee", "10.0.0.8", "fd00::8")
        jail = lan.b._replace(netns=Netns(undo), nic=nic)
        plan = world.plan(lan.root, jail) | {"gateways": []}
        lan.host.run(netlink.attach, plan, jail.netns.fd)
        other = Netns(undo)
        lan.host.run(netlink.attach, plan, other.fd)
        assert [name for _, name in jail.netns.run(socket.if_nameindex)] == ["lo"]
        assert [name for _, name in other.run(socket.if_nameindex)] == ["lo", "eth0"]
        assert other.run(netlink.addresses, "eth0") == (True, {"10.0.0.8/24", "fd00::8/64", "fe80::800:ff:fe00:ee/64"})
        for _ in range(2):
            lan.host.run(netlink.detach, jail.nic.veth)
        assert [name for _, name in other.run(socket.if_nameindex)] == ["lo"]


@pytest.mark.parametrize("wrong", [{"bridge": "jmnobridge"}, {"gateways": ["10.200.0.1"]}, {"name": "lo"}])
def test_attach_that_fails_leaves_nothing(lan: Lan, wrong: dict[str, object]) -> None:
    with ExitStack() as undo:
        jail = lan.b._replace(netns=Netns(undo))
        # The entry of a MAC in the bridge's table goes with the port that was attached last with it.
        own = {"veth": f"{lan.root.link_prefix}vee", "mac": "0a:00:00:00:00:ee"}
        plan = world.plan(lan.root, jail) | own | wrong
        with pytest.raises(JailmgrError, match=f"{lan.root.link_prefix}vee"):
            lan.host.run(netlink.attach, plan, jail.netns.fd)
        assert f"{lan.root.link_prefix}vee" not in lan.host.run(bridge.list_veths, lan.root)
        assert [name for _, name in jail.netns.run(socket.if_nameindex)] == ["lo"]


def test_counters_count_from_the_jails_side(lan: Lan) -> None:
    received, sent = lan.host.run(netlink.counters, lan.a.nic.veth)
    with server(lan.b.netns, lan.b.nic.ipv4, 80, "udp"), lan.a.netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.sendto(bytes(1000), (lan.b.nic.ipv4, 80))
        own.recv(100)
    now_received, now_sent = lan.host.run(netlink.counters, lan.a.nic.veth)
    assert now_sent - sent >= 1000 > now_received - received > 0
    assert lan.host.run(netlink.counters, "jmnolink") == (0, 0)


def test_bridges_are_listed_by_prefix_and_kind(lan: Lan) -> None:
    own = [bridge.bridge_name(lan.root, network.id) for network in (lan.first, lan.second)]
    lan.host.ip(f"link add {lan.root.link_prefix}bff type ifb", "link add br-other type bridge")
    try:
        assert lan.host.run(bridge.list_bridges, lan.root) == own
        assert lan.host.run(bridge.list_veths, lan.root) == [jail.nic.veth for jail in lan.jails]
    finally:
        lan.host.ip(f"link del {lan.root.link_prefix}bff", "link del br-other")


def test_a_bridge_is_put_right(lan: Lan) -> None:
    name = bridge.bridge_name(lan.root, lan.second.id)
    lan.host.ip(f"addr flush dev {name}", f"addr add 10.123.45.6/24 dev {name}", f"link set {name} down")
    lan.host.run(bridge.ensure_network, lan.root, lan.second)
    up, found = lan.host.run(netlink.addresses, name)
    assert up
    assert {text for text in found if not text.startswith("fe80:")} == {lan.second.ipv4, lan.second.ipv6}


def test_a_bridge_and_ports_of_an_older_release_are_closed(lan: Lan) -> None:
    name, veth = bridge.bridge_name(lan.root, lan.first.id), lan.a.nic.veth
    lan.host.ip(f"link set {name} type bridge no_linklocal_learn 0")
    lan.host.ip(f"link set {veth} type bridge_slave learning on flood on hairpin off", f"link set {veth} arp on")
    lan.host.run(world.checked, ["bridge", "fdb", "del", lan.a.nic.mac, "dev", veth, "master"])
    for _ in range(2):
        lan.host.run(bridge.ensure_network, lan.root, lan.first, bridge.tenant_group(1))
        lan.host.run(netlink.hold_port, veth, lan.a.nic.mac)
        said = lan.host.run(world.checked, ["ip", "-details", "link", "show", name])
        assert "no_linklocal_learn 1" in said
        assert f"group {bridge.tenant_group(1)}" in said
        said = lan.host.run(world.checked, ["ip", "-details", "link", "show", veth])
        assert "hairpin on" in said
        assert "learning off flood off" in said
        assert "NOARP,UP" in said
        said = lan.host.run(world.checked, ["bridge", "fdb", "show", "brport", veth])
        assert f"{lan.a.nic.mac} sticky master {name} static" in said


def test_a_port_without_a_bridge_is_no_error(lan: Lan) -> None:
    lan.host.run(netlink.hold_port, "jmnolink", lan.b.nic.mac)
    lan.host.ip("link add jmalone type ifb")
    try:
        lan.host.run(netlink.hold_port, "jmalone", lan.b.nic.mac)
    finally:
        lan.host.ip("link del jmalone")


def test_forwarding_keeps_router_advertisements(lan: Lan) -> None:
    """A host that takes its IPv6 way out from router advertisements does so still (ip-sysctl: accept_ra)."""
    with ExitStack() as undo:
        host = Netns(undo)
        host.ip("link add up1 type bridge")
        network = lan.first
        host.run(bridge.ensure_network, lan.root, network)
        assert host.run(Path("/proc/sys/net/ipv6/conf/up1/accept_ra").read_text) == "2\n"
        assert host.run(Path("/proc/sys/net/ipv6/conf/all/forwarding").read_text) == "1\n"
        assert host.run(Path("/proc/sys/net/ipv4/ip_forward").read_text) == "1\n"


def test_the_mtu_is_that_of_the_way_out(lan: Lan) -> None:
    lan.host.ip("link set uplink mtu 1400")
    try:
        assert lan.host.run(bridge.uplink_mtu) == 1400
    finally:
        lan.host.ip("link set uplink mtu 1500")
    assert lan.host.run(bridge.uplink_mtu) == 1500


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("where", ["", "127.0.0.1", HOST6])
def test_a_port_is_free_until_somebody_listens(lan: Lan, protocol: str, where: str) -> None:
    assert lan.host.run(firewall.port_is_free, where, 8081, protocol)
    with server(lan.host, where or "0.0.0.0", 8081, protocol):
        assert not lan.host.run(firewall.port_is_free, where, 8081, protocol)
    with pytest.raises(JailmgrError, match="8081"):
        lan.host.run(firewall.port_is_free, "192.0.2.77", 8081, protocol)
