"""The rules of an instance's two nftables tables, as data (libnftables-json(5)).

They are the same with one jail and with a thousand: jails are elements of the sets.
Each chain's first rules let go what is not on a bridge or port of ours, which are known by their prefix: other people's
bridges, and other instances', never get past them.
"""

from __future__ import annotations

from typing import Any

from jailmgr.config import Root
from jailmgr.keys import CONNECTIONS
from jailmgr.runtime.shaping import MARK

Json = dict[str, Any]

DNS, DHCP_SERVER, DHCP_CLIENT, DHCP6_SERVER = 53, 67, 68, 547

SETS = {
    ("inet", "bridges"): "type ifname . ifname",
    # Each address of a jail twice: a packet of a jail to itself.
    ("inet", "self_ipv4"): "type ipv4_addr . ipv4_addr",
    ("inet", "self_ipv6"): "type ipv6_addr . ipv6_addr",
    # Each port twice: a frame that would go back by the port it came from.
    ("bridge", "back"): "type ifname . ifname",
    # Ports all of whose packets come by way of a queue (runtime/shaping.py).
    ("bridge", "shaped"): "type ifname",
    ("bridge", "macs"): "type ifname . ether_addr",
    ("bridge", "ipv4"): "type ifname . ipv4_addr",
    ("bridge", "ipv6"): "type ifname . ipv6_addr",
    # Addresses a port may advertise, or ask for before it has them (RFC 4861, 4.3 and 4.4): a field of ICMPv6 that has
    # no name in nftables 1.0.6.
    ("bridge", "targets"): "typeof iifname . @th,64,128",
}

MAPS = {
    ("inet", "any_ipv4"): "type inet_proto . inet_service : ipv4_addr . inet_service",
    ("inet", "any_ipv6"): "type inet_proto . inet_service : ipv6_addr . inet_service",
    ("inet", "at_ipv4"): "type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service",
    ("inet", "at_ipv6"): "type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service",
}
"""Published ports: address of the host where one was named, protocol, port; and where they lead."""

COUNTED = {
    "opened": "ether_addr",
    "taken_ipv4": "ipv4_addr",
    "taken_ipv6": "ipv6_addr",
    "tenant_opened": "devgroup",
    "tenant_taken": "devgroup",
}
"""Sets of the inet table whose elements count connections, each up to a limit of its own (nft(8), CT COUNT).

The key is the MAC for connections that a jail opens, the jail's address for connections that the world opens to it.
Both also count for the tenant, by the device group of its bridges (bridge.tenant_group). An element that is replaced
or flushed loses its count.
"""

FULL = "_full"
"""The suffix of a set beside each of those, which holds the keys that have just met their limit, for FULL_MS.

Their connections are dropped without a look at the count. A look takes the longer the more is counted, and adds the
dropped connection to the count, from which the kernel removes only a few at a time (nf_conncount_add).
"""
FULL_MS = 10

CHAINS: dict[str, dict[str, tuple[str, str, int] | None]] = {
    "inet": {
        "prerouting": ("nat", "prerouting", -100),
        "output": ("nat", "output", -100),
        "postrouting": ("nat", "postrouting", 100),
        "raw": ("filter", "prerouting", -300),
        "input": ("filter", "input", 0),
        "forward": ("filter", "forward", 0),
        "opened": None,
        "taken": None,
    },
    "bridge": {
        # Before br_netfilter's own hook (NF_BR_PRI_BRNF, 0) makes IP packets of frames.
        "prerouting": ("filter", "prerouting", -300),
        # Frames to 01:80:c2:00:00:0X, which no bridge forwards, come by no other hook, and those to …:0E by none at all
        # (br_handle_frame of net/bridge): runtime/netlink.py and the `raw` chain hold these.
        "input": ("filter", "input", -300),
        "forward": ("filter", "forward", -300),
        "arp_from_jail": None,
        "ipv4_from_jail": None,
        "ipv6_from_jail": None,
    },
}


def declarations(root: Root) -> str:
    """Tables, sets and maps, in nft(8)'s own words, since JSON can't tell all these types; twice changes nothing."""
    commands = [f"add table {family} {root.table}" for family in CHAINS]
    for verb, declared in (("set", SETS), ("map", MAPS)):
        for (family, name), kind in declared.items():
            commands.append(f"add {verb} {family} {root.table} {name} {{ {kind}; }}")
    for name, kind in COUNTED.items():
        commands.append(f"add set inet {root.table} {name} {{ type {kind}; ct count over {CONNECTIONS}; }}")
        brief = f"type {kind}; flags dynamic,timeout; timeout {FULL_MS}ms; size {1 << 20};"
        commands.append(f"add set inet {root.table} {name}{FULL} {{ {brief} }}")
    return "\n".join(commands)


def frame(root: Root) -> list[Json]:
    """Return chains and rules, without elements; whatever the tables held before is gone, except for COUNTED."""
    commands: list[Json] = []
    for verb, declared in (("set", SETS), ("map", MAPS)):
        for family, name in declared:
            commands.append({"flush": {verb: {"family": family, "table": root.table, "name": name}}})
    for family, chains in CHAINS.items():
        table = {"family": family, "table": root.table}
        for name, hook in chains.items():
            at = {} if hook is None else dict(zip(("type", "hook", "prio"), hook, strict=True)) | {"policy": "accept"}
            commands.append({"add": {"chain": table | {"name": name} | at}})
        commands.append({"flush": {"table": {"family": family, "name": root.table}}})
        ports = f"{root.link_prefix}v*"
        rules = _inet(f"{root.link_prefix}b*", ports) if family == "inet" else _bridge(ports)
        commands += [{"add": {"rule": table | {"chain": chain, "expr": list(expr)}}} for chain, expr in rules]
    return commands


def _inet(ours: str, ports: str) -> list[tuple[str, tuple[Json, ...]]]:
    from_jail, to_jail = _is(_meta("iifname"), ours), _is(_meta("oifname"), ours)
    not_from_jail, not_to_jail = _is(_meta("iifname"), ours, "!="), _is(_meta("oifname"), ours, "!=")
    to_bridge = _is({"fib": {"result": "type", "flags": ["daddr", "iif"]}}, "local")
    to_host = _is({"fib": {"result": "type", "flags": ["daddr"]}}, "local")
    published, replies = _is(_ct("status"), "dnat", "in"), _is(_ct("state"), ["established", "related"], "in")
    dns, refuse = _is(_payload("th", "dport"), DNS), {"reject": {"type": "icmpx", "expr": "admin-prohibited"}}
    # Only a connection's first packet: a look at the count takes time.
    first = _is(_ct("status"), "confirmed", "!")
    # The kernel counts a reset connection no more, keeps it for 10 s (nf_conntrack_tcp_timeout_close), and lets SYN and
    # answer open it again. Until it is forgotten and counts as a new one, the SYN is dropped.
    flags = {"&": [_payload("tcp", "flags"), {"|": ["syn", "ack"]}]}
    opens_closed = (_is(_ct("state"), "established", "in"), _is(flags, "syn"), _is(_ct("expiration"), 10, "<="))
    loopback4 = {"prefix": {"addr": "127.0.0.0", "len": 8}}
    redirect = [
        (_dnat("ip", "at_ipv4", _payload("ip", "daddr")),),
        (_dnat("ip6", "at_ipv6", _payload("ip6", "daddr")),),
        (to_host, _dnat("ip", "any_ipv4")),
        (to_host, _dnat("ip6", "any_ipv6")),
    ]
    return [
        # The bridge's own DNS stays, whoever publishes port 53.
        ("prerouting", (from_jail, to_bridge, dns, _ACCEPT)),
        *(("prerouting", rule) for rule in redirect),
        # br_netfilter translates an answer back to ::1 before ip6_rcv, which drops it: better refused than lost.
        ("output", (_is(_payload("ip6", "daddr"), "::1"), _ACCEPT)),
        *(("output", rule) for rule in redirect),
        ("postrouting", (not_from_jail, not_to_jail, _ACCEPT)),
        ("postrouting", (from_jail, not_to_jail, {"masquerade": None})),
        # A jail that asks for its neighbour by the host's address must get the answer by way of the host.
        ("postrouting", (from_jail, to_jail, published, {"masquerade": None})),
        # br_netfilter turns the packet of a jail to its own published port within the bridge: iifname is empty then.
        ("postrouting", (to_jail, published, _is(_both_addresses("ip"), "@self_ipv4"), {"masquerade": None})),
        ("postrouting", (to_jail, published, _is(_both_addresses("ip6"), "@self_ipv6"), {"masquerade": None})),
        ("postrouting", (to_jail, _is(_payload("ip", "saddr"), loopback4), {"masquerade": None})),
        # A bridge hands on what it has received as its own; a packet that comes by a port itself has passed no rule.
        ("raw", (_is(_meta("iifname"), ports), _DROP)),
        ("raw", (not_from_jail, _ACCEPT)),
        ("raw", (_is(_payload("ip", "daddr"), loopback4), _DROP)),
        ("input", (not_from_jail, _ACCEPT)),
        ("input", (*opens_closed, _DROP)),
        ("input", (first, {"jump": {"target": "opened"}})),
        ("input", (replies, _ACCEPT)),
        ("input", (_is(_meta("l4proto"), {"set": ["icmp", "ipv6-icmp"]}), _ACCEPT)),
        ("input", (to_bridge, _is(_meta("l4proto"), {"set": ["tcp", "udp"]}), dns, _ACCEPT)),
        ("input", (_is(_payload("udp", "dport"), DHCP_SERVER), _ACCEPT)),
        ("input", (_is(_payload("udp", "dport"), DHCP6_SERVER), _ACCEPT)),
        ("input", (refuse,)),
        ("forward", (not_from_jail, not_to_jail, _ACCEPT)),
        ("forward", (*opens_closed, _DROP)),
        ("forward", (first, from_jail, {"jump": {"target": "opened"}})),
        ("forward", (first, not_from_jail, {"jump": {"target": "taken"}})),
        ("forward", (replies, _ACCEPT)),
        ("forward", (_is({"concat": [_meta("iifname"), _meta("oifname")]}, "@bridges"), _ACCEPT)),
        ("forward", (from_jail, to_jail, refuse)),
        ("forward", (from_jail, _ACCEPT)),
        ("forward", (published, _ACCEPT)),
        ("forward", (refuse,)),
        *_counted("opened", _payload("ether", "saddr"), "opened"),
        *_counted("opened", _meta("iifgroup"), "tenant_opened"),
        *_counted("taken", _payload("ip", "daddr"), "taken_ipv4"),
        *_counted("taken", _payload("ip6", "daddr"), "taken_ipv6"),
        *_counted("taken", _meta("oifgroup"), "tenant_taken"),
    ]


def _counted(chain: str, key: Json, name: str) -> list[tuple[str, tuple[Json, ...]]]:
    """Drop what is over the limit of its key."""
    full = f"@{name}{FULL}"
    return [
        (chain, (_is(key, full), _DROP)),
        (chain, (_is(key, f"@{name}"), {"set": {"op": "add", "elem": key, "set": full}}, _DROP)),
    ]


def _bridge(ours: str) -> list[tuple[str, tuple[Json, ...]]]:
    link_local = _is({"&": [_payload("ether", "daddr"), "ff:ff:ff:ff:ff:f0"]}, "01:80:c2:00:00:00")
    group = _is({"&": [_payload("ether", "daddr"), "01:00:00:00:00:00"]}, "01:00:00:00:00:00")
    families = {"arp": "arp_from_jail", "ip": "ipv4_from_jail", "ip6": "ipv6_from_jail"}
    jumps = {"set": [[family, {"jump": {"target": chain}}] for family, chain in families.items()]}
    unspecified6 = _is(_payload("ip6", "saddr"), "::")
    target = {"payload": {"base": "th", "offset": 64, "len": 128}}
    # Duplicate address detection, router solicitation and multicast listener reports come before there is an address.
    before_address = {
        "set": ["nd-neighbor-solicit", "nd-router-solicit", "mld-listener-report", "mld2-listener-report"]
    }
    return [
        ("prerouting", (_is(_meta("iifname"), ours, "!="), _ACCEPT)),
        ("prerouting", (_is(_meta("iifname"), "@shaped"), _is(_meta("mark"), MARK, "!="), _DROP)),
        ("prerouting", (_is(_meta("mark"), MARK), _set("priority", 0), _set("mark", 0))),
        ("prerouting", (_not_own(_payload("ether", "saddr"), "macs"), _DROP)),
        ("prerouting", ({"vmap": {"key": _payload("ether", "type"), "data": jumps}},)),
        ("prerouting", (_DROP,)),
        ("input", (_is(_meta("iifname"), ours), link_local, _DROP)),
        # A port hands back what its jail sends to its own published port (runtime/netlink.py), and no multicast.
        ("forward", (group, _is({"concat": [_meta("iifname"), _meta("oifname")]}, "@back"), _DROP)),
        ("arp_from_jail", (_not_own(_payload("arp", "saddr ether"), "macs"), _DROP)),
        # An ARP probe (RFC 5227, 2.1.1): its sender has no address yet, and a host that has the target's gives that up.
        (
            "arp_from_jail",
            (
                _is(_payload("arp", "saddr ip"), "0.0.0.0"),
                _is(_payload("arp", "operation"), "request"),
                _is({"concat": [_meta("iifname"), _payload("arp", "daddr ip")]}, "@ipv4"),
                _ACCEPT,
            ),
        ),
        ("arp_from_jail", (_not_own(_payload("arp", "saddr ip"), "ipv4"), _DROP)),
        ("arp_from_jail", (_ACCEPT,)),
        (
            "ipv4_from_jail",
            (
                _is(_payload("ip", "saddr"), "0.0.0.0"),
                _is(_payload("udp", "sport"), DHCP_CLIENT),
                _is(_payload("udp", "dport"), DHCP_SERVER),
                _ACCEPT,
            ),
        ),
        ("ipv4_from_jail", (_not_own(_payload("ip", "saddr"), "ipv4"), _DROP)),
        ("ipv4_from_jail", (_is(_payload("udp", "sport"), DHCP_SERVER), _DROP)),
        ("ipv4_from_jail", (_ACCEPT,)),
        # A node gives up an address that another one asks for by duplicate address detection (RFC 4862, 5.4.3).
        (
            "ipv6_from_jail",
            (unspecified6, _is(_payload("icmpv6", "type"), "nd-neighbor-solicit"), _not_own(target, "targets"), _DROP),
        ),
        ("ipv6_from_jail", (unspecified6, _is(_payload("icmpv6", "type"), before_address), _ACCEPT)),
        ("ipv6_from_jail", (_not_own(_payload("ip6", "saddr"), "ipv6"), _DROP)),
        (
            "ipv6_from_jail",
            (_is(_payload("icmpv6", "type"), {"set": ["nd-router-advert", "nd-redirect"]}), _DROP),
        ),
        (
            "ipv6_from_jail",
            (
                _is(_payload("icmpv6", "type"), "nd-neighbor-advert"),
                _not_own(target, "targets"),
                _DROP,
            ),
        ),
        ("ipv6_from_jail", (_is(_payload("udp", "sport"), DHCP6_SERVER), _DROP)),
        ("ipv6_from_jail", (_ACCEPT,)),
    ]


_ACCEPT: Json = {"accept": None}
_DROP: Json = {"drop": None}


def _is(left: Json, right: Any, op: str = "==") -> Json:
    return {"match": {"op": op, "left": left, "right": right}}


def _set(key: str, value: int) -> Json:
    return {"mangle": {"key": _meta(key), "value": value}}


def _not_own(field: Json, name: str) -> Json:
    return _is({"concat": [_meta("iifname"), field]}, f"@{name}", "!=")


def _meta(key: str) -> Json:
    return {"meta": {"key": key}}


def _ct(key: str) -> Json:
    return {"ct": {"key": key}}


def _payload(protocol: str, field: str) -> Json:
    return {"payload": {"protocol": protocol, "field": field}}


def _both_addresses(family: str) -> Json:
    return {"concat": [_payload(family, "saddr"), _payload(family, "daddr")]}


def _dnat(family: str, name: str, *before: Json) -> Json:
    key = {"concat": [*before, _meta("l4proto"), _payload("th", "dport")]}
    return {"dnat": {"family": family, "addr": {"map": {"key": key, "data": f"@{name}"}}}}
