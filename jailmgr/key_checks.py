"""What a configuration key may hold: checks of its value, made once for keys of jails, devices and tenants."""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, ip_address

import msgspec

from jailmgr.errors import JailmgrError
from jailmgr.units import parse_allowance, parse_bit_rate, parse_percent, parse_rate, parse_size

Check = Callable[[str], None]

LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z", re.ASCII)
_BASE64 = re.compile(r"[A-Za-z0-9+/]*\Z", re.ASCII)
_ENDPOINT = re.compile(r"(tcp|udp):(\[[0-9a-fA-F:.]+\]|[0-9.]*):(\d{1,5})\Z", re.ASCII)


class Key(msgspec.Struct, frozen=True):
    """A key. `check` raises ValueError with what was expected; `live`: a running jail takes it at once.

    `root`: only the host's root may set or unset it, no user of a tenant.
    """

    check: Check
    live: bool
    doc: str
    root: bool = False
    secret: bool = False
    """Leave the value out of errors, which are logged."""


class Endpoint(msgspec.Struct, frozen=True):
    """An end of a proxy device. `address` is empty for every address, IPv4 and IPv6."""

    protocol: str
    address: str
    port: int


def at_least(minimum: int) -> Check:
    def check(text: str) -> None:
        if parse_size(text) < minimum:
            raise ValueError(f"{text!r} is too small, the least is {minimum} bytes")

    return check


def whole(low: int, high: int) -> Check:
    def check(text: str) -> None:
        if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) <= high):
            raise ValueError(f"{text!r} is not a whole number from {low} to {high}")

    return check


def one_of(*words: str) -> Check:
    def check(text: str) -> None:
        if text not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")

    return check


def parse_bool(text: str) -> bool:
    """True of LXD's `true`, `1`, `yes`, `on`, False of their opposites; ValueError else."""
    word = text.lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def truth(text: str) -> None:
    parse_bool(text)


def swap(text: str) -> None:
    try:
        parse_bool(text)
    except ValueError:
        try:
            parse_size(text)
        except ValueError:
            raise ValueError(f"{text!r} is neither true, false nor a size") from None


def allowance(text: str) -> None:
    if text.endswith("%"):
        parse_percent(text)
    else:
        parse_allowance(text)


def rate(text: str) -> None:
    parse_rate(text)


def bit_rate(text: str) -> None:
    parse_bit_rate(text)


def free_text(text: str) -> None:
    if "\0" in text or len(text) > 65536:
        raise ValueError("the value has a NUL byte or more than 65536 characters")


def parse_base64(text: str) -> bytes:
    """Decode base64 (RFC 4648, section 4); padding may be missing or too long, as in Incus. ValueError else."""
    bare = "".join(text.split()).rstrip("=")
    if not _BASE64.match(bare) or len(bare) % 4 == 1:
        raise ValueError("the value is not base64")
    return binascii.a2b_base64(bare + "=" * (-len(bare) % 4))


def base64(text: str) -> None:
    parse_base64(text)


def ipv4(text: str) -> None:
    try:
        IPv4Address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv4 address") from None


def label(text: str) -> None:
    if not LABEL.match(text):
        raise ValueError(f"{text!r} is not a network's name")


def endpoint(text: str) -> None:
    parse_endpoint(text)


def parse_endpoint(text: str) -> Endpoint:
    """Of a proxy device's `listen` or `connect`: `tcp:0.0.0.0:8080`, `udp:[::1]:53`; ValueError else."""
    match = _ENDPOINT.match(text)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise ValueError(f"{text!r} is not tcp:ADDRESS:PORT or udp:ADDRESS:PORT")
    address = match[2].strip("[]")
    if address:
        try:
            parsed = ip_address(address)
        except ValueError:
            raise ValueError(f"{text!r}: {address!r} is not an address") from None
        address = "" if parsed.is_unspecified else str(parsed)
    return Endpoint(match[1], address, int(match[3]))


def near_miss(name: str, known: Iterable[str], say: str = "Did you mean {}?") -> str:
    """A hint with the known name most like a wrong one, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return say.format(close[0]) if close else ""


def check_value(key: Key, what: str, value: str) -> None:
    try:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not text")
        key.check(value)
    except ValueError as error:
        raise JailmgrError(what, str(error), key.doc, "invalid") from None
