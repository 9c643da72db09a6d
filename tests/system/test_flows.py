"""Flows of the host's connection table that outlive their rule: which are ended, and that all others stay."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from jailmgr.manager.doctor.firewall import flows_check
from jailmgr.model import Nic, Port
from jailmgr.network import conntrack, firewall, flows
from jailmgr.network.conntrack import Filter, Flow
from jailmgr.runtime import netlink
from tests.system import lan as world
from tests.system.lan import HOST4, HOST6, OUTSIDE4, OUTSIDE6, Jail, Lan, Netns

NOTHING_S = 0.2
"""How long a datagram is waited for that must not come; those that come take a millisecond."""


@pytest.fixture(scope="module")
def lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    with world.lan(tmp_path_factory.mktemp("lan")) as made:
        yield made


@pytest.fixture(params=["ipv4", "ipv6"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["few", "many"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Flows are listed by one dump of all, or by filters of the kernel's; whether it is the latter."""
    if request.param:
        monkeypatch.setattr(conntrack, "FEW", 0)
    return bool(request.param)


@contextmanager
def udp(netns: Netns, address: str, port: int) -> Iterator[socket.socket]:
    with netns.socket(world.family_of(address), socket.SOCK_DGRAM) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        yield made


def comes(receiver: socket.socket, sender: socket.socket, to: tuple[str, int]) -> bool:
    """Whether a datagram arrives."""
    receiver.settimeout(NOTHING_S)
    sender.sendto(b"who is there?", to)
    try:
        return receiver.recv(100) == b"who is there?"
    except TimeoutError:
        return False


def ends(lan: Lan, version: str) -> tuple[str, str]:
    """The outside's address and the host's."""
    return (OUTSIDE4, HOST4) if version == "ipv4" else (OUTSIDE6, HOST6)


def own(jail: Jail, version: str) -> str:
    return str(getattr(jail.nic, version))


def port_of(jail: Jail, host_port: int, host_address: str = "", protocol: str = "udp") -> Port:
    return Port(jail.network.tenant, "web", host_address, host_port, 80, protocol)


def subnets(lan: Lan) -> flows.Subnets:
    return flows.Subnets([lan.first, lan.second])


def publish(lan: Lan, port: Port, nic: Nic) -> None:
    lan.host.run(firewall.publish, lan.root, port, nic)
    lan.host.run(flows.publish, [(port, nic)], subnets(lan))


def unpublish(lan: Lan, port: Port, nic: Nic) -> None:
    lan.host.run(firewall.unpublish, lan.root, port, nic)
    lan.host.run(flows.unpublish, [(port, nic)])


def listed(lan: Lan) -> set[bytes]:
    """The identities of all flows of the host."""
    return {flow.ident for flow in lan.host.run(conntrack.find, [Filter()])}


def test_a_client_follows_the_port(lan: Lan, version: str, table: bool) -> None:
    """It sends by one socket all the time: before the port is published, for one jail, for none, for another."""
    outside, host = ends(lan, version)
    where = host if table else ""
    with (
        udp(lan.outside, outside, 5000) as client,
        udp(lan.a.netns, own(lan.a, version), 80) as a,
        udp(lan.c.netns, own(lan.c, version), 80) as c,
    ):
        to = (host, 8070)
        assert not comes(a, client, to)
        publish(lan, port_of(lan.a, 8070, where), lan.a.nic)
        try:
            assert comes(a, client, to), "what began before the port was published"
        finally:
            unpublish(lan, port_of(lan.a, 8070, where), lan.a.nic)
        assert not comes(a, client, to), "what began while it was"
        publish(lan, port_of(lan.c, 8070, where), lan.c.nic)
        try:
            assert comes(c, client, to), "the port is another jail's"
        finally:
            unpublish(lan, port_of(lan.c, 8070, where), lan.c.nic)
        assert not comes(a, client, to)


@pytest.mark.usefixtures("table")
def test_a_flow_left_to_a_former_owner_ends_as_the_port_is_published(lan: Lan, version: str) -> None:
    """The rule was taken away, and nobody came to its flows."""
    outside, host = ends(lan, version)
    a, c = port_of(lan.a, 8071), port_of(lan.c, 8071)
    with (
        udp(lan.outside, outside, 5001) as client,
        udp(lan.a.netns, own(lan.a, version), 80) as first,
        udp(lan.c.netns, own(lan.c, version), 80) as second,
    ):
        publish(lan, a, lan.a.nic)
        assert comes(first, client, (host, 8071))
        lan.host.run(firewall.unpublish, lan.root, a, lan.a.nic)
        assert comes(first, client, (host, 8071)), "NAT outlives its rule"
        publish(lan, c, lan.c.nic)
        try:
            assert comes(second, client, (host, 8071))
        finally:
            unpublish(lan, c, lan.c.nic)


@pytest.mark.usefixtures("table")
def test_answers_do_not_reach_the_next_owner_of_an_address(lan: Lan, version: str) -> None:
    outside, _ = ends(lan, version)
    with udp(lan.outside, outside, 6000) as stranger:
        stranger.settimeout(world.WAIT_S)
        with udp(lan.a.netns, own(lan.a, version), 7000) as former:
            former.sendto(b"hello", (outside, 6000))
            _, masqueraded = stranger.recvfrom(100)
            assert comes(former, stranger, masqueraded)
        with udp(lan.a.netns, own(lan.a, version), 7000) as later:
            assert comes(later, stranger, masqueraded), "the flow outlives its socket"
            lan.host.run(flows.end, [lan.a.nic], lambda _: False)
            assert comes(later, stranger, masqueraded), "the jail has been started again"
            lan.host.run(flows.end, [lan.a.nic], lambda _: True)
            assert not comes(later, stranger, masqueraded)


def _settled(lan: Lan, published: Sequence[tuple[Port, Nic]], live: Sequence[Jail]) -> None:
    addresses = [address for jail in live for address in (jail.nic.ipv4, jail.nic.ipv6)]
    lan.host.run(flows.settle, published, subnets(lan), lambda: addresses)


@pytest.mark.usefixtures("table")
def test_rules_made_anew_settle_what_nobody_saw(lan: Lan, version: str) -> None:
    """After a flush, or an engine that was killed between a rule and its flows."""
    outside, host = ends(lan, version)
    kept, gone = port_of(lan.a, 8072), port_of(lan.b, 8073)
    with (
        udp(lan.outside, outside, 5002) as client,
        udp(lan.a.netns, own(lan.a, version), 80) as a,
        udp(lan.b.netns, own(lan.b, version), 80) as b,
        udp(lan.c.netns, own(lan.c, version), 7001) as c,
    ):
        publish(lan, kept, lan.a.nic)
        publish(lan, gone, lan.b.nic)
        assert comes(a, client, (host, 8072))
        assert comes(b, client, (host, 8073))
        c.sendto(b"hello", (outside, 5002))
        client.settimeout(world.WAIT_S)
        _, masqueraded = client.recvfrom(100)
        lan.host.run(firewall.unpublish, lan.root, gone, lan.b.nic)
        try:
            before = listed(lan)
            _settled(lan, [(kept, lan.a.nic)], [lan.a, lan.b, lan.c])
            assert comes(a, client, (host, 8072))
            assert not comes(b, client, (host, 8073)), "no rule leads there any more"
            assert comes(c, client, masqueraded), "the jail runs"
            _settled(lan, [(kept, lan.a.nic)], [lan.a, lan.b])
            assert not comes(c, client, masqueraded), "the jail does not run"
            assert before & listed(lan), "flows that are right stay"
        finally:
            lan.host.run(firewall.unpublish, lan.root, kept, lan.a.nic)


def test_an_established_connection_stays(lan: Lan, version: str) -> None:
    outside, host = ends(lan, version)
    port = port_of(lan.a, 8074, protocol="tcp")
    with lan.a.netns.socket(world.family_of(host)) as listener, lan.outside.socket(world.family_of(host)) as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((own(lan.a, version), 80))
        listener.listen()
        publish(lan, port, lan.a.nic)
        client.connect((host, 8074))
        accepted, peer = listener.accept()
        assert peer[0] == outside
        with accepted:
            unpublish(lan, port, lan.a.nic)
            publish(lan, port, lan.a.nic)
            unpublish(lan, port, lan.a.nic)
            client.sendall(b"still here")
            accepted.settimeout(world.WAIT_S)
            assert accepted.recv(100) == b"still here"
            lan.host.run(flows.end, [lan.a.nic], lambda _: True)
            assert not [flow for flow in lan.host.run(conntrack.find, [Filter()]) if flow.port == 8074], (
                "its jail ended"
            )


def test_a_connection_that_is_not_established_follows_the_port(lan: Lan, version: str) -> None:
    """The first jail answers nothing: the client's kernel tries again by the same ports, and reaches the next one."""
    outside, host = ends(lan, version)
    former, present = (port_of(jail, 8075, protocol="tcp") for jail in (lan.a, lan.c))
    silent = "add table inet silent; add chain inet silent in { type filter hook input priority 0; policy drop; }"
    lan.a.netns.run(world.checked, ["nft", silent])
    publish(lan, former, lan.a.nic)
    try:
        with lan.outside.socket(world.family_of(host)) as client, world.server(lan.c.netns, own(lan.c, version), 80):
            client.setblocking(False)
            client.connect_ex((host, 8075))
            unpublish(lan, former, lan.a.nic)
            publish(lan, present, lan.c.nic)
            client.settimeout(world.WAIT_S)
            assert client.recv(100).decode() == outside
    finally:
        unpublish(lan, present, lan.c.nic)
        lan.a.netns.run(world.checked, ["nft", "delete table inet silent"])


def _others(lan: Lan, version: str) -> dict[str, tuple[Netns, str, int, str]]:
    """Flows of the number 8076, or of the same jail, that are none of the published port's: who sends, and whereto."""
    outside, host = ends(lan, version)
    return {
        "another port of the host": (lan.outside, host, 9999, "udp"),
        "another protocol": (lan.outside, host, 8076, "tcp"),
        "the host asks a jail": (lan.host, own(lan.b, version), 8076, "udp"),
        "a jail asks the outside": (lan.a.netns, outside, 8076, "udp"),
        "the host asks the outside": (lan.host, outside, 8076, "udp"),
        "a jail of another network asks the outside": (lan.c.netns, outside, 8076, "udp"),
    }


@pytest.mark.usefixtures("table")
def test_others_flows_stay(lan: Lan, version: str) -> None:
    """Also one that somebody else's NAT leads away from the host, at that very port."""
    outside, host = ends(lan, version)
    family = "ip" if version == "ipv4" else "ip6"
    target = f"[{outside}]" if version == "ipv6" else outside
    rules = "add table inet others; add chain inet others nat { type nat hook prerouting priority -150; };"
    rules += f"add rule inet others nat udp sport 5016 dnat {family} to {target}:9"
    lan.host.run(world.checked, ["nft", rules])
    try:
        port = port_of(lan.b, 8076)
        for name, (asking, address, number, protocol) in _others(lan, version).items():
            before = listed(lan)
            kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
            with world.server(lan.host, host, 8076), asking.socket(world.family_of(address), kind) as sending:
                sending.connect((address, number))
                sending.send(b"x")
            assert listed(lan) - before, name
        with udp(lan.outside, outside, 5016) as client:
            client.sendto(b"x", (host, 8076))
        held: list[Flow] = lan.host.run(conntrack.find, [Filter()])
        assert [flow for flow in held if flow.translated and flow.port == 8076 and flow.leads_port == 9]
        publish(lan, port, lan.b.nic)
        unpublish(lan, port, lan.b.nic)
        lan.host.run(
            flows.end, [Nic("eth0", "other", "v", "0a:00:00:00:00:01", "10.99.1.1", "fd99::1")], lambda _: True
        )
        assert listed(lan) >= {flow.ident for flow in held}
    finally:
        lan.host.run(world.checked, ["nft", "delete table inet others"])


def test_a_jails_questions_to_its_bridge_stay(lan: Lan, version: str) -> None:
    """Whoever has port 53 of the host: they are no published port's."""
    bridge = getattr(lan.first, version).partition("/")[0]
    with lan.a.netns.socket(world.family_of(bridge), socket.SOCK_DGRAM) as asking:
        asking.sendto(b"x", (bridge, 53))
        before = listed(lan)
        publish(lan, port_of(lan.b, 53), lan.b.nic)
        unpublish(lan, port_of(lan.b, 53), lan.b.nic)
        assert listed(lan) >= before


def test_the_kernels_filter_selects_what_ours_does(lan: Lan, version: str) -> None:
    """By each field: the kernel's answer is not empty, and lets through nothing that has to be sorted out."""
    outside, host = ends(lan, version)
    port = port_of(lan.a, 8077)
    publish(lan, port, lan.a.nic)
    with udp(lan.outside, outside, 5017) as client, udp(lan.a.netns, own(lan.a, version), 80) as a:
        assert comes(a, client, (host, 8077))
        flow = next(flow for flow in lan.host.run(conntrack.find, [Filter()]) if flow.port == 8077)
        family = world.family_of(host)
        for wanted in (
            Filter(family, source=flow.source),
            Filter(family, destination=flow.destination),
            Filter(family, leads_to=flow.leads_to),
            Filter(family, protocol=socket.IPPROTO_UDP, port=8077),
            Filter(family, destination=flow.destination, protocol=socket.IPPROTO_UDP, port=8077),
            Filter(family, leads_to=flow.leads_to, protocol=socket.IPPROTO_UDP, port=8077),
            Filter(status=conntrack.IPS_DST_NAT),
        ):
            found = lan.host.run(_dumped, wanted)
            assert flow in found, wanted
            if version == "ipv4" or not (wanted.source or wanted.destination or wanted.leads_to):
                assert all(conntrack._selects(wanted, each) for each in found), wanted
    unpublish(lan, port, lan.a.nic)


def _dumped(wanted: Filter) -> list[Flow]:
    """What the kernel alone selects."""
    kind, flags = conntrack.IPCTNL_MSG_CT_GET, netlink.NLM_F_DUMP
    with netlink.NetlinkSocket(conntrack.NETLINK_NETFILTER) as here:
        dump = conntrack._message(kind, flags, wanted.family, conntrack._filter(wanted))
        return [flow for reply in here.ask(dump) if (flow := conntrack._flow(reply)) is not None]


def test_a_kernel_without_a_filter(lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses this one, which asks for a field of a tuple that is not there (EINVAL)."""
    asked = netlink.attribute(conntrack.CTA_FILTER_ORIG_FLAGS, b"\1\0\0\0")
    monkeypatch.setattr(conntrack, "_filter", lambda _: netlink.attribute(conntrack.CTA_FILTER | 0x8000, asked))
    monkeypatch.setattr(conntrack, "FEW", 0)
    with pytest.raises(OSError, match="Invalid argument"):
        lan.host.run(_dumped, Filter(socket.AF_INET))
    with udp(lan.outside, OUTSIDE4, 5019) as client, udp(lan.a.netns, lan.a.nic.ipv4, 80) as a:
        client.sendto(b"x", (HOST4, 8079))
        publish(lan, port_of(lan.a, 8079), lan.a.nic)
        assert comes(a, client, (HOST4, 8079))
        unpublish(lan, port_of(lan.a, 8079), lan.a.nic)
        assert not comes(a, client, (HOST4, 8079))


def test_a_kernel_without_ctnetlink(lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports are published all the same. The kernel answers for a subsystem of nfnetlink that it does not have."""
    assert lan.host.run(flows_check).ok
    monkeypatch.setattr(conntrack, "NFNL_SUBSYS_CTNETLINK", 200)
    named = lan.host.run(flows_check)
    assert not named.ok
    assert "nf_conntrack_netlink" in named.remedy
    with udp(lan.outside, OUTSIDE4, 5018) as client, udp(lan.a.netns, lan.a.nic.ipv4, 80) as a:
        publish(lan, port_of(lan.a, 8078), lan.a.nic)
        assert comes(a, client, (HOST4, 8078))
        _settled(lan, [], [])
        lan.host.run(flows.end, [lan.a.nic], lambda _: True)
        unpublish(lan, port_of(lan.a, 8078), lan.a.nic)
        monkeypatch.undo()
        lan.host.run(flows.end, [lan.a.nic], lambda _: True)
