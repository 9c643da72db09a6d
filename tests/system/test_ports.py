"""Published ports: from outside, from the host itself, from other jails; IPv4 and IPv6, TCP and UDP."""

from __future__ import annotations

import socket

import pytest

from tests.system.conftest import MakeJail
from tests.system.instance import Instance, kill, until
from tests.system.netns import INSIDE, OUTSIDE, Netns
from tests.system.traffic import bound, jail_netns, refuses, source_of

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize(("kind", "suffix"), [(TCP, ""), (UDP, "/udp")], ids=["tcp", "udp"])
def test_from_outside_and_from_the_host(
    jm: Instance, netns: Netns, busybox_jail: MakeJail, family: int, kind: socket.SocketKind, suffix: str
) -> None:
    name = busybox_jail("-p", f"8080:80{suffix}")
    with jail_netns(jm, name) as jail, bound(jail, kind, 80) as server:
        assert source_of(server, netns.outside, INSIDE[family], 8080) == OUTSIDE[family]
        source_of(server, netns.own, INSIDE[family], 8080)


def test_from_another_jail(jm: Instance, busybox_jail: MakeJail) -> None:
    server_jail, client = busybox_jail("-p", "8080:80"), busybox_jail()
    with jail_netns(jm, server_jail) as there, jail_netns(jm, client) as here, bound(there, TCP, 80) as server:
        source_of(server, here, INSIDE[0], 8080)


def test_what_one_tenant_published_is_not_for_another(jm: Instance, busybox_jail: MakeJail, other_tenant: str) -> None:
    name = busybox_jail("-p", "8080:80")
    jm("launch", "busybox", f"{other_tenant}/client")
    client = jail_netns(jm, f"{other_tenant}/client")
    with jail_netns(jm, name) as there, client as here, bound(there, TCP, 80):
        assert refuses(here, INSIDE[0], 8080)


def test_one_address_only(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-p", f"{INSIDE[0]}:8080:80")
    with jail_netns(jm, name) as jail, bound(jail, TCP, 80) as server:
        source_of(server, netns.outside, INSIDE[0], 8080)
        assert refuses(netns.outside, INSIDE[1], 8080)


def test_port_list_has_the_fields_of_the_contract(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-p", "8080:80", "-p", "8053:53/udp")
    ports = {row["host_port"]: row for row in jm.json("port", "list")}
    assert ports[8080] == ports[8080] | {"jail": name, "tenant": "default", "port": 80, "protocol": "tcp"}
    assert ports[8053] == ports[8053] | {"jail": name, "tenant": "default", "port": 53, "protocol": "udp"}
    assert "host_address" in ports[8080]


def test_publish_and_unpublish_while_it_runs(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    name = busybox_jail()
    with jail_netns(jm, name) as jail, bound(jail, TCP, 80) as server:
        assert refuses(netns.outside, INSIDE[0], 8080)
        jm("port", "publish", name, "8080:80")
        source_of(server, netns.outside, INSIDE[0], 8080)
        jm("port", "unpublish", name, "8080")
        assert refuses(netns.outside, INSIDE[0], 8080)
    assert jm.json("port", "list") == []
    jm.refused("port", "unpublish", name, "8080")


def test_a_port_is_taken_once(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    busybox_jail("-p", "8080:80")
    assert "8080" in jm.refused("launch", "busybox", "late", "-p", "8080:81").err
    with bound(netns.own, TCP, 8090):
        assert "8090" in jm.refused("launch", "busybox", "late", "-p", "8090:80").err
    assert jm.gone("late")
    jm("launch", "busybox", "late", "-p", "8080:80/udp")
    jm("delete", "--force", "late")


def test_a_deleted_jails_port_is_free_again(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-p", "8080:80")
    jm("delete", "--force", name)
    assert jm.json("port", "list") == []
    busybox_jail("-p", "8080:80")


def test_ports_survive_engine_reboot_and_restart(jm: Instance, netns: Netns, busybox_jail: MakeJail) -> None:
    name = busybox_jail("-p", "8080:80")
    kill(jm.engine_pid())
    before = jm.info(name)["init_pid"]
    jm.sh(name, "reboot -f", status=None)
    until(lambda: jm.info(name)["init_pid"] not in (None, before), 20)
    with jail_netns(jm, name) as jail, bound(jail, TCP, 80) as server:
        source_of(server, netns.outside, INSIDE[0], 8080)
    jm("restart", "--force", name)
    with jail_netns(jm, name) as jail, bound(jail, TCP, 80) as server:
        source_of(server, netns.outside, INSIDE[0], 8080)


@pytest.mark.parametrize("port", ["80", "0:80", "8080:0", "99999:80", "8080:80/sctp", "x:80", "1.2.3:8080:80"])
def test_bad_ports(jm: Instance, port: str) -> None:
    jm.refused("launch", "busybox", "bad", "-p", port, status=2)
    assert jm.gone("bad")
