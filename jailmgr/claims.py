"""What no two instances of jailmgr on a host may both have: marks, id ranges, uids of tenants, subnets, host ports.

One JSON file, changed under the lock of its directory and replaced as a whole. It lives in /run: after a boot each
instance claims anew what its store says (`wanted`), and ranges that processes use are found in /proc.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from jailmgr.config import Root
from jailmgr.errors import JailmgrError, from_os
from jailmgr.runtime import netlink

DIRECTORY = "/run/jailmgr"
SUBORDINATE = ("/etc/subuid", "/etc/subgid")
RESOLV_CONF = "/etc/resolv.conf"
RANGE = 65536
"""Each id range begins at a multiple of this, so that the upper 16 bits of its first id are those of no other range."""
FIRST_ID = 0x70000000
"""The first of `RANGE` uids of tenants."""
REGIONS = ((FIRST_ID + RANGE, 0x7FFD0000), (0x80000000, 0xFFFF0000))
"""Host ids for jails, from the first one up to but not including the second; docs/architecture.md has the arithmetic.

https://systemd.io/UIDS-GIDS: the first region is above systemd-nspawn's ids and below those of foreign images. The
second one is used where the first has no room: programs of the host that take an id for a signed 32-bit number show
these as negative. It ends below 4294967294, which NFS servers use for nobody, and (uid_t) -1.
"""

FOUND = "?"
"""Stands in the file for an instance whose claims were lost but whose processes are there."""


class _Held(msgspec.Struct):
    """Claims of one instance by key; id ranges as (first, size)."""

    at: str = ""
    mark: str = ""
    idmap: dict[str, tuple[int, int]] = {}
    uid: dict[str, int] = {}
    subnet: dict[str, str] = {}
    port: dict[str, tuple[str, int, str, int]] = {}
    """Address, number, protocol, and the network namespace they are in: its inode (namespaces(7))."""


def claim_mark(root: Root) -> None:
    """Takes the prefix of the instance's interfaces, groups and tables.

    Raises JailmgrError (`conflict`) where an instance at another path has the same one.
    """
    with _claims() as claims:
        others = {name: held for name, held in claims.items() if name not in (_name(root), FOUND)}
        other = next((name for name, held in others.items() if held.mark == root.mark), None)
        # Interfaces of the host's own instance say `local` where the others have their mark.
        if other is None and root.mark == "local":
            other = "the host's own"
        if other is not None:
            raise JailmgrError(
                f"root {_name(root)}", f"its mark {root.mark} is that of {other}", "Choose another path.", "conflict"
            )
        _held(claims, root)


def claim_idmap(root: Root, key: str, wanted: int | None = None, size: int = RANGE, known: int = RANGE) -> int:
    """Claim a range of `size` host ids for `key`, which gives back the one it has; return the range's first id.

    `key` keeps its range where that has the size already, and begins at `wanted` if given. The store knows `known` ids
    from `wanted` on as the key's.
    Raises JailmgrError: `conflict` where ids from `wanted` on are taken or none of ours, `full` where no range is free.
    """
    with _claims() as claims:
        mine = _held(claims, root).idmap
        if key in mine and mine[key][1] == size and wanted in {None, mine[key][0]}:
            return mine[key][0]
        mine.pop(key, None)
        if wanted is not None and FOUND in claims:
            # User namespaces of the jail's own had a part of its range each.
            lost = claims[FOUND].idmap
            for start in [start for start, span in lost.items() if _is_within(span, (wanted, known))]:
                del lost[start]
        taken = [span for held in claims.values() for span in held.idmap.values()]
        gaps = _gaps([*taken, *_subordinate(REGIONS[0][0], REGIONS[-1][1])])
        if wanted is None:
            wanted = next((start for start, count in gaps if count >= size), None)
            if wanted is None:
                raise _full(size, max((count for _, count in gaps), default=0))
        elif not any(_is_within((wanted, size), gap) for gap in gaps):
            raise JailmgrError(
                f"id range {wanted}",
                "it is in use by another instance of jailmgr, or named in /etc/subuid or /etc/subgid",
                f"Ids {' and '.join(f'{first} to {end - 1}' for first, end in REGIONS)} are jailmgr's.",
                "conflict",
            )
        mine[key] = (wanted, size)
        return wanted


def _full(size: int, largest: int) -> JailmgrError:
    hint = "Delete jails."
    if largest >= RANGE:
        hint = f"The largest free range has {largest} ids: set security.idmap.size={largest} or less, or delete jails."
    return JailmgrError("id range", f"no range of {size} ids is free on this host", hint, "full")


def count_ranges(size: int) -> int:
    """Return how many ranges of `size` ids a host without jails has."""
    return sum(count // size for _, count in _gaps(_subordinate(REGIONS[0][0], REGIONS[-1][1])))


def claim_uid(root: Root, tenant: str, wanted: int | None = None) -> int:
    """The host uid that makes the user namespaces of a tenant. Raises JailmgrError as `claim_idmap` does."""
    with _claims() as claims:
        mine = _held(claims, root).uid
        if tenant in mine and wanted in {None, mine[tenant]}:
            return mine[tenant]
        mine.pop(tenant, None)
        taken = {uid for held in claims.values() for uid in held.uid.values()}
        end = FIRST_ID + RANGE
        spans = list(_subordinate(FIRST_ID, end))
        free = (uid for uid in range(FIRST_ID + 1, end) if uid not in taken and not _is_named(uid, spans))
        uid = next(free, end) if wanted is None else wanted
        if uid in taken:
            raise JailmgrError(f"uid {uid} of tenant {tenant}", "another instance of jailmgr has it", code="conflict")
        if uid >= end:
            raise JailmgrError(f"tenant {tenant}", "no host uid is free", "Delete tenants.", "full")
        mine[tenant] = uid
        return uid


def claim_subnet(root: Root, key: str, wanted: str | None = None) -> str:
    """A private IPv4 network for `key`, as `10.83.7.0/24`: free of the host's routes, addresses and name servers.

    Raises JailmgrError: `invalid` for no such network, `conflict` where `wanted` is taken, `full` where none is free.
    """
    asked = None if wanted is None else _network(wanted)
    with _claims() as claims:
        mine = _held(claims, root).subnet
        if key in mine and wanted in {None, mine[key]}:
            return mine[key]
        before = mine.pop(key, None)
        claimed = [ipaddress.IPv4Network(subnet) for held in claims.values() for subnet in held.subnet.values()]
        # The bridge may be there already: a store that says `wanted` after the claims were lost.
        taken = claimed + host_networks("" if asked is None and before is None else root.link_prefix)
        if asked is None:
            asked = _free_subnet(f"{root.at}/{key}", taken)
        clash = next((network for network in taken if network.overlaps(asked)), None)
        if clash is not None:
            raise JailmgrError(
                f"subnet {asked}",
                f"{clash} is in use on this host",
                "`ip route show table all` tells what is; choose another one.",
                "conflict",
            )
        mine[key] = str(asked)
        return mine[key]


def claim_port(root: Root, key: str, address: str, port: int, protocol: str) -> bool:
    """Claim a port of the host for `key`; return whether the claim is new. An empty address stands for all.

    Raises JailmgrError (`conflict`).
    """
    netns = os.stat("/proc/self/ns/net").st_ino
    with _claims() as claims:
        mine = _held(claims, root).port
        for name, held in claims.items():
            for owner, (other, *taken) in held.port.items():
                clash = taken == [port, protocol, netns] and _same_address(other, address)
                if clash and (name != _name(root) or owner != key):
                    raise JailmgrError(
                        f"port {port}/{protocol}",
                        f"it is published already, by {owner}" + ("" if name == _name(root) else f" of {name}"),
                        "Choose another port of the host; `jailmgr port list` shows those in use.",
                        "conflict",
                    )
        new = mine.get(key) != (address, port, protocol, netns)
        mine[key] = (address, port, protocol, netns)
        return new


def release(root: Root, kind: str, key: str) -> None:
    """Gives back one claim; `kind`: idmap, uid, subnet, port. Fine where there is none."""
    with _claims() as claims:
        getattr(_held(claims, root), kind).pop(key, None)


def has_port(root: Root, key: str) -> bool:
    """Return whether an instance claims a port of the host for `key`."""
    with _claims() as claims:
        return key in _held(claims, root).port


def release_ports(root: Root, keep: Iterable[str]) -> None:
    """Give back the claims of host ports of an instance, except those whose keys are in `keep`."""
    kept = set(keep)
    with _claims() as claims:
        mine = _held(claims, root)
        mine.port = {key: port for key, port in mine.port.items() if key in kept}


def release_all(root: Root) -> None:
    """Gives back all that an instance has claimed; the last one takes the file away."""
    with _claims() as claims:
        claims.pop(_name(root), None)


def host_networks(ours: str = "") -> list[ipaddress.IPv4Network]:
    """IPv4 networks and addresses the host's routes know, in all tables, and its name servers.

    `ours` is a prefix of interfaces whose routes don't count; empty for none.
    """
    networks = {ipaddress.IPv4Network("127.0.0.0/8")}
    for destination, length, index in netlink.routes():
        if length and not (ours and _interface(index).startswith(ours)):
            networks.add(ipaddress.IPv4Network((destination, length), strict=False))
    with contextlib.suppress(OSError):
        for line in Path(RESOLV_CONF).read_text("utf-8", "replace").splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                with contextlib.suppress(ValueError):
                    networks.add(ipaddress.IPv4Network(words[1]))
    return sorted(networks)


def _interface(index: int) -> str:
    try:
        return netlink.interface_name(index)
    except OSError:
        return ""


def _network(text: str) -> ipaddress.IPv4Network:
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise JailmgrError(f"subnet {text}", str(error), "Such as 10.83.7.0/24.", "invalid") from error
    if not network.is_private or not 8 <= network.prefixlen <= 29:
        raise JailmgrError(f"subnet {text}", "not a private network of /8 to /29", "Such as 10.83.7.0/24.", "invalid")
    return network


def _free_subnet(seed: str, taken: list[ipaddress.IPv4Network]) -> ipaddress.IPv4Network:
    """The first free /24 of 10.0.0.0/8 from a place that `seed` chooses, so that hosts seldom have the same one."""
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:2], "big")
    for step in range(65536):
        network = ipaddress.IPv4Network((0x0A000000 + (start + step) % 65536 * 256, 24))
        if not any(network.overlaps(other) for other in taken):
            return network
    raise JailmgrError("subnet", "no /24 of 10.0.0.0/8 is free", "Name one: -c ipv4.address=192.168.83.1/24", "full")


def _gaps(taken: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return first id and size of each gap between spans in REGIONS, from a multiple of RANGE to the next span."""
    gaps, spans = [], sorted(taken)
    for lowest, end in REGIONS:
        for start, count in [*spans, (end, 0)]:
            until = min(start, end)
            if until > lowest:
                gaps.append((lowest, until - lowest))
            lowest = max(lowest, -(-(start + count) // RANGE) * RANGE)
    return gaps


def _is_within(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return other[0] <= span[0] and span[0] + span[1] <= other[0] + other[1]


def _is_named(uid: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(_is_within((uid, 1), span) for span in spans)


def _subordinate(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ranges of subuid(5) and subgid(5) that touch [first, last); lines that make no sense name nothing."""
    for path in SUBORDINATE:
        try:
            lines = Path(path).read_text("utf-8", "replace").splitlines()
        except OSError:
            continue
        for line in lines:
            fields = line.split(":")
            if len(fields) == 3 and all(field.isascii() and field.isdigit() for field in fields[1:]):
                start, count = int(fields[1]), int(fields[2])
                if start < last and first < start + count:
                    yield start, count


def _in_use() -> Iterator[tuple[int, int]]:
    """Id ranges of ours that processes' user namespaces map (user_namespaces(7)): host's first id, size."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for line in (process / "uid_map").read_text().splitlines():
                _, start, count = map(int, line.split())
                if any(_is_within((start, count), (first, end - first)) for first, end in REGIONS):
                    yield start, count


def _same_address(one: str, other: str) -> bool:
    """Whether two listening addresses meet: empty is all, 0.0.0.0 all IPv4, :: all IPv6."""
    if not one or not other:
        return True
    first, second = ipaddress.ip_address(one), ipaddress.ip_address(other)
    return first.version == second.version and (first == second or first.is_unspecified or second.is_unspecified)


def _name(root: Root) -> str:
    return root.at or "the host's own"


def _held(claims: dict[str, _Held], root: Root) -> _Held:
    return claims.setdefault(_name(root), _Held(root.at, root.mark))


@contextlib.contextmanager
def _claims() -> Iterator[dict[str, _Held]]:
    """The claims, locked; what they are at the end is written, unless an error is raised."""
    try:
        with locked(DIRECTORY):
            path = Path(DIRECTORY, "claims")
            try:
                claims = msgspec.json.decode(path.read_bytes(), type=dict[str, _Held])
                stale = [name for name, held in claims.items() if held.at and not Path(held.at).is_dir()]
            except (FileNotFoundError, msgspec.DecodeError):
                claims, stale = {}, [FOUND]
            for name in stale:
                claims.pop(name, None)
            if stale:
                # Processes of an instance that is forgotten still have their ids.
                known = {span for held in claims.values() for span in held.idmap.values()}
                lost = {str(start): (start, count) for start, count in _in_use() if (start, count) not in known}
                if lost:
                    claims[FOUND] = _Held(idmap=lost)
            yield claims
            if set(claims) <= {FOUND}:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    os.rmdir(DIRECTORY)
                return
            fresh = Path(DIRECTORY, ".claims.new")
            fresh.touch(0o600)
            fresh.write_bytes(msgspec.json.encode(claims))
            fresh.rename(path)
    except OSError as error:
        raise from_os("claims", error, "They are kept in /run/jailmgr, root's own.") from error


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """A directory under an exclusive lock (flock(2)), made where it is missing; whoever holds it may remove it.

    One thread at a time, of one process. Raises OSError.
    """
    while True:
        os.makedirs(path, 0o700, exist_ok=True)
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(directory), os.stat(path))
            except FileNotFoundError:
                same = False
            if same:
                yield
                return
        finally:
            os.close(directory)
