"""The configuration keys and devices a jail takes: what each may hold, and whether it takes effect on a running jail.

Names and meanings are LXD's and Incus's own ("Instance options", "Devices" in their documentation); `restart` and
`limits.disk` are ours, and so are the short names of `SHORT`. A key is listed here once it does something.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from jailmgr.devices import FIXED as FIXED
from jailmgr.devices import TYPES as TYPES
from jailmgr.devices.disk import DISK_MIN as DISK_MIN
from jailmgr.errors import JailmgrError
from jailmgr.key_checks import (
    LABEL,
    Key,
    allowance,
    at_least,
    base64,
    bit_rate,
    check_value,
    free_text,
    near_miss,
    one_of,
    swap,
    truth,
    whole,
)  # fmt: skip
from jailmgr.units import parse_bit_rate, parse_size

Config = dict[str, str]
Devices = dict[str, dict[str, str]]

MEMORY_MIN = 4 << 20
"""Less than this no init survives its own exec."""
CONNECTIONS = 4096
"""`limits.connections` of a jail where it isn't set: a hundredth or so of what a host can keep (nf_conntrack_max)."""
IDS_MIN, IDS_MAX = 65536, 0x7FFF0000
"""systemd and distributions take ids up to 65534 for granted (https://systemd.io/UIDS-GIDS). The most is the larger
region of claims.py: no id in a jail is 2^31 or above, which many programs take for negative."""
IDS = 1 << 20
"""`security.idmap.size` where it isn't set; docs/architecture.md has the arithmetic."""
CONNECTIONS_MAX = 16384
"""The kernel goes through all that it has counted as it counts another: 2 ms for so many, 25 for four times as many."""

KEYCTL = "security.syscalls.allow_keyctl"
SOCKETCALL = "security.syscalls.allow_socketcall"

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}\Z", re.ASCII)
_USER = re.compile(r"[A-Za-z0-9._-]{1,255}\Z", re.ASCII)
_CREDENTIAL = re.compile(r"(?!\.\.?\Z)[A-Za-z0-9@._+,~\\-]{1,255}\Z", re.ASCII)
"""A file's name without a colon (systemd's credential_name_valid)."""
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z", re.ASCII)


CONFIG: dict[str, Key] = {
    "boot.autostart": Key(
        truth, True, "Start the jail after the host has booted; where it isn't set, if it ran when the host went down."
    ),
    "boot.autostart.delay": Key(
        whole(0, 3600), True, "Seconds to wait after this jail's start before the tenant's next one's."
    ),
    "boot.autostart.priority": Key(
        whole(0, 1_000_000), True, "Order of starting among the tenant's; the highest first."
    ),
    "boot.host_shutdown_timeout": Key(
        whole(0, 86400), True, "Seconds init has to stop before it is killed; all of a host's jails have ten minutes."
    ),
    "boot.stop.priority": Key(
        whole(0, 1_000_000), True, "Order of stopping among the tenant's when the host goes down; the highest first."
    ),
    "limits.connections": Key(
        whole(1, CONNECTIONS_MAX),
        True,
        "Number of connections that the jail may open, and as many that the world may open to it by IPv4, and by IPv6. "
        "The default is 4096. A new limit counts none of those that are open.",
    ),
    "limits.cpu": Key(
        whole(1, 4096), True, "Number of CPUs: so much of their time, on so many of the host's, which is what it sees."
    ),
    "limits.cpu.allowance": Key(
        allowance, True, "Share of CPU time: `25ms/100ms` is a hard limit, `50%` a weight under load."
    ),
    "limits.cpu.priority": Key(whole(0, 10), True, "Priority against jails of the same share under load; 10 the most."),
    "limits.disk": Key(at_least(DISK_MIN), True, "Bytes the jail's volume may take: the root device's `size`."),
    "limits.egress": Key(bit_rate, True, "Bits a second the jail may send: the `limits.egress` of its first NIC."),
    "limits.ingress": Key(bit_rate, True, "Bits a second the jail may receive: the `limits.ingress` of its first NIC."),
    "limits.memory": Key(at_least(MEMORY_MIN), True, "Bytes of memory, page cache included."),
    "limits.memory.min": Key(
        at_least(1), True, "Bytes of it that are not taken for other jails of the tenant; on cgroup v2."
    ),
    "limits.memory.swap": Key(swap, True, "`false`: no swap; a size: that much; `true`: as the host allows."),
    "limits.processes": Key(
        whole(1, 4_194_304),
        True,
        "Number of processes and threads; where it isn't set, 8192, of which none is promised.",
    ),
    "restart": Key(
        one_of("no", "on-failure", "always"), False, "Start anew when init ends by itself: no, on-failure or always."
    ),
    KEYCTL: Key(
        truth,
        False,
        "`true`: the jail may have kernel keys (keyrings(7)), as Kerberos' and fscrypt's. They are in no memory limit "
        "(docs/security.md). Only root may set it.",
        root=True,
    ),
    SOCKETCALL: Key(
        truth,
        False,
        "`true`: 32-bit x86 programs have a network; a jail's other programs are as before. The wall around families "
        "of sockets is open for the jail then (docs/security.md). Only root may set it.",
        root=True,
    ),
    "security.idmap.isolated": Key(
        one_of("true"), True, "No two jails of a host have an id of the host in common: it is always true."
    ),
    "security.idmap.size": Key(
        whole(IDS_MIN, IDS_MAX),
        False,
        f"Number of user and group ids the jail has, from 0 on; where it isn't set, {IDS}.",
    ),
}
"""Keys by name. `PREFIXES` has those with a name of the user's in them."""

TEXT_CREDENTIAL, BINARY_CREDENTIAL = "systemd.credential.", "systemd.credential-binary."

REFUSED = {
    "security.idmap.base": (
        "the host's ids of a jail are chosen anew wherever it starts, so that no two jails have one in common",
        "security.idmap.size sets how many there are; owners of files are kept as they are in the jail.",
    )
}
"""Why a key of LXD's is not one here, and a hint."""

PREFIXES: dict[str, tuple[re.Pattern[str], Key]] = {
    "environment.": (_VARIABLE, Key(free_text, False, "A variable of init's environment and of what is exec'd.")),
    TEXT_CREDENTIAL: (
        _CREDENTIAL,
        Key(free_text, False, "A credential for systemd in the jail, as text; `-` reads it from stdin.", secret=True),
    ),
    BINARY_CREDENTIAL: (_CREDENTIAL, Key(base64, False, "The same in base64, for one that is not text.", secret=True)),
    "user.": (_USER, Key(free_text, True, "Free text of yours.")),
}

DEVICES: dict[str, dict[str, Key]] = {kind: type_.keys for kind, type_ in TYPES.items()}
"""Keys of each type of device, besides `type`."""

SHORT: dict[str, tuple[str, str, Callable[[str], int]]] = {
    "limits.disk": ("root", "size", parse_size),
    "limits.ingress": ("eth0", "limits.ingress", parse_bit_rate),
    "limits.egress": ("eth0", "limits.egress", parse_bit_rate),
}
"""Configuration keys that stand for a device's: the device, its key, and the number that a value is."""

SIZE_MAX, DEVICES_MAX = 64 * 1024, 256
"""Of one jail: `list` tells them all, and each port is a rule."""


def check_name(name: str, what: str = "jail") -> None:
    """Refuse what is not a DNS label (RFC 1123 section 2.1: at most 63 of a-z 0-9 and `-`, not at an end)."""
    if LABEL.match(name):
        return
    hint = "Use up to 63 of a-z, 0-9 and -, neither first nor last a -."
    if LABEL.match(lower := name.lower().replace("_", "-").replace(".", "-")):
        hint += f" {lower} would do."
    raise JailmgrError(f"{what} {name!r}", "the name is not a DNS label", hint, "invalid")


def find_key(name: str) -> Key:
    """The configuration key of a name; JailmgrError `invalid` with the nearest one where there is none."""
    if name in CONFIG:
        return CONFIG[name]
    if name in REFUSED:
        why, hint = REFUSED[name]
        raise JailmgrError(f"key {name!r}", why, hint, "invalid")
    for prefix, (pattern, key) in PREFIXES.items():
        if name.startswith(prefix):
            if not pattern.match(name[len(prefix) :]):
                raise JailmgrError(f"key {name!r}", f"what follows {prefix} is not a name", "", "invalid")
            return key
    hint = near_miss(name, [*CONFIG, *(prefix + "NAME" for prefix in PREFIXES)])
    raise JailmgrError(f"key {name!r}", "there is no such configuration key", hint or _known(CONFIG), "invalid")


def check_config(config: Mapping[str, str]) -> None:
    """Refuse unknown keys and bad values (JailmgrError `invalid`)."""
    for name, value in config.items():
        key = find_key(name)
        check_value(key, name if key.secret else f"{name}={value}", value)
    for name in config:
        if name.startswith(TEXT_CREDENTIAL) and (twin := BINARY_CREDENTIAL + name[len(TEXT_CREDENTIAL) :]) in config:
            raise JailmgrError(f"key {name}", f"{twin} is set too", "Unset one of the two.", "invalid")


def check_devices(devices: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse unknown devices, unknown keys of them, bad values, and what does not fit together."""
    places: dict[str, str] = {}
    for name, device in devices.items():
        if not _DEVICE.match(name):
            raise JailmgrError(f"device {name!r}", "the name is not one of letters, digits, ., _ and -", "", "invalid")
        kind = device_type(name, device)
        keys = DEVICES[kind]
        for key, value in device.items():
            if key == "type":
                continue
            if key not in keys:
                raise JailmgrError(
                    f"device {name}",
                    f"{key!r} is no key of a {kind} device",
                    near_miss(key, keys) or _known(keys),
                    "invalid",
                )
            check_value(keys[key], f"device {name}: {key}={value}", value)
        TYPES[kind].check(name, device)
        if (place := TYPES[kind].place(device)) and (other := places.setdefault(place, name)) != name:
            raise JailmgrError(f"device {name}", f"{place} is device {other} already", "", "invalid")


def device_type(name: str, device: Mapping[str, str]) -> str:
    """The type of a device, a key of TYPES; `root` and `eth0` need not have one. JailmgrError `invalid` else."""
    kind = device.get("type", FIXED.get(name, ""))
    if not kind:
        free = ", ".join(kind for kind, type_ in TYPES.items() if not type_.only)
        hint = near_miss(name, FIXED) or f"Devices are root (disk), eth0 (nic), and any number of type {free}."
        raise JailmgrError(f"device {name}", "it has no type", hint, "invalid")
    if kind not in TYPES:
        hint = near_miss(kind, TYPES) or _known(TYPES)
        raise JailmgrError(f"device {name}", f"there is no device type {kind!r}", hint, "invalid")
    only = TYPES[kind].only
    if FIXED.get(name, kind) != kind or only not in ("", name):
        why = f"{name} is a {FIXED[name]} device" if name in FIXED else f"a jail has one {kind} device"
        raise JailmgrError(f"device {name}", why, f"Its name is {only}." if only else "", "invalid")
    return kind


def fold(config: Mapping[str, str], devices: Mapping[str, Mapping[str, str]]) -> tuple[Config, Devices]:
    """Short names put where they belong (`SHORT`: `limits.disk` is root's `size`), types said, all checked."""
    _check_size(config, devices)
    check_config(config)
    check_devices(devices)
    folded = {name: {"type": device_type(name, device), **device} for name, device in devices.items()}
    rest = dict(config)
    for short, (name, key, number) in SHORT.items():
        if (value := rest.pop(short, None)) is None:
            continue
        device = folded.setdefault(name, {"type": FIXED[name]})
        if key in device and number(device[key]) != number(value):
            why = f"{name}'s {key} says {device[key]}"
            raise JailmgrError(f"{short}={value}", why, "Give one of the two.", "invalid")
        device[key] = value
    return rest, folded


def _check_size(config: Mapping[str, str], devices: Mapping[str, Mapping[str, str]]) -> None:
    size = sum(len(key) + len(value) for each in (config, *devices.values()) for key, value in each.items())
    if size > SIZE_MAX:
        raise JailmgrError("keys", f"they and their values have {size} characters", f"{SIZE_MAX} may be.", "invalid")
    if len(devices) > DEVICES_MAX:
        raise JailmgrError("devices", f"there are {len(devices)}", f"A jail has at most {DEVICES_MAX}.", "invalid")


def is_live(key: str) -> bool:
    """Whether a running jail takes a change of this configuration key at once."""
    return find_key(key).live


def _known(names: Iterable[str]) -> str:
    return f"There are: {', '.join(sorted(names))}."
