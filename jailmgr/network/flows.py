"""Delete flows whose NAT outlives the rule that made it.

A flow's first packet alone meets the NAT rules, and a UDP flow lives as long as somebody sends. Without this module:
a client reaches a jail after its port was unpublished, or was published for another jail; a client that sent before
its port was published does not reach the jail; a stranger's answers reach the next owner of a jail's address.

The table is the whole host's. A flow is deleted only if it leads to or from an address of our networks, or was sent to
the host itself, at a port that is published. Established TCP connections stay while their jail runs.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from socket import AF_INET, AF_INET6
from typing import NamedTuple

from jailmgr.errors import from_os
from jailmgr.model import Network, Nic, Port
from jailmgr.network import conntrack
from jailmgr.network.conntrack import IPS_DST_NAT, IPS_SRC_NAT, PROTOCOLS, Filter, Flow, family_of
from jailmgr.runtime import netlink

DNS = 53


class _Way(NamedTuple):
    """A published port: where packets of one family come in, and where they lead. `host`: empty for all addresses."""

    host: bytes
    protocol: int
    port: int
    leads_to: bytes
    leads_port: int

    def filter(self) -> Filter:
        family = family_of(self.leads_to)
        return Filter(family, destination=self.host, protocol=self.protocol, port=self.port)

    def is_for(self, flow: Flow) -> bool:
        same = (self.protocol, self.port, len(self.leads_to)) == (flow.protocol, flow.port, len(flow.leads_to))
        return same and self.host in (b"", flow.destination)


class Subnets:
    """The addresses of networks, looked up by one test for each prefix length, however many networks there are."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self.bridges: set[bytes] = set()
        self._by_size: dict[tuple[int, int], set[int]] = {}
        for network in networks:
            for own in (ipaddress.ip_interface(network.ipv4), ipaddress.ip_interface(network.ipv6)):
                self.bridges.add(own.packed)
                shift = own.max_prefixlen - own.network.prefixlen
                self._by_size.setdefault((len(own.packed), shift), set()).add(int(own) >> shift)

    def __contains__(self, address: bytes) -> bool:
        number, size = int.from_bytes(address, "big"), len(address)
        return any(size == length and number >> shift in known for (length, shift), known in self._by_size.items())


def unpublish(published: Iterable[tuple[Port, Nic]]) -> None:
    """End flows that these ports led to their jails, once no rule does so any more. Raises JailmgrError."""
    ways = [way for port, nic in published for way in _ways(port, nic)]
    found = conntrack.find([way.filter()._replace(leads_to=way.leads_to) for way in ways]) if ways else []
    _delete(flow for flow in found if flow.translated and not flow.open)


def publish(published: Iterable[tuple[Port, Nic]], subnets: Subnets) -> None:
    """End flows to these ports that lead elsewhere, once rules lead the ports to their jails. Raises JailmgrError.

    They began before the port was published, or as it led to another jail.
    """
    ways = [way for port, nic in published for way in _ways(port, nic)]
    found = conntrack.find([way.filter() for way in ways]) if ways else []
    _delete(_astray(found, ways, subnets))


def end(nics: Sequence[Nic], ended: Callable[[Nic], bool]) -> None:
    """End all flows of jails' addresses that pass NAT, TCP too, if `ended` still says so after they were listed.

    A jail that has been started meanwhile keeps its flows. Raises JailmgrError.
    """
    filters: list[Filter] = []
    for nic in nics:
        own = _packed(nic.ipv4)
        filters += [Filter(AF_INET, source=own), Filter(AF_INET, leads_to=own)]
        # The kernel has no filter by IPv6 address. Few hosts have NAT of IPv6 but ours.
        own = _packed(nic.ipv6)
        filters += [Filter(AF_INET6, IPS_SRC_NAT, source=own), Filter(AF_INET6, IPS_DST_NAT, leads_to=own)]
    if not filters or not (found := conntrack.find(filters)):
        return
    dead = {_packed(address) for nic in nics if ended(nic) for address in (nic.ipv4, nic.ipv6)}
    _delete(flow for flow in found if flow.source in dead or flow.leads_to in dead)


def settle(published: Iterable[tuple[Port, Nic]], subnets: Subnets, in_use: Callable[[], Iterable[str]]) -> None:
    """End all flows that no published port leads, or of addresses that no running jail has. Raises JailmgrError.

    For rules that have been made anew: how long others held is unknown. `in_use`, the addresses of running jails, is
    called after the flows were listed: a jail that has been started meanwhile keeps its flows.
    """
    ways = [way for port, nic in published for way in _ways(port, nic)]
    translated = [Filter(status=IPS_SRC_NAT), Filter(status=IPS_DST_NAT)]
    found = conntrack.find([*translated, *(way.filter() for way in ways)])
    if not found:
        return
    addresses = {*map(_packed, in_use()), *subnets.bridges}
    dead = [
        flow
        for flow in found
        if any(address not in addresses and address in subnets for address in (flow.source, flow.leads_to))
    ]
    _delete({*dead, *_astray(found, ways, subnets)})


def _ways(port: Port, nic: Nic) -> list[_Way]:
    every = {"": (nic.ipv4, nic.ipv6), "0.0.0.0": (nic.ipv4,), "::": (nic.ipv6,)}.get(port.host_address)
    protocol = PROTOCOLS[port.protocol]
    if every is not None:
        return [_Way(b"", protocol, port.host_port, _packed(address), port.port) for address in every]
    host = _packed(port.host_address)
    return [_Way(host, protocol, port.host_port, _packed(nic.ipv4 if len(host) == 4 else nic.ipv6), port.port)]


def _astray(found: Sequence[Flow], ways: Sequence[_Way], subnets: Subnets) -> list[Flow]:
    """Select flows that lead to an address of ours by no way, or to the host itself at a port of a way.

    A jail asks its bridge for names whoever has published port 53 (network/rules.py).
    """
    by_port: dict[tuple[int, int], list[_Way]] = {}
    for way in ways:
        by_port.setdefault((way.protocol, way.port), []).append(way)
    astray: list[Flow] = []
    own: set[bytes] | None = None
    for flow in found:
        if flow.open or flow.protocol not in PROTOCOLS.values():
            continue
        fit = [way for way in by_port.get((flow.protocol, flow.port), ()) if way.is_for(flow)]
        if flow.translated:
            right = any((flow.leads_to, flow.leads_port) == (way.leads_to, way.leads_port) for way in fit)
            if not right and flow.leads_to in subnets:
                astray.append(flow)
        elif fit and not (flow.port == DNS and flow.destination in subnets.bridges):
            own = _own_addresses() if own is None else own
            if flow.destination in own or (flow.destination[0] == 127 and len(flow.destination) == 4):
                astray.append(flow)
    return astray


def _own_addresses() -> set[bytes]:
    try:
        return set(map(_packed, netlink.own_addresses()))
    except OSError as error:
        raise from_os("addresses of the host", error) from error


def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def _delete(flows: Iterable[Flow]) -> None:
    chosen = [*flows]
    if chosen:
        conntrack.delete(chosen)
