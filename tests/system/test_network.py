"""Jails on the network: addresses, the way out, names, and the walls between tenants."""

from __future__ import annotations

import ipaddress
import json
import socket

import pytest

from tests.system.conftest import MakeJail
from tests.system.instance import Instance, Result, until
from tests.system.netns import INSIDE, OUTSIDE, Netns, inside, run
from tests.system.traffic import bound, jail_netns, refuses, source_of


def ping(jm: Instance, name: str, address: str, *options: str) -> Result:
    return jm.exec(name, "ping", "-c", "1", "-W", "2", *options, address, status=None)


def reaches(jm: Instance, name: str, address: str) -> bool:
    """Ask until it answers: a neighbour's first answer over IPv6 may take a second."""
    return bool(until(lambda: ping(jm, name, address).status == 0, 10, f"{name} reaches {address}"))


def gateways(jm: Instance, name: str) -> list[str]:
    return [jm.sh(name, f"ip {family} route show default").out.split()[2] for family in ("-4", "-6")]


def test_addresses_are_those_told(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    info = jm.info(name)
    shown = jm.sh(name, "ip address show eth0").out
    assert f"inet {info['ipv4']}/24" in shown
    assert f"inet6 {info['ipv6']}/64" in shown
    assert ipaddress.ip_address(info["ipv4"]) in ipaddress.ip_network("10.0.0.0/8")
    assert ipaddress.ip_address(info["ipv6"]) in ipaddress.ip_network("fd00::/8")
    (network,) = [row for row in jm.ok("GET", "/1.0/networks") if row["name"] == "default"]
    assert ipaddress.ip_address(info["ipv4"]) in ipaddress.ip_interface(network["ipv4"]).network


def test_reaches_its_gateways_and_the_outside(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    for address in (*gateways(jm, name), *OUTSIDE):
        assert reaches(jm, name, address)


@pytest.mark.parametrize("family", [0, 1])
def test_what_goes_out_is_masqueraded(jm: Instance, netns: Netns, busybox_jail: MakeJail, family: int) -> None:
    name = busybox_jail()
    assert reaches(jm, name, OUTSIDE[family])
    with jail_netns(jm, name) as jail, bound(netns.outside, socket.SOCK_STREAM, 7000) as server:
        assert source_of(server, jail, OUTSIDE[family], 7000) == INSIDE[family]


def test_nobody_outside_gets_in(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    info = jm.info(name)
    with inside(netns.outside):
        run("ip", "route", "add", f"{info['ipv4']}/32", "via", INSIDE[0])
    try:
        with jail_netns(jm, name) as jail, bound(jail, socket.SOCK_STREAM, 80):
            assert refuses(netns.outside, info["ipv4"], 80)
    finally:
        with inside(netns.outside):
            run("ip", "route", "delete", f"{info['ipv4']}/32")


def test_jails_of_a_tenant_meet_by_name(jm: Instance, busybox_jail: MakeJail) -> None:
    one, two = busybox_jail(), busybox_jail()
    info = jm.info(two)
    for address in (info["ipv4"], info["ipv6"]):
        assert reaches(jm, one, address)
    found = until(lambda: jm.exec(one, "nslookup", two, status=None).out, 10)
    assert info["ipv4"] in found
    assert info["ipv6"] in found
    assert jm.info(one)["ipv4"] in jm.exec(two, "nslookup", one, status=None).out
    with jail_netns(jm, one) as ours, jail_netns(jm, two) as theirs, bound(theirs, socket.SOCK_STREAM, 80) as server:
        assert source_of(server, ours, info["ipv4"], 80) == jm.info(one)["ipv4"]
        assert source_of(server, ours, info["ipv6"], 80) == jm.info(one)["ipv6"]


def test_the_name_of_a_deleted_jail_is_forgotten(jm: Instance, busybox_jail: MakeJail) -> None:
    one, two = busybox_jail(), busybox_jail()
    until(lambda: jm.exec(one, "nslookup", two, status=None).status == 0, 10)
    jm("delete", "--force", two)
    until(lambda: jm.exec(one, "nslookup", two, status=None).status != 0, 10)


def test_no_packet_crosses_to_another_tenant(jm: Instance, busybox_jail: MakeJail, other_tenant: str) -> None:
    ours = busybox_jail()
    theirs = f"{other_tenant}/stranger"
    jm("launch", "busybox", theirs)
    info = jm.info(theirs)
    assert info["tenant"] == other_tenant
    for address in (info["ipv4"], info["ipv6"]):
        assert ping(jm, ours, address).status != 0, address
    for address in (jm.info(ours)["ipv4"], jm.info(ours)["ipv6"]):
        assert ping(jm, theirs, address).status != 0, address
    with jail_netns(jm, ours) as here, jail_netns(jm, theirs) as there, bound(there, socket.SOCK_STREAM, 80):
        assert refuses(here, info["ipv4"], 80)
        assert refuses(here, info["ipv6"], 80)
    assert jm.exec(ours, "nslookup", "stranger", status=None).status != 0
    assert reaches(jm, theirs, OUTSIDE[0])


def test_addresses_of_others_cannot_be_used(jm: Instance, busybox_jail: MakeJail) -> None:
    liar, victim = busybox_jail(), busybox_jail()
    own, theirs = jm.info(liar), jm.info(victim)
    gateway4, gateway6 = gateways(jm, liar)
    assert reaches(jm, liar, gateway4)
    jm("stop", "--force", victim)
    for address in (f"{theirs['ipv4']}/24", f"{theirs['ipv6']}/64"):
        run("nsenter", f"--net={own['netns']}", "ip", "address", "add", address, "dev", "eth0", "nodad")
    assert ping(jm, liar, gateway4, "-I", theirs["ipv4"]).status != 0
    assert ping(jm, liar, gateway6, "-I", theirs["ipv6"]).status != 0
    assert ping(jm, liar, gateway4, "-I", own["ipv4"]).status == 0


def test_another_mac_gets_nowhere(jm: Instance, busybox_jail: MakeJail) -> None:
    liar = busybox_jail()
    gateway = gateways(jm, liar)[0]
    assert reaches(jm, liar, gateway)
    mac = jm.sh(liar, "cat /sys/class/net/eth0/address").out.strip()
    jm.sh(liar, "ip link set eth0 address 02:00:00:00:00:99; ip neigh flush dev eth0", status=None)
    assert ping(jm, liar, gateway).status != 0
    jm.sh(liar, f"ip link set eth0 address {mac}; ip neigh flush dev eth0", status=None)
    assert reaches(jm, liar, gateway)


def test_a_router_cannot_be_played(jm: Instance, busybox_jail: MakeJail) -> None:
    liar, victim = busybox_jail(), busybox_jail()
    gateway = gateways(jm, liar)[0]
    assert reaches(jm, victim, gateway)
    jm.sh(liar, f"ip address add {gateway}/32 dev eth0; arping -c 3 -U -I eth0 -s {gateway} {gateway}", status=None)
    mac = jm.sh(liar, "cat /sys/class/net/eth0/address").out.strip()
    assert mac not in jm.sh(victim, f"ip neigh show {gateway}").out
    assert reaches(jm, victim, OUTSIDE[0])


def test_a_chosen_address(jm: Instance, busybox_jail: MakeJail) -> None:
    subnet = ipaddress.ip_interface(jm.ok("GET", "/1.0/networks")[0]["ipv4"]).network
    wanted = str(subnet[200])
    name = busybox_jail("--ip", wanted)
    assert jm.info(name)["ipv4"] == wanted
    assert wanted in jm.refused("launch", "busybox", "second", "--ip", wanted).err
    for bad in (str(subnet[0]), str(subnet[1]), str(subnet[255]), "192.0.2.1"):
        jm.refused("launch", "busybox", "second", "--ip", bad, status=2)
    jm.refused("launch", "busybox", "second", "--ip", "300.1.1.1", status=2)
    assert jm.gone("second")


def test_the_host_is_closed_to_jails(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    gateway4, gateway6 = gateways(jm, name)
    with jail_netns(jm, name) as jail, bound(netns.own, socket.SOCK_STREAM, 7022):
        for address in (gateway4, gateway6, INSIDE[0]):
            assert refuses(jail, address, 7022), address


def test_the_hosts_own_traffic_is_left_alone(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    busybox_jail()
    with bound(netns.own, socket.SOCK_STREAM, 7023) as server:
        for ours, theirs in zip(INSIDE, OUTSIDE, strict=True):
            assert source_of(server, netns.outside, ours, 7023) == theirs
    run("ip", "link", "add", "otherbr", "type", "bridge")
    try:
        run("ip", "link", "set", "otherbr", "up")
        rules = json.loads(run("nft", "--json", "list", "ruleset"))["nftables"]
        assert "otherbr" not in json.dumps(rules)
        own = {jm.root.table}
        assert {entry["table"]["name"] for entry in rules if "table" in entry} == own
    finally:
        run("ip", "link", "delete", "otherbr")


def test_the_network_survives_the_engine_and_a_restart(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    before = jm.info(name)
    jm("engine", "stop")
    assert reaches(jm, name, OUTSIDE[0])
    jm("restart", "--force", name)
    after = jm.info(name)
    assert (after["ipv4"], after["ipv6"]) == (before["ipv4"], before["ipv6"])
    assert reaches(jm, name, OUTSIDE[0])
    assert reaches(jm, name, OUTSIDE[1])


def test_debian_knows_names(jm: Instance, debian_jail: MakeJail) -> None:
    name, other = debian_jail(), debian_jail()
    assert jm.info(other)["ipv4"] in jm.exec(name, "getent", "ahostsv4", other).out
    jm.exec(name, "getent", "hosts", name)
    jm.exec(name, "ping", "-c", "1", "-W", "5", OUTSIDE[0])
