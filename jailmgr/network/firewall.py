"""What passes between jails, host and world: an instance's own nftables tables, `inet` and `bridge`.

rules.py holds the rules; here are the elements of their sets, which is all that a jail more or less changes.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os
from jailmgr.keys import CONNECTIONS
from jailmgr.model import Network, Nic, Port
from jailmgr.network import nft, rules
from jailmgr.network.bridge import bridge_name
from jailmgr.runtime.netlink import link_local

Element = tuple[str, str, Any]
"""Family of the table, name of the set or map, and the element as JSON has it."""


class Connections(NamedTuple):
    """Limits on connections: by a jail's veth, where it is not the default, and by a tenant's device group."""

    jails: Mapping[str, int] = {}
    tenants: Mapping[int, int] = {}


def apply_all(
    root: Root,
    networks: list[Network],
    nics: list[tuple[Network, Nic]],
    published: list[tuple[Port, Nic]],
    shaped: Collection[str] = (),
    connections: Connections = Connections(),  # noqa: B008
) -> None:
    """Makes both tables say this and no more; rules and elements in one transaction. Raises JailmgrError.

    `nics`: those of running jails, each with its network; `published`: their ports, each with the nic it leads to;
    `shaped`: the veths that `hold_to_queue` is for.
    """
    elements = [_bridge_element(root, network) for network in networks]
    for _, nic in nics:
        elements += _nic_elements(nic)
    for port, nic in published:
        elements += _port_elements(port, nic)
    elements += map(_shaped_element, shaped)
    state = rules.frame(root) + _commands("add", root, elements)
    wanted = {
        key: limit
        for _, nic in nics
        for key, limit in _limits(nic, connections.jails.get(nic.veth, CONNECTIONS)).items()
    }
    for group, limit in connections.tenants.items():
        wanted |= _tenant_limits(group, limit)

    def apply() -> None:
        nft.run_text(rules.declarations(root))
        _count(root, wanted)
        nft.run(state)

    try:
        apply()
    except nft.NftError as error:
        if not error.exists:
            raise
        # A set of the same name and of another type: the tables of an older version.
        remove_all(root)
        apply()


def add_jail(root: Root, network: Network, nic: Nic, published: list[Port], connections: int = CONNECTIONS) -> None:
    """Lets a jail's port speak, and publishes its ports. Idempotent.

    Raises JailmgrError; nft.NftError with `missing` where the tables are gone: `apply_all` brings them back.
    """
    elements = [_bridge_element(root, network), *_nic_elements(nic)]
    nft.run_text("\n".join(_counted_text("add", root, *each) for each in _limits(nic, connections).items()))
    for port in published:
        elements += _port_elements(port, nic)
    _add(root, elements)


def remove_jail(root: Root, nic: Nic, published: list[Port]) -> None:
    """Takes away what `add_jail` added; fine where it is gone. Raises JailmgrError."""
    elements = _nic_elements(nic)
    for port in published:
        elements += _port_elements(port, nic)
    limits = _limits(nic, CONNECTIONS)
    counted: list[Element] = [("inet", name, key) for name, key in limits]
    try:
        # As `_remove`, but what counts must not be added. One transaction: the kernel makes each that deletes wait.
        nft.run(_commands("add", root, elements) + _commands("delete", root, [*elements, *counted]))
    except nft.NftError:
        _remove(root, elements)
        _replace(root, limits, ("add", "delete"))


def limit_jail(root: Root, nic: Nic, connections: int) -> None:
    """Hold a jail to another number of connections, counted from now on.

    Raises JailmgrError; nft.NftError with `missing` where the tables are gone: `apply_all` brings them back.
    """
    _replace(root, _limits(nic, connections))


def limit_tenant(root: Root, group: int, connections: int | None) -> None:
    """Hold a tenant's jails together to another number of connections, counted from now on; None: to none.

    Raises JailmgrError; nft.NftError with `missing` where the tables are gone: `apply_all` brings them back.
    """
    if connections is None:
        _replace(root, _tenant_limits(group, 1), ("add", "delete"))
    else:
        _replace(root, _tenant_limits(group, connections))


def remove_network(root: Root, network: Network) -> None:
    """Forgets a network's bridge. Raises JailmgrError."""
    _remove(root, [_bridge_element(root, network)])


def publish(root: Root, port: Port, nic: Nic) -> None:
    """Leads a port of the host to a running jail. Idempotent. Raises JailmgrError."""
    _add(root, _port_elements(port, nic))


def unpublish(root: Root, port: Port, nic: Nic) -> None:
    """Connections that are open stay so. Fine where it is not published. Raises JailmgrError."""
    _remove(root, _port_elements(port, nic))


def hold_to_queue(root: Root, veths: Collection[str]) -> None:
    """Drops from now on what these ports bring that has not been in a queue of ours. Idempotent.

    Raises JailmgrError; nft.NftError with `missing` where the tables are gone: `apply_all` brings them back.
    """
    _add(root, list(map(_shaped_element, veths)))


def let_from_queue(root: Root, veths: Collection[str]) -> None:
    """Takes that back; fine where it wasn't done. Raises JailmgrError."""
    _remove(root, list(map(_shaped_element, veths)))


def remove_all(root: Root) -> None:
    """Deletes both tables; fine where they are gone. Raises JailmgrError."""
    tables = [{"table": {"family": family, "name": root.table}} for family in rules.CHAINS]
    nft.run([{verb: table} for table in tables for verb in ("add", "delete")])


def is_there(root: Root) -> bool:
    """Whether both tables are: `nft flush ruleset` takes away everybody's. Raises JailmgrError."""
    listed = [item["table"] for item in nft.run([{"list": {"tables": None}}]) if "table" in item]
    return {table["family"] for table in listed if table["name"] == root.table} >= set(rules.CHAINS)


def port_is_free(address: str, port: int, protocol: str) -> bool:
    """Whether no program of the host listens there; an empty address asks for all, IPv4 and IPv6.

    Raises JailmgrError (`invalid`) for an address the host doesn't have, or that can't be led to a jail.
    """
    what = f"port {port}/{protocol} on {address}"
    if address == "::1":
        raise JailmgrError(what, "the kernel leads nothing from ::1 to a jail", "Use 127.0.0.1.", "invalid")
    for host in [address] if address else ["0.0.0.0", "::"]:
        try:
            _bind(host, port, protocol)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            if address:
                why = error.strerror or str(error)
                raise JailmgrError(what, why, "`ip address` tells the host's addresses.", "invalid") from error
            # A host without IPv6 has nobody who listens there.
            if error.errno not in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:
                raise from_os(f"port {port}/{protocol}", error) from error
    return True


def _bind(host: str, port: int, protocol: str) -> None:
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as trial:
        if family == socket.AF_INET6:
            trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            # Connections that linger in TIME_WAIT don't count (tcp(7)); a listener still does.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind((host, port))


def _bridge_element(root: Root, network: Network) -> Element:
    name = bridge_name(root, network.id)
    return "inet", "bridges", {"concat": [name, name]}


def _nic_elements(nic: Nic) -> list[Element]:
    own6 = [nic.ipv6, link_local(nic.mac)]
    return [
        ("inet", "self_ipv4", {"concat": [nic.ipv4, nic.ipv4]}),
        ("inet", "self_ipv6", {"concat": [nic.ipv6, nic.ipv6]}),
        ("bridge", "back", {"concat": [nic.veth, nic.veth]}),
        ("bridge", "macs", {"concat": [nic.veth, nic.mac]}),
        ("bridge", "ipv4", {"concat": [nic.veth, nic.ipv4]}),
        *(("bridge", "ipv6", {"concat": [nic.veth, address]}) for address in own6),
        *(("bridge", "targets", {"concat": [nic.veth, hex(int(ipaddress.IPv6Address(address)))]}) for address in own6),
    ]


Counted = tuple[str, str | int]
"""One of rules.COUNTED, and a key in it."""


def _limits(nic: Nic, limit: int) -> dict[Counted, int]:
    return {("opened", nic.mac): limit, ("taken_ipv4", nic.ipv4): limit, ("taken_ipv6", nic.ipv6): limit}


def _tenant_limits(group: int, connections: int) -> dict[Counted, int]:
    return {("tenant_opened", group): connections, ("tenant_taken", group): connections}


def _counted_text(verb: str, root: Root, counted: Counted, limit: int) -> str:
    """Return a command that adds or deletes an element with a limit of its own, which JSON in nftables 1.0.6 ignores.

    No element may be added without one. The kernel then makes a copy of the set's own, and where the element is there
    already, it counts down by that copy how many need conntrack: at 0 it switches that off (nft_add_set_elem, 6.18).
    """
    name, key = counted
    more = f' ct count over {limit} comment "{limit}"' if verb == "add" else ""
    return f"{verb} element inet {root.table} {name} {{ {key}{more} }}"


def _replace(root: Root, limits: Mapping[Counted, int], verbs: Sequence[str] = ("add", "delete", "add")) -> None:
    """Add each element first: one that is not there can't be deleted. To delete is fine where the tables are gone."""
    commands = [_counted_text(verb, root, *each) for each in limits.items() for verb in verbs]
    try:
        nft.run_text("\n".join(commands))
    except nft.NftError as error:
        if not error.missing or verbs[-1] != "delete":
            raise


def _count(root: Root, wanted: Mapping[Counted, int]) -> None:
    """Make the sets of rules.COUNTED hold these elements and no others. An element that is right keeps its count."""
    there: dict[Counted, str | None] = {}
    for name in rules.COUNTED:
        listed = nft.run([{"list": {"set": {"family": "inet", "table": root.table, "name": name}}}])
        (found,) = [item["set"].get("elem", []) for item in listed if "set" in item]
        there |= {(name, each["elem"]["val"]): each["elem"].get("comment") for each in found}
    wrong = [key for key, limit in there.items() if str(wanted.get(key)) != limit]
    commands = [_counted_text("delete", root, key, 0) for key in wrong]
    commands += [
        _counted_text("add", root, key, limit) for key, limit in wanted.items() if there.get(key) != str(limit)
    ]
    if commands:
        nft.run_text("\n".join(commands))


def _shaped_element(veth: str) -> Element:
    return "bridge", "shaped", veth


def _port_elements(port: Port, nic: Nic) -> list[Element]:
    key, wild = [port.protocol, port.host_port], {"": (4, 6), "0.0.0.0": (4,), "::": (6,)}.get(port.host_address)
    ways = {4: {"concat": [nic.ipv4, port.port]}, 6: {"concat": [nic.ipv6, port.port]}}
    if wild is not None:
        return [("inet", f"any_ipv{version}", [{"concat": key}, ways[version]]) for version in wild]
    version = ipaddress.ip_address(port.host_address).version
    return [("inet", f"at_ipv{version}", [{"concat": [port.host_address, *key]}, ways[version]])]


def _add(root: Root, elements: list[Element]) -> None:
    try:
        nft.run(_commands("add", root, elements))
    except nft.NftError as error:
        if not error.exists:
            raise
        # A port that leads elsewhere: that of a jail whose removal was cut off.
        for element in elements:
            if element[:2] in rules.MAPS:
                _forget(root, element)
        nft.run(_commands("add", root, elements))


def _remove(root: Root, elements: list[Element]) -> None:
    try:
        # What isn't there can't be deleted, what is there can be added (nft(8)): the two together always do.
        nft.run(_commands("add", root, elements) + _commands("delete", root, elements))
    except nft.NftError as error:
        if error.missing:
            return
        if not error.exists:
            raise
        for element in elements:
            _forget(root, element)


def _forget(root: Root, element: Element) -> None:
    try:
        nft.run(_commands("delete", root, [element]))
    except nft.NftError as error:
        if not error.missing:
            raise


def _commands(verb: str, root: Root, elements: Iterable[Element]) -> list[dict[str, Any]]:
    by_set: dict[tuple[str, str], list[Any]] = {}
    for family, name, element in elements:
        # A map's element is deleted by its key, whatever it leads to.
        told = element[0] if verb == "delete" and isinstance(element, list) else element
        by_set.setdefault((family, name), []).append(told)
    return [
        {verb: {"element": {"family": family, "table": root.table, "name": name, "elem": told}}}
        for (family, name), told in by_set.items()
    ]
