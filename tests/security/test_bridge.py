"""Wall: the bridge that a tenant's jails share. What holds: ports learn no address and each has one static entry, the
bridge learns nothing from link-local frames (`no_linklocal_learn`), and a rule at the bridge family's input hook drops
these, which skip prerouting and with it the anti-spoofing sets (br_handle_frame of net/bridge/br_input.c).
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.security.guest import Guest
from tests.system.conftest import MakeJail
from tests.system.instance import Instance
from tests.system.lan import ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, arp, ethernet, ipv6, udp4
from tests.system.netns import INSIDE, Netns, run
from tests.system.traffic import NOTHING_WITHIN, bound

GROUPS = [f"01:80:c2:00:00:{number:02x}" for number in range(16)]
"""Link-local group addresses (IEEE 802.1D, table 7-10), which a bridge doesn't forward."""
MADE_UP, STRANGER = "02:5e:00:00:00:00", "02:5e:00:00:00:99"
PORT = 2222


def send(guest: Guest, *frames: bytes, times: int = 1) -> None:
    """Send frames from the jail, as its root does."""
    guest.run("frames", stdin="".join(f"{frame.hex()} {times}\n" for frame in frames))


def mac_of(jm: Instance, jail: str) -> str:
    return jm.sh(jail, "cat /sys/class/net/eth0/address").out.strip()


def bridge_of(jm: Instance, jail: str) -> tuple[str, str]:
    """The bridge and the host's end of the veth pair of a jail, by the address that the bridge keeps for it."""
    (entry,) = [entry for entry in addresses(jm) if entry["mac"] == mac_of(jm, jail)]
    return entry["master"], entry["ifname"]


def addresses(jm: Instance) -> list[dict[str, str]]:
    """The entries of all bridges of the instance."""
    entries = json.loads(run("bridge", "-json", "fdb", "show"))
    return [entry for entry in entries if entry.get("master", "").startswith(jm.root.link_prefix)]


def pings(jm: Instance, jail: str, address: str) -> bool:
    return jm.sh(jail, f"ping -c 1 -W 2 {address}", status=None).status == 0


def rows(jm: Instance) -> dict[str, str]:
    """IPv4 addresses of the jails, by name."""
    return {row["name"]: row["ipv4"] for row in jm.json("list")}


def test_frames_to_link_local_groups_teach_the_bridge_nothing(
    jm: Instance, guest: Guest, busybox_jail: MakeJail
) -> None:
    victim, other = busybox_jail(), busybox_jail()
    ipv4 = rows(jm)[victim]
    assert pings(jm, other, ipv4)
    before = addresses(jm)
    stolen = [ethernet(group, mac_of(jm, victim), 0x88CC, bytes(50)) for group in GROUPS]
    made_up = [ethernet(group, MADE_UP, 0x88CC, bytes(50)) for group in GROUPS]
    send(guest, *made_up, times=200)
    send(guest, *stolen)
    assert addresses(jm) == before
    assert pings(jm, other, ipv4)
    assert "grp" not in run("bridge", "mdb", "show")


def test_frames_with_made_up_addresses_teach_the_bridge_nothing(
    jm: Instance, guest: Guest, busybox_jail: MakeJail
) -> None:
    victim = busybox_jail()
    before = addresses(jm)
    for destination in ("ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:fb", "01:80:c2:00:00:10", mac_of(jm, victim)):
        send(guest, ethernet(destination, MADE_UP, ETH_P_IP, bytes(50)), times=100)
        send(guest, ethernet(destination, mac_of(jm, victim), ETH_P_IP, bytes(50)))
    assert addresses(jm) == before


@pytest.mark.parametrize("rules", [True, False], ids=["", "with no rules"])
def test_a_bridge_of_an_older_release_is_closed_as_an_engine_starts(
    jm: Instance, guest: Guest, busybox_jail: MakeJail, rules: bool
) -> None:
    """Each of option and rule holds by itself; the jails that run stay connected."""
    victim = busybox_jail()
    bridge, port = bridge_of(jm, guest.jail)
    run("ip", "link", "set", bridge, "type", "bridge", "no_linklocal_learn", "0")
    for jail in (guest.jail, victim):
        _, own = bridge_of(jm, jail)
        run("bridge", "fdb", "del", mac_of(jm, jail), "dev", own, "master")
        run("bridge", "link", "set", "dev", own, "learning", "on", "flood", "on")
    jm("engine", "stop")
    run("nft", "delete", "table", "bridge", jm.root.table)
    send(guest, ethernet(GROUPS[14], STRANGER, 0x88CC, bytes(50)))
    assert STRANGER in [entry["mac"] for entry in addresses(jm)], "an older release's bridge learns"
    run("bridge", "fdb", "del", STRANGER, "dev", port, "master")
    jm.json("list")
    before = addresses(jm)
    assert {mac_of(jm, guest.jail), mac_of(jm, victim)} < {entry["mac"] for entry in before}
    if not rules:
        run("nft", "flush", "table", "bridge", jm.root.table)
    send(guest, *(ethernet(group, MADE_UP, 0x88CC, bytes(50)) for group in GROUPS), times=20)
    send(guest, *(ethernet(group, mac_of(jm, victim), 0x88CC, bytes(50)) for group in GROUPS))
    assert addresses(jm) == before
    assert pings(jm, guest.jail, rows(jm)[victim])
    jm("engine", "stop")
    jm.json("list")


def udp6(source: str, destination: str, payload: bytes) -> bytes:
    """An IPv6 packet with UDP in it, to PORT; its checksum can't be left out (RFC 8200, 8.1)."""
    udp = struct.pack("!HHHH", 7, PORT, 8 + len(payload), 0) + payload + bytes(len(payload) % 2)
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
    words = ends + struct.pack("!II", 8 + len(payload), socket.IPPROTO_UDP) + udp
    total = sum(struct.unpack(f"!{len(words) // 2}H", words))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    udp = udp[:6] + struct.pack("!H", ~total & 0xFFFF) + udp[8 : 8 + len(payload)]
    return ipv6(source, destination, socket.IPPROTO_UDP, udp)


@pytest.fixture
def tables(jm: Instance) -> Iterator[Callable[[], None]]:
    """Deletes the instance's rules in the bridge family; they are back after the test."""

    def delete() -> None:
        run("nft", "delete", "table", "bridge", jm.root.table)

    yield delete
    jm("engine", "stop")
    jm.json("list")


@pytest.mark.parametrize("bridge_rules", [True, False], ids=["", "with no rules for frames"])
@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_frames_to_link_local_groups_bring_nothing_to_the_host(
    jm: Instance, guest: Guest, netns: Netns, tables: Callable[[], None], bridge_rules: bool, family: int
) -> None:
    """The kernel hands these frames up by the port, not by the bridge, past the rules that go by the bridge's name.

    Where they aren't dropped as frames, `raw` drops packets that come in by a port.
    """
    packet = (udp4("10.9.9.9", INSIDE[0], b"in", (7, PORT)), udp6("2001:db8::77", INSIDE[1], b"in"))[family]
    kind = (ETH_P_IP, ETH_P_IPV6)[family]
    if not bridge_rules:
        tables()
    with bound(netns.own, socket.SOCK_DGRAM, PORT, INSIDE[family]) as listening:
        listening.settimeout(NOTHING_WITHIN)
        send(guest, *(ethernet(group, STRANGER, kind, packet) for group in GROUPS))
        with pytest.raises(TimeoutError):
            listening.recv(100)


def test_frames_to_link_local_groups_make_the_host_no_neighbours(jm: Instance, guest: Guest) -> None:
    """The host answers ARP on any interface, and keeps who has asked."""
    questions = [arp(1, STRANGER, f"10.9.9.{number}", INSIDE[0]) for number in range(1, 50)]
    send(guest, *(ethernet(GROUPS[14], STRANGER, ETH_P_ARP, question) for question in questions))
    assert STRANGER not in run("ip", "neighbour", "show")


def test_frames_for_nobody_reach_no_neighbour(jm: Instance, guest: Guest, busybox_jail: MakeJail) -> None:
    """A bridge floods frames whose destination it doesn't know, such as those for a jail that has just ended."""
    witness, gone = busybox_jail(), busybox_jail()
    away, ipv4 = mac_of(jm, gone), rows(jm)[gone]
    jm("stop", "--force", gone)

    def received() -> int:
        return int(jm.sh(witness, "cat /sys/class/net/eth0/statistics/rx_packets").out)

    packet = udp4(rows(jm)[guest.jail], ipv4, b"for you alone", (7, PORT))
    frame = ethernet(away, mac_of(jm, guest.jail), ETH_P_IP, packet)
    send(guest, frame)
    before = received()
    guest.run("frames", stdin=f"{frame.hex()} 1\n" * 500)
    assert received() - before < 100
