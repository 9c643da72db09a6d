"""The veth pair of a jail, by rtnetlink(7) and nothing else: the supervisor makes it anew at each start of a jail.

Standard library only; `_socket` rather than `socket`, whose enums take 10 ms to import. Numbers are those of
linux/netlink.h, linux/rtnetlink.h, linux/if_link.h and linux/veth.h.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct
from collections.abc import Iterator
from typing import Any, Self

from jailmgr.errors import JailmgrError
from jailmgr.runtime.syscalls import CLONE_NEWNET, setns

AF_NETLINK, SOCK_RAW, SOCK_CLOEXEC = 16, 3, 0o2000000
NETLINK_ROUTE, SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 0, 270, 10, 11
AF_INET, AF_BRIDGE, AF_INET6 = 2, 7, 10

NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x1, 0x4, 0x100, 0x200, 0x400
NLM_F_DUMP, NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x300, 0x100, 0x200
NLMSG_ERROR, NLMSG_DONE, NLMSGERR_ATTR_MSG = 2, 3, 1
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_GETADDR, RTM_NEWROUTE, RTM_GETROUTE, RTM_NEWNEIGH = 20, 22, 24, 26, 28
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO, IFLA_STATS64 = 1, 3, 4, 10, 18, 23
IFLA_AF_SPEC, IFLA_NET_NS_FD, IFLA_NUM_TX_QUEUES, IFLA_NUM_RX_QUEUES = 26, 28, 31, 32
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA, VETH_INFO_PEER = 1, 2, 4, 5, 1
IFLA_BRPORT_MODE, IFLA_BRPORT_LEARNING, IFLA_BRPORT_UNICAST_FLOOD = 4, 8, 9
NDA_LLADDR, NUD_NOARP, NTF_MASTER, NTF_STICKY = 2, 0x40, 0x04, 0x40
IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE = 8, 1
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_F_NODAD, IFA_F_PERMANENT = 1, 2, 4, 0x02, 0x80
RTA_DST, RTA_OIF, RTA_GATEWAY, RT_TABLE_MAIN, RTPROT_BOOT, RTN_UNICAST = 1, 4, 5, 254, 3, 1
RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER = 36, 37, 44
TCA_KIND, TCA_OPTIONS, TCA_BPF_OPS_LEN, TCA_BPF_OPS, TCA_BPF_FLAGS, BPF_ACT_DIRECT = 1, 2, 4, 5, 8, 1
CLSACT, CLSACT_HANDLE, CLSACT_INGRESS = 0xFFFFFFF1, 0xFFFF0000, 0xFFFFFFF2
ETH_P_IP, TC_ACT_SHOT, TC_ACT_UNSPEC = 0x0800, 2, 0xFFFFFFFF
SCOPE_UNIVERSE, SCOPE_LINK, IFF_UP, IFF_NOARP, LOOPBACK_INDEX = 0, 253, 1, 0x80, 1

NOT_TO_LOOPBACK = [
    (0x28, 0, 0, 12),  # ldh [12]: the frame's type
    (0x15, 0, 3, ETH_P_IP),
    (0x30, 0, 0, 30),  # ldb [30]: first byte of the destination
    (0x15, 0, 1, 127),
    (0x06, 0, 0, TC_ACT_SHOT),
    (0x06, 0, 0, TC_ACT_UNSPEC),
]
"""Classic BPF (linux/filter.h: code, jt, jf, k): not every kernel's traffic control has a `drop` action."""


def attach(nic: dict[str, Any], netns_fd: int) -> None:
    """Gives the network namespace `netns_fd` the interface `nic`: up, with addresses and routes, on its bridge.

    `nic`: name (in the jail), veth (the host's end), bridge, mac, mtu, addresses (`10.1.2.3/24`, `fd..::3/64`),
    gateways (`10.1.2.1`, `fd..::1`). A host's end left over from an earlier start is deleted first.
    Raises JailmgrError; no interface is left then. Safe in a process with threads: setns(2) moves one only.
    """
    veth = str(nic["veth"])
    try:
        with RouteSocket() as here:
            try:
                _create(here, nic, netns_fd)
                _raise_port(here, veth, str(nic["mac"]))
                with netns_socket(netns_fd) as there:
                    _configure(there, nic)
            except OSError:
                _delete(here, veth)
                raise
    except OSError as error:
        raise JailmgrError(
            f"interface {veth}", error.strerror or str(error), "`jailmgr doctor` tells what is missing."
        ) from error


def detach(veth: str) -> None:
    """Deletes a veth pair by its host's end; fine where it is gone. Raises JailmgrError."""
    try:
        with RouteSocket() as here:
            _delete(here, veth)
    except OSError as error:
        raise JailmgrError(f"interface {veth}", error.strerror or str(error)) from error


def detach_index(index: int) -> None:
    """The same by its index, which no other link ever gets."""
    try:
        with RouteSocket() as here:
            _delete(here, "", index)
    except OSError as error:
        raise JailmgrError(f"interface {index}", error.strerror or str(error)) from error


def index_of(veth: str) -> int:
    """Index of an interface; 0 where there is none."""
    try:
        return _socket.if_nametoindex(veth)
    except OSError:
        return 0


def counters(veth: str) -> tuple[int, int]:
    """Bytes the jail has received and sent, by the host's end of its veth pair; (0, 0) where there is none."""
    return find_counters(veth) or (0, 0)


def find_counters(veth: str) -> tuple[int, int] | None:
    """The same; None where there is none. Raises JailmgrError."""
    try:
        with RouteSocket() as here:
            (reply,) = here.ask(message(RTM_GETLINK, 0, ifinfomsg() + _name(veth)))
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise JailmgrError(f"interface {veth}", error.strerror or str(error)) from error
    return _counters(reply)[1]


def link_counters(prefix: str) -> dict[str, tuple[int, int]]:
    """`counters` of every interface whose name begins so, by name: one dump, however many there are.

    Raises JailmgrError.
    """
    try:
        with RouteSocket() as here:
            replies = here.ask(message(RTM_GETLINK, NLM_F_DUMP, ifinfomsg()))
    except OSError as error:
        raise JailmgrError("interfaces", error.strerror or str(error)) from error
    found = (_counters(reply, prefix) for reply in replies)
    return {name: counted for name, counted in found if counted is not None}


def _counters(link: bytes, prefix: str = "") -> tuple[str, tuple[int, int] | None]:
    """Name of a link, and where that begins with `prefix`, what has gone out and come in at it, in bytes."""
    name = ""
    for kind, value in attributes(link[16:]):
        if kind == IFLA_IFNAME:
            name = value.rstrip(b"\0").decode(errors="replace")
            if not name.startswith(prefix):
                break
        elif kind == IFLA_STATS64:
            _, _, received, sent = struct.unpack_from("=4Q", value)
            return name, (sent, received)
    return name, None


class NetlinkSocket(_socket.socket):
    """A netlink(7) socket in the network namespace of the calling thread; it stays there wherever the thread goes."""

    def __init__(self, family: int) -> None:
        super().__init__(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, family)
        self.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, *messages: bytes) -> list[bytes]:
        """Sends messages in one go and waits for the kernel's word on each; returns the bodies of what else it sent.

        Raises OSError for the first one refused, with the kernel's own words (extended ack) where it gave some.
        The others have been carried out all the same.
        """
        numbered = [
            struct.pack("=IHHII", len(m), *struct.unpack_from("=HH", m, 4), n, 0) + m[16:]
            for n, m in enumerate(messages, 1)
        ]
        self.sendall(b"".join(numbered))
        replies: list[bytes] = []
        refused: OSError | None = None
        waiting = len(messages)
        while waiting:
            buffer = self.recv(65536)
            while len(buffer) >= 16:
                length, kind, flags, _, _ = struct.unpack_from("=IHHII", buffer)
                if kind in {NLMSG_ERROR, NLMSG_DONE}:
                    waiting -= 1
                    refused = refused or _error(buffer[16:length], flags)
                else:
                    replies.append(buffer[16:length])
                buffer = buffer[length + 3 & ~3 :]
        if refused is not None:
            raise refused
        return replies


class RouteSocket(NetlinkSocket):
    """An rtnetlink(7) socket."""

    def __init__(self) -> None:
        super().__init__(NETLINK_ROUTE)


def routes(family: int = AF_INET) -> Iterator[tuple[str, int, int]]:
    """Every route of this network namespace, in all tables, as (network, prefix length, interface's index).

    Its own addresses are among them (table `local`); the index is 0 for a route without a single interface.
    """
    with RouteSocket() as here:
        replies = here.ask(message(RTM_GETROUTE, NLM_F_DUMP, struct.pack("=8BI", family, *bytes(7), 0)))
    for reply in replies:
        said = dict(attributes(reply[12:]))
        index = struct.unpack("=i", said[RTA_OIF])[0] if RTA_OIF in said else 0
        destination = said.get(RTA_DST, bytes(4 if family == AF_INET else 16))
        yield _socket.inet_ntop(family, destination), reply[1], index


def addresses(interface: str) -> tuple[bool, set[str]]:
    """Whether an interface is up, and its addresses, as `10.1.2.1/24`; False and none where it is not there."""
    with RouteSocket() as here:
        try:
            (link,) = here.ask(message(RTM_GETLINK, 0, ifinfomsg() + _name(interface)))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False, set()
            raise
        index, flags = struct.unpack_from("=iI", link, 4)
        found = here.ask(message(RTM_GETADDR, NLM_F_DUMP, struct.pack("=BBBBI", 0, 0, 0, 0, 0)))
    return bool(flags & IFF_UP), {
        f"{_socket.inet_ntop(reply[0], dict(attributes(reply[8:]))[IFA_ADDRESS])}/{reply[1]}"
        for reply in found
        if struct.unpack_from("=I", reply, 4)[0] == index
    }


def own_addresses() -> set[str]:
    """Return all addresses of this network namespace, without prefix length. Raises OSError."""
    with RouteSocket() as here:
        found = here.ask(message(RTM_GETADDR, NLM_F_DUMP, struct.pack("=BBBBI", 0, 0, 0, 0, 0)))
    said = [(reply[0], dict(attributes(reply[8:]))) for reply in found]
    # A point-to-point link has its peer's address as IFA_ADDRESS.
    return {_socket.inet_ntop(family, each.get(IFA_LOCAL, each[IFA_ADDRESS])) for family, each in said}


def mtu(index: int) -> int:
    """MTU of an interface, in bytes. Raises OSError."""
    with RouteSocket() as here:
        (link,) = here.ask(message(RTM_GETLINK, 0, ifinfomsg(index)))
    (found,) = struct.unpack("=I", dict(attributes(link[16:]))[IFLA_MTU])
    return int(found)


def interface_name(index: int) -> str:
    """Name of an interface of this network namespace. Raises OSError."""
    return _socket.if_indextoname(index)


def netns_socket(netns_fd: int) -> RouteSocket:
    """An rtnetlink socket inside of another network namespace. Raises OSError.

    Only the calling thread goes there (setns(2)) and it is back at the end, or the process dies.
    """
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(netns_fd, CLONE_NEWNET)
        try:
            return RouteSocket()
        finally:
            try:
                setns(own, CLONE_NEWNET)
            except OSError:
                # Going on would do the host's work in a guest's network.
                os.abort()
    finally:
        os.close(own)


def link_local(mac: str) -> str:
    """The IPv6 link-local address of a MAC (RFC 4291, appendix A: modified EUI-64)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return _socket.inet_ntop(
        AF_INET6, b"\xfe\x80" + bytes(6) + bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    )


def _create(here: RouteSocket, nic: dict[str, Any], netns_fd: int) -> None:
    """The pair in one message, its far end where it belongs from the start; both down."""
    veth, mtu = str(nic["veth"]), attribute(IFLA_MTU, struct.pack("=I", int(nic["mtu"])))
    # As many queues as CPUs, the default, cost memory for each jail and bring nothing without XDP.
    queues = attribute(IFLA_NUM_TX_QUEUES, b"\1\0\0\0") + attribute(IFLA_NUM_RX_QUEUES, b"\1\0\0\0")
    peer = _name(str(nic["name"])) + mtu + queues + attribute(IFLA_NET_NS_FD, struct.pack("=I", netns_fd))
    peer += attribute(IFLA_ADDRESS, bytes.fromhex(str(nic["mac"]).replace(":", "")))
    kind = attribute(IFLA_INFO_KIND, b"veth") + attribute(
        IFLA_INFO_DATA | NLA_F_NESTED, attribute(VETH_INFO_PEER | NLA_F_NESTED, ifinfomsg() + peer)
    )
    bridge = attribute(IFLA_MASTER, struct.pack("=I", _socket.if_nametoindex(str(nic["bridge"]))))
    create = message(
        RTM_NEWLINK,
        NLM_F_CREATE | NLM_F_EXCL,
        ifinfomsg() + _name(veth) + mtu + queues + bridge + attribute(IFLA_LINKINFO | NLA_F_NESTED, kind),
    )
    try:
        here.ask(create)
    except FileExistsError:
        _delete(here, veth)
        here.ask(create)


def _raise_port(here: RouteSocket, veth: str, mac: str) -> None:
    """Set the host's end up, without IPv6 of its own: the address mode first, since going up makes an address."""
    index = _socket.if_nametoindex(veth)
    mode = attribute(IFLA_INET6_ADDR_GEN_MODE, bytes([IN6_ADDR_GEN_MODE_NONE]))
    spec = attribute(IFLA_AF_SPEC | NLA_F_NESTED, attribute(AF_INET6 | NLA_F_NESTED, mode))
    here.ask(_port_options(index, spec), _own_address(index, mac))
    guard_loopback(here, index)
    here.ask(message(RTM_SETLINK, 0, ifinfomsg(index, IFF_UP)))


def hold_port(veth: str, mac: str) -> None:
    """Give a port that is up the options and the entry that `attach` gives a new one. Idempotent.

    An older release's supervisor attached it. Fine where there is no such veth. Raises JailmgrError.
    """
    index = index_of(veth)
    if not index:
        return
    try:
        with RouteSocket() as here:
            here.ask(_own_address(index, mac), _port_options(index))
    except OSError as error:
        # The veth has gone with its jail, or its bridge has been deleted.
        if error.errno not in {errno.ENODEV, errno.EOPNOTSUPP}:
            raise JailmgrError(f"interface {veth}", error.strerror or str(error)) from error


def _port_options(index: int, more: bytes = b"") -> bytes:
    """RTM_NEWLINK for a bridge port that learns no address, sends no frame for an unknown one, and answers no ARP.

    Frames to 01:80:c2:00:00:0X meet no rule (br_handle_frame of net/bridge). The bridge learns from them, so a jail
    could take its neighbour's address or fill the host's memory with made-up ones. They also go up to the host by the
    port itself: ARP would make the host know neighbours. network/rules.py drops IP packets that come this way.

    A frame may go back by the port it came from (`hairpin`): with br_netfilter on, the bridge itself turns a packet for
    a published port to the jail, also that jail's own packet. The rules drop a multicast frame that would go back.
    """
    options = attribute(IFLA_BRPORT_MODE, b"\1")
    options += attribute(IFLA_BRPORT_LEARNING, b"\0") + attribute(IFLA_BRPORT_UNICAST_FLOOD, b"\0")
    kind = attribute(IFLA_INFO_SLAVE_KIND, b"bridge") + attribute(IFLA_INFO_SLAVE_DATA | NLA_F_NESTED, options)
    body = ifinfomsg(index, IFF_NOARP) + attribute(IFLA_LINKINFO | NLA_F_NESTED, kind) + more
    return message(RTM_NEWLINK, 0, body)


def _own_address(index: int, mac: str) -> bytes:
    """RTM_NEWNEIGH of the one address behind a bridge port: static and sticky, so no other port can take it over."""
    # struct ndmsg. NUD_PERMANENT would make it an address of the bridge itself.
    header = struct.pack("=BxxxiHBB", AF_BRIDGE, index, NUD_NOARP, NTF_MASTER | NTF_STICKY, 0)
    address = attribute(NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
    return message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, header + address)


def guard_loopback(here: RouteSocket, index: int) -> bool:
    """Drops what comes in by an interface for the host's own 127.0.0.0/8 (tc-bpf(8)); False where the kernel can't.

    Bridges may have `route_localnet` (network/bridge.py), and nftables may be flushed by anybody.
    """
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in NOT_TO_LOOPBACK)
    options = attribute(TCA_BPF_OPS_LEN, struct.pack("=H", len(NOT_TO_LOOPBACK)))
    options += attribute(TCA_BPF_OPS, program) + attribute(TCA_BPF_FLAGS, struct.pack("=I", BPF_ACT_DIRECT))
    where = 1 << 16 | _socket.htons(ETH_P_IP)
    try:
        here.ask(
            message(RTM_NEWQDISC, NLM_F_CREATE, tcmsg(index, CLSACT_HANDLE, CLSACT, 0, b"clsact")),
            message(
                RTM_NEWTFILTER,
                NLM_F_CREATE,
                tcmsg(index, 1, CLSACT_INGRESS, where, b"bpf") + attribute(TCA_OPTIONS, options),
            ),
        )
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL}:
            return False
        raise
    return True


def unguard_loopback(here: RouteSocket, index: int) -> None:
    """Takes `guard_loopback` back. Raises OSError."""
    here.ask(message(RTM_DELQDISC, 0, tcmsg(index, CLSACT_HANDLE, CLSACT, 0, b"clsact")))


def _configure(there: RouteSocket, nic: dict[str, Any]) -> None:
    """Loopback and interface up, addresses, default routes, in the namespace of `there`."""
    (reply,) = there.ask(message(RTM_GETLINK, 0, ifinfomsg() + _name(str(nic["name"]))))
    (index,) = struct.unpack_from("=i", reply, 4)
    addresses = [*map(str, nic["addresses"]), f"{link_local(str(nic['mac']))}/64"]
    there.ask(
        message(RTM_NEWLINK, 0, ifinfomsg(LOOPBACK_INDEX, IFF_UP)),
        *(_address(index, address) for address in addresses),
        message(RTM_NEWLINK, 0, ifinfomsg(index, IFF_UP)),
        *(_route(index, str(gateway)) for gateway in nic["gateways"]),
    )


def _address(index: int, address: str) -> bytes:
    """RTM_NEWADDR of `10.1.2.3/24` or `fd00::3/64`. No DAD: no other port may use it, and it would cost a second."""
    text, _, length = address.partition("/")
    family = AF_INET6 if ":" in text else AF_INET
    packed, bits = _socket.inet_pton(family, text), int(length)
    scope = SCOPE_LINK if packed[:2] == b"\xfe\x80" and family == AF_INET6 else SCOPE_UNIVERSE
    header = struct.pack("=BBBBI", family, bits, IFA_F_NODAD | IFA_F_PERMANENT, scope, index)
    body = attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)
    if family == AF_INET and bits < 31:
        broadcast = int.from_bytes(packed, "big") | (1 << 32 - bits) - 1
        body += attribute(IFA_BROADCAST, broadcast.to_bytes(4, "big"))
    return message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, header + body)


def _route(index: int, gateway: str) -> bytes:
    """RTM_NEWROUTE of a default route."""
    family = AF_INET6 if ":" in gateway else AF_INET
    header = struct.pack("=8BI", family, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, SCOPE_UNIVERSE, RTN_UNICAST, 0)
    body = attribute(RTA_GATEWAY, _socket.inet_pton(family, gateway))
    body += attribute(RTA_OIF, struct.pack("=i", index))
    return message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, header + body)


def _delete(here: RouteSocket, veth: str, index: int = 0) -> None:
    try:
        here.ask(message(RTM_DELLINK, 0, ifinfomsg(index) + (b"" if index else _name(veth))))
    except OSError as error:
        # The kernel may have taken it along with its peer's namespace, between a look and now.
        if error.errno != errno.ENODEV:
            raise


def message(kind: int, flags: int, body: bytes) -> bytes:
    """struct nlmsghdr and body; `ask` fills in the sequence number."""
    return struct.pack("=IHHII", 16 + len(body), kind, flags | NLM_F_REQUEST | NLM_F_ACK, 0, 0) + body


def ifinfomsg(index: int = 0, flags: int = 0) -> bytes:
    """struct ifinfomsg; `flags` (IFF_…) are set, and no others changed."""
    return struct.pack("=BxHiII", 0, 0, index, flags, flags)


def tcmsg(index: int, handle: int, parent: int, info: int, kind: bytes) -> bytes:
    """struct tcmsg and TCA_KIND; `info` is of filters: preference << 16 | protocol in network order."""
    return struct.pack("=BxxxiIII", 0, index, handle, parent, info) + attribute(TCA_KIND, kind + b"\0")


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _name(name: str) -> bytes:
    return attribute(IFLA_IFNAME, name.encode() + b"\0")


def attributes(buffer: bytes) -> Iterator[tuple[int, bytes]]:
    while len(buffer) >= 4:
        length, kind = struct.unpack_from("=HH", buffer)
        yield kind & NLA_TYPE_MASK, buffer[4:length]
        buffer = buffer[length + 3 & ~3 :] if length >= 4 else b""


def _error(body: bytes, flags: int) -> OSError | None:
    """What NLMSG_ERROR says: None for an ack."""
    (number,) = struct.unpack_from("=i", body)
    if number == 0:
        return None
    why = os.strerror(-number)
    if flags & NLM_F_ACK_TLVS and len(body) >= 20:
        # Capped: the refused message's header follows the number, and nothing of its body.
        said = dict(attributes(body[20:] if flags & NLM_F_CAPPED else body[4 + struct.unpack_from("=I", body, 4)[0] :]))
        if NLMSGERR_ATTR_MSG in said:
            why += f" ({said[NLMSGERR_ATTR_MSG].rstrip(bytes(1)).decode(errors='replace')})"
    return OSError(-number, why)
