"""A small world for the network layer alone: a host, jails and an outside, each an unnamed network namespace.

    outside 203.0.113.1, 2001:db8::1 - wire - host 203.0.113.2, 2001:db8::2 - bridges of jailmgr - jails

A namespace lives while its fd is open, so that a killed test leaves none.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from jailmgr import claims
from jailmgr.config import Root, find_root
from jailmgr.model import Network, Nic, Port
from jailmgr.network import addresses, bridge, dns, firewall
from jailmgr.runtime import netlink
from jailmgr.runtime.syscalls import CLONE_NEWNET, unshare

T = TypeVar("T")
ETH_P_ALL, ETH_P_IP, ETH_P_IPV6, ETH_P_ARP, ETH_P_8021Q = 0x0003, 0x0800, 0x86DD, 0x0806, 0x8100
WAIT_S = 5.0
REFUSED_S = 1.0
"""How long a connection that must not come about is tried."""
OUTSIDE4, OUTSIDE6, HOST4, HOST6 = "203.0.113.1", "2001:db8::1", "203.0.113.2", "2001:db8::2"


class Netns:
    """A network namespace with a thread that lives in it: what it runs, processes too, is there."""

    def __init__(self, undo: ExitStack) -> None:
        self._thread = ThreadPoolExecutor(1)
        undo.callback(self._thread.shutdown)
        self.run(unshare, CLONE_NEWNET)
        self.fd = self.run(os.open, "/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, self.fd)
        self.ip("link set lo up")

    def run(self, call: Callable[..., T], *args: object) -> T:
        return self._thread.submit(call, *args).result(60)

    def ip(self, *commands: str) -> None:
        for command in commands:
            self.run(checked, ["ip", *command.split()])

    def socket(self, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A socket of this namespace, for any thread to use."""
        made: socket.socket = self.run(socket.socket, family, kind, protocol)
        made.settimeout(WAIT_S)
        return made


def checked(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


class Jail(NamedTuple):
    """What the network layer knows of a jail, and its namespace."""

    netns: Netns
    network: Network
    nic: Nic


class Lan(NamedTuple):
    """The world. `first` and `second` are networks, `a` and `b` jails of the first, `c` one of the second."""

    root: Root
    outside: Netns
    host: Netns
    first: Network
    second: Network
    a: Jail
    b: Jail
    c: Jail

    @property
    def jails(self) -> list[Jail]:
        return [self.a, self.b, self.c]

    def apply(self) -> None:
        """The firewall as it is with three jails and no port published."""
        ports = [(jail.network, jail.nic) for jail in self.jails]
        self.host.run(firewall.apply_all, self.root, [self.first, self.second], ports, [])

    @contextmanager
    def published(self, jail: Jail, port: Port) -> Iterator[None]:
        self.host.run(firewall.publish, self.root, port, jail.nic)
        try:
            yield
        finally:
            self.host.run(firewall.unpublish, self.root, port, jail.nic)


@contextmanager
def lan(at: Path) -> Iterator[Lan]:
    """The whole world, up; nothing of it is left at the end."""
    root = find_root(str(at / "root"))
    Path(root.run).mkdir(0o700, parents=True)
    with ExitStack() as undo:
        outside, host = Netns(undo), Netns(undo)
        outside.ip(f"link add wire type veth peer name uplink netns /proc/{os.getpid()}/fd/{host.fd}")
        outside.ip("link set wire up", f"addr add {OUTSIDE4}/24 dev wire", f"addr add {OUTSIDE6}/64 dev wire nodad")
        host.ip("link set uplink up", f"addr add {HOST4}/24 dev uplink", f"addr add {HOST6}/64 dev uplink nodad")
        host.ip(f"route add default via {OUTSIDE4}", f"-6 route add default via {OUTSIDE6}")
        host.run(claims.claim_mark, root)
        undo.callback(host.run, claims.release_all, root)
        first = host.run(addresses.new_network, root, 1, "default", "default")
        second = host.run(addresses.new_network, root, 2, "other", "default")
        for network in (first, second):
            host.run(bridge.ensure_network, root, network)
            undo.callback(host.run, dns.stop_dns, root, network.id)
        a, b = (_jail(undo, root, host, first, number) for number in (1, 2))
        c = _jail(undo, root, host, second, 3)
        made = Lan(root, outside, host, first, second, a, b, c)
        made.apply()
        yield made


def _jail(undo: ExitStack, root: Root, host: Netns, network: Network, number: int) -> Jail:
    ipv4, ipv6 = addresses.choose_address(network, set(), f"{network.ipv4.rpartition('.')[0]}.{number + 1}")
    veth, mac = bridge.veth_name(root, number), addresses.mac_for(root, ipv4)
    jail = Jail(Netns(undo), network, Nic("eth0", network.name, veth, mac, ipv4, ipv6))
    host.run(netlink.attach, plan(root, jail), jail.netns.fd)
    return jail


def plan(root: Root, jail: Jail) -> dict[str, object]:
    """A jail's interface as netlink.attach takes it."""
    return {
        "name": jail.nic.name,
        "veth": jail.nic.veth,
        "bridge": bridge.bridge_name(root, jail.network.id),
        "mac": jail.nic.mac,
        "mtu": 1500,
        "addresses": [f"{jail.nic.ipv4}/24", f"{jail.nic.ipv6}/64"],
        "gateways": [jail.network.ipv4.partition("/")[0], jail.network.ipv6.partition("/")[0]],
    }


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextmanager
def server(netns: Netns, address: str, port: int, protocol: str = "tcp") -> Iterator[None]:
    """Tells each who asks the address it sees; until the end."""
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    with netns.socket(family_of(address), kind) as listener:
        if protocol == "tcp":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        if protocol == "tcp":
            listener.listen()
        listener.settimeout(None)
        serving = threading.Thread(target=_serve, args=(listener, protocol))
        serving.start()
        try:
            yield
        finally:
            # An end that needs no packet: it wakes accept(2) and recvfrom(2) alike.
            with socket.socket(fileno=os.dup(listener.fileno())) as same:
                _shut(same)
            serving.join(WAIT_S)
            assert not serving.is_alive()


def _shut(listener: socket.socket) -> None:
    try:
        listener.shutdown(socket.SHUT_RDWR)
    except OSError:
        # shutdown(2) of a socket without a peer says ENOTCONN, and wakes its readers all the same.
        pass


def _serve(listener: socket.socket, protocol: str) -> None:
    while True:
        try:
            if protocol == "udp":
                asked, peer = listener.recvfrom(100)
                if not asked:
                    return
                listener.sendto(peer[0].encode(), peer)
            else:
                connection, peer = listener.accept()
                with connection:
                    connection.sendall(peer[0].encode())
        except OSError:
            return


def ask(netns: Netns, address: str, port: int, protocol: str = "tcp", within: float = WAIT_S) -> str:
    """What a `server` says the asker's address is. Raises OSError."""
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    with netns.socket(family_of(address), kind) as asking:
        asking.settimeout(within)
        asking.connect((address, port))
        if protocol == "udp":
            asking.send(b"who am I?")
        return asking.recv(100).decode()


def refused(netns: Netns, address: str, port: int, protocol: str = "tcp") -> bool:
    """Whether nobody answers there."""
    try:
        ask(netns, address, port, protocol, REFUSED_S)
    except OSError:
        return True
    return False


def frames(netns: Netns, interface: str = "eth0") -> socket.socket:
    """A packet(7) socket of an interface, to send whole frames and see all that come."""
    made = netns.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    made.bind((interface, 0))
    return made


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(destination: str, source: str, kind: int, body: bytes) -> bytes:
    return mac_bytes(destination) + mac_bytes(source) + struct.pack("!H", kind) + body


def udp4(source: str, destination: str, payload: bytes, ports: tuple[int, int] = (7, 7)) -> bytes:
    """An IPv4 packet with UDP in it (RFC 791, 768); the UDP checksum is left out, as IPv4 allows."""
    udp = struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, socket.IPPROTO_UDP, 0)
    header += socket.inet_aton(source) + socket.inet_aton(destination)
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + struct.pack("!H", checksum) + header[12:] + udp


def ipv6(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    """An IPv6 packet (RFC 8200)."""
    addresses6 = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 255) + addresses6 + payload


def arp(operation: int, mac: str, address: str, target: str) -> bytes:
    """An ARP packet (RFC 826)."""
    packet = struct.pack("!HHBBH", 1, ETH_P_IP, 6, 4, operation) + mac_bytes(mac) + socket.inet_aton(address)
    return packet + bytes(6) + socket.inet_aton(target)


def neighbour_advertisement(target: str, mac: str) -> bytes:
    """ICMPv6 type 136 (RFC 4861, 4.4) with the override flag; its checksum is left out: bridges don't look."""
    return (
        struct.pack("!BBHI", 136, 0, 0, 1 << 29) + socket.inet_pton(socket.AF_INET6, target) + b"\2\1" + mac_bytes(mac)
    )
