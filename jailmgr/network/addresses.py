"""Which addresses a network and its jails have."""

from __future__ import annotations

import hashlib
import ipaddress
import os

from jailmgr import claims
from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.model import Network


def new_network(
    root: Root, network_id: int, tenant: str, name: str, ipv4: str | None = None, ipv6: str | None = None
) -> Network:
    """A network with addresses of its own: a free private /24 and a new ULA /64 (RFC 4193) where none are named.

    `ipv4` and `ipv6` are the bridge's, as `10.83.7.1/24`. The subnet is claimed under the network's id.
    Raises JailmgrError, `invalid` or `conflict`.
    """
    if ipv4 is None:
        subnet = ipaddress.IPv4Network(claims.claim_subnet(root, str(network_id)))
        own4 = ipaddress.IPv4Interface((subnet.network_address + 1, subnet.prefixlen))
    else:
        own4 = _interface4(ipv4)
        claims.claim_subnet(root, str(network_id), str(own4.network))
    own6 = _new_ula() if ipv6 is None else _interface6(ipv6)
    return Network(network_id, tenant, name, str(own4), str(own6))


def choose_address(network: Network, taken: set[str], wanted: str | None = None) -> tuple[str, str]:
    """IPv4 and IPv6 address for a jail, without prefix length; the IPv6 one ends in the IPv4 one's place in its subnet.

    `taken` holds the IPv4 addresses of the network's other jails. Raises JailmgrError: `invalid` for an address the
    network can't give, `conflict` for one in use, `full` where none is left.
    """
    own4, own6 = ipaddress.IPv4Interface(network.ipv4), ipaddress.IPv6Interface(network.ipv6)
    if wanted is None:
        used = {int(ipaddress.IPv4Address(address)) for address in taken} | {int(own4.ip)}
        first, last = int(own4.network.network_address) + 1, int(own4.network.broadcast_address) - 1
        chosen = next((number for number in range(first, last + 1) if number not in used), None)
        if chosen is None:
            raise JailmgrError(
                f"network {network.name}", f"all addresses of {own4.network} are in use", "Delete jails.", "full"
            )
        address = ipaddress.IPv4Address(chosen)
    else:
        address = _wanted(network, own4, wanted)
        if str(address) in taken:
            raise JailmgrError(f"address {address}", "another jail has it", "Choose another one.", "conflict")
    place = int(address) - int(own4.network.network_address)
    return str(address), str(own6.network.network_address + place)


def mac_for(root: Root, ipv4: str) -> str:
    """MAC of the interface with that address: locally administered, no two alike on a host.

    Made of the address, so that who gets a deleted jail's address has its MAC too: neighbours that still know the old
    one (arp(7)) would send it into the void for half a minute.
    """
    return (b"\x0a" + _digest(root)[:1] + ipaddress.IPv4Address(ipv4).packed).hex(":")


def bridge_mac(root: Root, network_id: int) -> str:
    """MAC of a network's bridge; a bridge left to itself takes over that of some port, and changes it."""
    return (b"\x0e" + _digest(root)[:2] + (network_id & 0xFFFFFF).to_bytes(3, "big")).hex(":")


def _digest(root: Root) -> bytes:
    return hashlib.sha256(root.at.encode()).digest()


def _wanted(network: Network, own: ipaddress.IPv4Interface, wanted: str) -> ipaddress.IPv4Address:
    first, last = own.network.network_address + 1, own.network.broadcast_address - 1
    hint = f"Network {network.name} gives {first} to {last}, and {own.ip} is its bridge's."
    try:
        address = ipaddress.IPv4Address(wanted)
    except ValueError as error:
        raise JailmgrError(f"address {wanted}", "not an IPv4 address", hint, "invalid") from error
    if not first <= address <= last or address == own.ip:
        raise JailmgrError(f"address {wanted}", f"not one for a jail in {own.network}", hint, "invalid")
    return address


def _interface4(text: str) -> ipaddress.IPv4Interface:
    hint = "Such as 10.83.7.1/24: the bridge's own address and the length of the subnet."
    try:
        own = ipaddress.IPv4Interface(text)
    except ValueError as error:
        raise JailmgrError(f"ipv4.address {text}", "not an address with its length", hint, "invalid") from error
    if "/" not in text or own.ip in {own.network.network_address, own.network.broadcast_address}:
        raise JailmgrError(f"ipv4.address {text}", "not an address a bridge can have", hint, "invalid")
    return own


def _interface6(text: str) -> ipaddress.IPv6Interface:
    hint = "Such as fd42:1:2:3::1/64: the bridge's own address and /64."
    try:
        own = ipaddress.IPv6Interface(text)
    except ValueError as error:
        raise JailmgrError(f"ipv6.address {text}", "not an address with its length", hint, "invalid") from error
    if own.network.prefixlen != 64 or not own.ip.is_private or own.ip.is_link_local or own.ip == own.network[0]:
        raise JailmgrError(f"ipv6.address {text}", "not a private address in a /64", hint, "invalid")
    return own


def _new_ula() -> ipaddress.IPv6Interface:
    """fd, 40 random bits, subnet 0 (RFC 4193, 3.2)."""
    return ipaddress.IPv6Interface((int.from_bytes(b"\xfd" + os.urandom(5) + bytes(9) + b"\1", "big"), 64))
