"""nftables, and what other firewalls of the host do to jails' packets.

A packet passes the base chains of all tables at a hook, and any of them may drop it (nft(8), "Chains"): that ours
accept it is no use where another's policy is drop. Docker, ufw and firewalld have such chains.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any, NamedTuple

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.manager.doctor.check import SBIN, Check, check, read
from jailmgr.network import conntrack, nft

PROTOCOLS = "/etc/protocols"
BRIDGED = "/proc/sys/net/bridge/bridge-nf-call-iptables"
LEGACY = "/proc/net/ip_tables_names"
HOOKS = {
    "forward": "jails reach nothing outside, and no published port leads to them",
    "input": "jails can't ask the host for names",
}
"""And what a policy of drop means there."""


class Foreign(NamedTuple):
    """A base chain of somebody else's whose policy is drop and in which nothing names our bridges."""

    family: str
    table: str
    chain: str
    hook: str
    owner: str
    """docker, ufw, firewalld, or empty."""


def firewall_checks(root: Root) -> list[Check]:
    """In the network namespace of the calling thread."""
    try:
        listing = nft.run([{"list": {"ruleset": None}}])
    except (JailmgrError, OSError) as error:
        remedy = "Install it: apt install libnftables1; the kernel needs nf_tables."
        return [check("nftables", False, str(error), remedy)]
    there = os.path.exists(PROTOCOLS)
    detail = PROTOCOLS if there else f"no {PROTOCOLS}, where libnftables looks tcp and udp up"
    found = [check("nftables", True, "answers"), check("protocols", there, detail, "apt install netbase")]
    found += [limits_check(listing, root), flows_check()]
    foreign = [*dropping(listing, root), *_legacy(root)]
    for hook, meaning in HOOKS.items():
        at = [chain for chain in foreign if chain.hook == hook]
        named = ", ".join(f"{chain.family} {chain.table} {chain.chain}" for chain in at)
        detail = (
            f"{named} drops what it has no rule for: {meaning}" if at else "no other table drops what it doesn't know"
        )
        remedy = " ; ".join(dict.fromkeys(remedy_of(chain, root) for chain in at))
        found.append(check(f"firewall {hook}", not at, detail, remedy))
    bridged = read(BRIDGED)
    detail = (
        "frames between jails pass no rules for IP packets"
        if bridged != "1"
        else ("net.bridge.bridge-nf-call-iptables=1: frames between jails pass iptables as well")
    )
    remedy = "sysctl -w net.bridge.bridge-nf-call-iptables=0, where neither Docker nor Kubernetes needs it"
    return [*found, check("bridge netfilter", bridged != "1", detail, remedy, "warning")]


def flows_check() -> Check:
    """Return whether flows whose published port or address is another jail's by now can be ended."""
    there = conntrack.is_there()
    detail = (
        "flows of the host's connection table can be ended"
        if there
        else "the kernel has no ctnetlink: a UDP client that keeps sending reaches a jail after `port unpublish`, and "
        "a stranger's answers reach the next jail with the address"
    )
    return check("connection flows", there, detail, "modprobe nf_conntrack_netlink", "warning")


def limits_check(listing: list[dict[str, Any]], root: Root) -> Check:
    """Return whether each jail whose MAC is in our rules has its limit on connections there as well.

    Kernels before April 2025 remove an element that counts connections when it has counted none for a second
    (nft_rhash_gc).
    """
    sets = {each["name"]: each.get("elem", []) for each in _sets(listing) if each["table"] == root.table}
    counted = {element["elem"]["val"] for element in sets.get("opened", [])}
    lacking = {element["concat"][1] for element in sets.get("macs", [])} - counted
    detail = f"{len(lacking)} jails have none: the kernel has forgotten it" if lacking else "each jail has its own"
    remedy = "Update the kernel: Linux 6.15, or 6.1.134, 6.6.87, 6.12.23 and later ones of these series, keep them."
    return check("connection limits", not lacking, detail, remedy, "warning")


def _sets(listing: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry["set"] for entry in listing if "set" in entry]


def dropping(listing: list[dict[str, Any]], root: Root) -> list[Foreign]:
    """Of a listed ruleset (libnftables-json(5)), the chains that would drop what jails send."""
    prefix, found = f"{root.link_prefix}b", []
    chains: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    rules: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for entry in listing:
        if chain := entry.get("chain"):
            chains.setdefault((chain["family"], chain["table"]), {})[chain["name"]] = chain
        elif rule := entry.get("rule"):
            at = rules.setdefault((rule["family"], rule["table"]), {})
            at.setdefault(rule["chain"], []).append(rule)
    for (family, table), named in chains.items():
        if family not in ("ip", "inet") or table.startswith("jailmgr"):
            continue
        of_table, owner = rules.get((family, table), {}), _owner(table, set(named))
        for name, chain in named.items():
            if chain.get("hook") in HOOKS and _drops(chain, of_table.get(name, [])):
                passed = repr([of_table.get(each, []) for each in _reached(name, of_table)])
                if prefix not in passed:
                    found.append(Foreign(family, table, name, chain["hook"], owner))
    return found


def _reached(name: str, rules: dict[str, list[dict[str, Any]]]) -> set[str]:
    """The chain with all that it jumps to."""
    reached, left = set[str](), [name]
    while left:
        chain = left.pop()
        if chain not in reached:
            reached.add(chain)
            parts = [part for rule in rules.get(chain, []) for part in rule.get("expr", [])]
            left += [part[verb]["target"] for part in parts for verb in ("jump", "goto") if verb in part]
    return reached


def _drops(chain: dict[str, Any], rules: list[dict[str, Any]]) -> bool:
    """By its policy, or, as firewalld has it, by a last rule that refuses all."""
    if chain.get("policy") == "drop":
        return True
    last = [part for part in rules[-1].get("expr", []) if "counter" not in part] if rules else []
    return len(last) == 1 and last[0].keys() <= {"drop", "reject"}


def _owner(table: str, chains: set[str]) -> str:
    if table == "firewalld":
        return "firewalld"
    if any(name.startswith("ufw-") for name in chains):
        return "ufw"
    return "docker" if "DOCKER-USER" in chains else ""


def remedy_of(chain: Foreign, root: Root) -> str:
    """A command that has the chain let our bridges' packets pass; ours then decide."""
    ours = f"{root.link_prefix}b"
    if chain.owner == "firewalld":
        return f"firewall-cmd --permanent --zone=trusted --add-interface={ours}+ && firewall-cmd --reload"
    if chain.owner == "ufw":
        if chain.hook == "input":
            return f"ufw allow in on {ours}+"
        return f"ufw route allow in on {ours}+ && ufw route allow out on {ours}+"
    if chain.owner == "docker" and chain.hook == "forward":
        return " && ".join(f"iptables -I DOCKER-USER -{way} {ours}+ -j ACCEPT" for way in "io")
    ways = ["i"] if chain.hook == "input" else ["i", "o"]
    if chain.table == "legacy":
        return " && ".join(f"iptables-legacy -I {chain.chain} -{way} {ours}+ -j ACCEPT" for way in ways)
    at = f"{chain.family} {chain.table} {chain.chain}"
    return " && ".join(f"nft insert rule {at} {way}ifname '\"{ours}*\"' accept" for way in ways)


def _legacy(root: Root) -> list[Foreign]:
    """Those of iptables' old tables, which nftables doesn't show; none where the tool that shows them is missing."""
    program = shutil.which("iptables-legacy", path=SBIN)
    if "filter" not in read(LEGACY).split() or program is None:
        return []
    done = subprocess.run(
        [program, "-w", "5", "-S"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=30
    )
    if f"{root.link_prefix}b" in done.stdout:
        return []
    owner = _owner("", {line.split()[1] for line in done.stdout.splitlines() if line.startswith("-N ")})
    return [
        Foreign("ip", "legacy", chain, chain.lower(), owner)
        for chain in ("FORWARD", "INPUT")
        if f"-P {chain} DROP" in done.stdout.splitlines()
    ]
