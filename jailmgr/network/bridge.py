"""Bridges of networks, and what the host needs to route for them.

pyroute2 is imported where a bridge is made, and not before: it costs 300 ms and 22 MiB.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os
from jailmgr.model import Network
from jailmgr.network.addresses import bridge_mac
from jailmgr.runtime import netlink

IPV4, IPV6 = "/proc/sys/net/ipv4", "/proc/sys/net/ipv6"
MTU_MIN, MTU_MAX = 1280, 1500
IFLA_GROUP, IFLA_BR_MULTI_BOOLOPT, IFLA_BR_FDB_MAX_LEARNED, BR_BOOLOPT_NO_LL_LEARN = 27, 46, 49, 0
"""Of linux/if_link.h and linux/if_bridge.h: pyroute2 knows the first only."""
LEARNED_MAX = 256
"""Addresses that a bridge may learn. Ports of jails learn none: this is for a port that somebody else adds."""
ROOM = {
    "net.ipv4.neigh.default.gc_thresh2": 4096,
    "net.ipv4.neigh.default.gc_thresh3": 8192,
    "net.ipv6.neigh.default.gc_thresh2": 4096,
    "net.ipv6.neigh.default.gc_thresh3": 8192,
    "net.netfilter.nf_conntrack_max": 131_072,
}
"""Least values of the sysctls that bound tables which all jails share: neighbours and connections.

A jail and its gateway take two neighbours in each family's table, which is one for all network namespaces.
"""
GROUPS = 0x6A6D0000
"""The bridges of a tenant are a device group (ip-link(8)): this number plus the tenant's id. Admins use low numbers."""


def bridge_name(root: Root, network_id: int) -> str:
    return f"{root.link_prefix}b{network_id:x}"


def veth_name(root: Root, jail_id: int) -> str:
    """The host's end of a jail's first interface."""
    return f"{root.link_prefix}v{jail_id:x}"


def tenant_group(tenant_id: int) -> int:
    """Return the device group of a tenant's bridges."""
    return GROUPS + tenant_id


def ensure_network(root: Root, network: Network, group: int = 0) -> None:
    """Make a network's bridge as it should be: up, with its addresses, in its tenant's group; let the host forward.

    Idempotent, and cheap where all is there. Raises JailmgrError.
    """
    name = bridge_name(root, network.id)
    wanted = {network.ipv4, network.ipv6}
    try:
        _forward()
        up, there = netlink.addresses(name)
        if not up or not wanted <= there or _foreign(there, wanted):
            _make(name, bridge_mac(root, network.id), wanted)
        _set_options(name, group)
    except OSError as error:
        raise from_os(f"network {network.name}", error) from error


def make_room(proc: str = "/proc/sys") -> None:
    """Raise the sysctls of ROOM that are lower, until the host boots. They stay as they are where they can't be set."""
    for name, least in ROOM.items():
        path = f"{proc}/{name.replace('.', '/')}"
        value = _read(path)
        if value.isdigit() and int(value) < least:
            # /proc/sys may be read-only, and the sysctls of all network namespaces belong to the first one.
            with contextlib.suppress(OSError):
                Path(path).write_text(str(least))


def remove_network(root: Root, network: Network) -> None:
    """Deletes a network's bridge; fine where there is none. Raises JailmgrError."""
    remove_bridge(root, bridge_name(root, network.id))


def remove_bridge(root: Root, name: str) -> None:
    """Deletes a bridge that `list_bridges` told. Raises JailmgrError."""
    if not name.startswith(f"{root.link_prefix}b"):
        raise JailmgrError(f"bridge {name}", "not one of this instance", code="invalid")
    netlink.detach(name)


def list_bridges(root: Root) -> list[str]:
    """Bridges of this instance: of its prefix, and of that kind."""
    return _list(f"{root.link_prefix}b", "bridge")


def list_veths(root: Root) -> list[str]:
    """Host's ends of veth pairs of this instance."""
    return _list(f"{root.link_prefix}v", "veth")


def list_ifbs(root: Root) -> list[str]:
    """The devices of this instance that have tenants' queues (shaping.py)."""
    return [name for letter in "ei" for name in _list(f"{root.link_prefix}{letter}", "ifb")]


def uplink_mtu() -> int:
    """The MTU for jails: that of the host's way out, from 1280 (RFC 8200, 5) to 1500; 1500 where it has none.

    A jail with a larger one would rest on ICMP getting through to it.
    """
    try:
        ways = [index for _, length, index in netlink.routes() if length == 0 and index]
        return max(MTU_MIN, min([MTU_MAX, *map(netlink.mtu, ways)]))
    except OSError as error:
        raise from_os("network", error) from error


def _forward() -> None:
    """Switches forwarding on. A host that takes router advertisements goes on to do so (ip-sysctl: accept_ra=2)."""
    _write(f"{IPV4}/ip_forward", "1")
    if _read(f"{IPV6}/conf/all/forwarding") == "0":
        for interface in [*Path(f"{IPV6}/conf").iterdir()]:
            if _read(f"{interface}/accept_ra") == "1" and interface.name != "all":
                _write(f"{interface}/accept_ra", "2")
        _write(f"{IPV6}/conf/all/forwarding", "1")


def _make(name: str, mac: str, wanted: set[str]) -> None:
    with _iproute() as route:
        if not route.link_lookup(ifname=name):
            route.link(
                "add",
                ifname=name,
                kind="bridge",
                address=mac,
                br_stp_state=0,
                br_forward_delay=0,
                # Without a querier on the link, snooping drops what neighbour discovery needs (RFC 4541, 3).
                br_mcast_snooping=0,
            )
        (index,) = route.link_lookup(ifname=name)
        _settings(name)
        _let_loopback(name)
        _, there = netlink.addresses(name)
        for address in wanted - there:
            own = ipaddress.ip_interface(address)
            with contextlib.suppress(FileExistsError):
                # No DAD: the address must be there for dnsmasq at once, and no port may use it.
                flags = {"flags": netlink.IFA_F_NODAD} if own.version == 6 else {}
                route.addr("add", index=index, address=str(own.ip), prefixlen=own.network.prefixlen, **flags)
        for address in _foreign(there, wanted):
            own = ipaddress.ip_interface(address)
            route.addr("del", index=index, address=str(own.ip), prefixlen=own.network.prefixlen)
        route.link("set", index=index, state="up")


def _set_options(name: str, group: int) -> None:
    """Set a bridge's group, and bound its table of addresses. An older release's bridge gets them by this, too.

    A bridge learns from frames to 01:80:c2:00:00:0X before any rule sees them, unless it is asked not to (since Linux
    4.20). The bound is of Linux 6.7; older kernels ignore an attribute that they don't know.
    """
    # struct br_boolopt_multi: values, and which of them are meant.
    no_link_local = struct.pack("=II", 1 << BR_BOOLOPT_NO_LL_LEARN, 1 << BR_BOOLOPT_NO_LL_LEARN)
    options = netlink.attribute(IFLA_BR_MULTI_BOOLOPT, no_link_local)
    options += netlink.attribute(IFLA_BR_FDB_MAX_LEARNED, struct.pack("=I", LEARNED_MAX))
    kind = netlink.attribute(netlink.IFLA_INFO_KIND, b"bridge")
    kind += netlink.attribute(netlink.IFLA_INFO_DATA | netlink.NLA_F_NESTED, options)
    link = netlink.ifinfomsg(socket.if_nametoindex(name)) + netlink.attribute(IFLA_GROUP, struct.pack("=I", group))
    with netlink.RouteSocket() as here:
        link += netlink.attribute(netlink.IFLA_LINKINFO | netlink.NLA_F_NESTED, kind)
        here.ask(netlink.message(netlink.RTM_NEWLINK, 0, link))


def _settings(name: str) -> None:
    """Nothing a jail sends changes the host's own routes, and none is told of a shorter way."""
    for path, value in (
        (f"{IPV4}/conf/{name}/accept_redirects", "0"),
        (f"{IPV4}/conf/{name}/send_redirects", "0"),
        (f"{IPV6}/conf/{name}/accept_ra", "0"),
        (f"{IPV6}/conf/{name}/accept_redirects", "0"),
        (f"{IPV6}/conf/{name}/accept_dad", "0"),
        (f"{IPV6}/conf/{name}/disable_ipv6", "0"),
    ):
        _write(path, value)


def _let_loopback(name: str) -> None:
    """Lets connections to a port published on the host's 127.0.0.1 leave by this bridge (ip-sysctl: route_localnet).

    That alone would let jails reach all that listens on 127.0.0.1 (CVE-2020-8558): only where the kernel has the filter
    that netlink.attach puts on each port. There and not on the bridge, which br_netfilter hands packets whose address
    has been translated back. IPv6 has no such switch: ::1 can't be led to a jail.
    """
    with netlink.RouteSocket() as here:
        index = socket.if_nametoindex(name)
        if netlink.guard_loopback(here, index):
            netlink.unguard_loopback(here, index)
            _write(f"{IPV4}/conf/{name}/route_localnet", "1")


def _foreign(there: set[str], wanted: set[str]) -> set[str]:
    """Addresses of an earlier network of this id."""
    return {address for address in there - wanted if not address.startswith("fe80:")}


def _list(prefix: str, kind: str) -> list[str]:
    try:
        if not any(name.startswith(prefix) for _, name in socket.if_nameindex()):
            return []
        with _iproute() as route:
            names = [link.get_attr("IFLA_IFNAME") for link in route.get_links(kind=kind)]
    except OSError as error:
        raise from_os("network", error) from error
    return sorted(name for name in names if name.startswith(prefix))


@contextlib.contextmanager
def _iproute() -> Iterator[Any]:
    """pyroute2's rtnetlink, its errors as OSError."""
    pyroute2: Any = importlib.import_module("pyroute2")
    try:
        with pyroute2.IPRoute() as route:
            yield route
    except pyroute2.NetlinkError as error:
        raise OSError(error.code, str(error.args[-1])) from error


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except FileNotFoundError:
        return ""


def _write(path: str, value: str) -> None:
    """Sets a sysctl where it isn't set yet: /proc/sys may be read-only, and right all the same."""
    if _read(path) != value:
        with contextlib.suppress(FileNotFoundError):
            Path(path).write_text(value)
