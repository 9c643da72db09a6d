"""The configuration keys a tenant takes: totals over all of its jails, what these may be given, and who may use it.

Names are those of LXD's projects where it has them ("Project configuration" in its documentation). Totals are held by
the kernel; counts, which it doesn't know, by admission. A key is listed here once it does something.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from jailmgr.errors import JailmgrError
from jailmgr.key_checks import (
    LABEL,
    Check,
    Key,
    allowance,
    at_least,
    bit_rate,
    check_value,
    near_miss,
    one_of,
    parse_bool,
    rate,
    swap,
    truth,
    whole,
)  # fmt: skip
from jailmgr.keys import CONNECTIONS_MAX, DISK_MIN, MEMORY_MIN, PREFIXES, Config

_ACCOUNT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?\Z", re.ASCII)
_SOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,254}\Z", re.ASCII)
IDS_OF_USERS = 1 << 28
"""A ninth of what a host has for jails: no tenant's users leave the others without (docs/architecture.md)."""
_PORTS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?\Z", re.ASCII)


def parse_list(text: str) -> list[str]:
    """The words of `a,b, c`, each once; none of an empty text."""
    return list(dict.fromkeys(word for word in (part.strip() for part in text.split(",")) if word))


def parse_ports(text: str) -> list[tuple[int, int]]:
    """First and last port of each part of `443,8000-8999`; ValueError else."""
    ranges = []
    for word in parse_list(text):
        match = _PORTS.match(word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= 65535:
            raise ValueError(f"{word!r} is neither a port nor a range such as 8000-8999")
        ranges.append((first, last))
    return ranges


def _words(pattern: re.Pattern[str], what: str) -> Check:
    def check(text: str) -> None:
        for word in parse_list(text):
            if not pattern.match(word):
                raise ValueError(f"{word!r} is not {what}")

    return check


def _ports(text: str) -> None:
    parse_ports(text)


TENANT: dict[str, Key] = {
    "groups": Key(
        _words(_ACCOUNT, "the name of a group"), True,
        "Groups of the host whose members may use the tenant, as `class-a,class-b`.",
    ),
    "limits.connections": Key(
        whole(1, CONNECTIONS_MAX), True,
        "Number of connections that all of its jails together may open, and as many that the world may open to them. "
        "Where it isn't set: no limit; in a tenant that has `users` or `groups` 16384. A new limit counts none "
        "of those that are open.",
    ),
    "limits.cpu": Key(whole(1, 4096), True, "Number of CPUs' worth of time for all of its jails together."),
    "limits.cpu.allowance": Key(
        allowance, True, "Share of CPU time: `150ms/100ms` is a hard limit, `50%` a weight against other tenants."
    ),
    "limits.cpu.priority": Key(whole(0, 10), True, "Priority against tenants of the same share; 10 the most."),
    "limits.disk": Key(at_least(DISK_MIN), True, "Bytes that all of its volumes may take together."),
    "limits.egress": Key(bit_rate, True, "Bits a second that its jails may send, headers included: `100Mbit`."),
    "limits.ids": Key(
        whole(0, 0xFFFFFFFF), True,
        "Number of ids of the host that its jails have (`security.idmap.size`), all together. Where it isn't set: no "
        f"limit; in a tenant that has `users` or `groups` {IDS_OF_USERS}.",
    ),
    "limits.ingress": Key(bit_rate, True, "The same for what they receive."),
    "limits.instances": Key(whole(0, 1_000_000), True, "Number of jails."),
    "limits.io": Key(rate, True, "Bytes (`20MiB`) or operations (`500iops`) a second, read and written each."),
    "limits.memory": Key(at_least(MEMORY_MIN), True, "Bytes of memory, page cache included."),
    "limits.memory.swap": Key(swap, True, "`false`: no swap; a size: that much; `true`: as the host allows."),
    "limits.networks": Key(whole(0, 1_000_000), True, "Number of networks."),
    "limits.overcommit": Key(
        truth, True, "Its jails may be promised more than the total, which the kernel holds all the same."
    ),
    "limits.ports": Key(whole(0, 65535), True, "Number of published ports."),
    "limits.processes": Key(whole(1, 4_194_304), True, "Number of processes and threads."),
    "limits.snapshots": Key(whole(0, 1_000_000), True, "Number of snapshots: none can be made yet."),
    "restricted.containers.nesting": Key(one_of("block"), True, "Whether its jails may hold jails: none may yet."),
    "restricted.devices.disk": Key(
        one_of("block"), True, "Whether its jails may have directories of the host mounted: none may yet."
    ),
    "restricted.images": Key(
        _words(_SOURCE, "a template or image"), True,
        "Templates and images its jails may be made of, as `debian,alpine/3.20`; all where it isn't set.",
    ),
    "restricted.networks.access": Key(
        _words(LABEL, "a network's name"), True,
        "Networks its jails may be attached to, as `default,lab`; all of its own where it isn't set.",
    ),
    "restricted.ports": Key(
        _ports, True,
        "Ports of the host it may publish, as `443,8000-8999`. Where it isn't set: all; in a tenant that has `users` "
        "or `groups` those from 1024 on.",
    ),
    "users": Key(
        _words(_ACCOUNT, "the name of a user"), True, "Users of the host who may use the tenant, as `alice,bob`."
    ),
}  # fmt: skip
"""Keys by name; `user.ANYTHING` besides."""


def check_tenant_config(config: Mapping[str, str]) -> None:
    """Refuse unknown keys and bad values (JailmgrError `invalid`)."""
    for name, value in config.items():
        check_value(find_tenant_key(name), f"{name}={value}", value)


def find_tenant_key(name: str) -> Key:
    """The key of a tenant of that name; JailmgrError `invalid` with the nearest one where there is none."""
    if name in TENANT:
        return TENANT[name]
    pattern, key = PREFIXES["user."]
    if name.startswith("user.") and pattern.match(name[len("user.") :]):
        return key
    hint = near_miss(name, [*TENANT, "user.NAME"]) or f"There are: {', '.join(sorted(TENANT))}."
    raise JailmgrError(f"key {name!r}", "a tenant has no such key", hint, "invalid")


def may_be_used(config: Config) -> bool:
    """Whether the tenant has users of the host: who they are, nobody needs to trust."""
    return bool(config.get("users") or config.get("groups"))


def may_overcommit(config: Config) -> bool:
    return parse_bool(config.get("limits.overcommit", "false"))
