"""What a hoster bills from, counted: how much of its counters a jail has used since it was last looked at, and when.

Spans are measured by CLOCK_MONOTONIC, which neither a set clock nor a suspended host moves; the wall clock only says to
which hour they belong. Nothing here reads a clock, a file or the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from jailmgr.runtime.runs import Run

HOUR = 3600


class Amounts(msgspec.Struct, frozen=True, kw_only=True):
    """Used in some span of time."""

    cpu_ns: int = 0
    memory_byte_seconds: int = 0
    """Page cache included."""
    disk_byte_seconds: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    running_seconds: float = 0.0


class JailUsage(Amounts, frozen=True, kw_only=True):
    """What a jail has used, by the last name it had; it may have been deleted since."""

    jail_id: int
    jail: str


class UsageRecord(Amounts, frozen=True, kw_only=True):
    """What all jails of a tenant have used together, and each. A name that was given again has a record of its own."""

    tenant_id: int
    tenant: str
    jails: list[JailUsage]


class Subject(NamedTuple):
    """Whose it is."""

    tenant_id: int
    tenant: str
    jail_id: int
    jail: str


class Clock(NamedTuple):
    """A moment, in seconds: by the wall clock, and by CLOCK_MONOTONIC of the host's boot `boot`."""

    boot: str
    wall: float
    monotonic: float


class Seen(NamedTuple):
    """A jail that runs, as it was found."""

    run: str
    """runs.identity()."""
    age: float
    """runs.age()."""
    memory: int
    """Bytes."""
    cpu_ns: int
    received: int | None
    """Bytes; None where it has no interface, or none any more."""
    sent: int | None


class Track(NamedTuple):
    """How far a jail has been counted."""

    boot: str = ""
    at: float = 0.0
    """When it was last sampled, by CLOCK_MONOTONIC of that boot."""
    run: str = ""
    """The run counted last, ..."""
    run_at: float = 0.0
    """... up to when, and up to these:"""
    cpu_ns: int = 0
    received: int = 0
    sent: int = 0
    memory: int = 0
    """Bytes, as last seen."""
    disk: int = 0
    """Bytes, as last seen."""
    taken: str = ""
    """The last run of the log that was counted last: one that a crash kept from being dropped is known by it."""


class Addition(NamedTuple):
    """Amounts used evenly between two times of the wall clock."""

    subject: Subject
    begin: float
    end: float
    amounts: Amounts


def begin(created_at: float, now: Clock) -> Track:
    """The track of a jail that was never counted: from its creation, or the host's boot where that was later."""
    age = min(max(0.0, now.wall - created_at), now.monotonic)
    return Track(now.boot, now.monotonic - age)


def count_ended(track: Track, subject: Subject, run: Run) -> tuple[Track, Addition]:
    """A run that has ended: of one that was seen while it ran, the rest.

    Memory is that of the last sample, of this run or one before it; an end that nobody saw is taken to be there.
    """
    same, boot = track.run == run.run, run.run.partition("/")[0]
    length, seconds = run.ended_at - run.started_at, run.seconds
    if same:
        length = seconds = max(0.0, run.at - track.run_at)
    elif track.boot == boot and run.at > track.at:
        # It had not begun at that sample. What it says itself may hold time in which the host was suspended.
        length, seconds = min(length, run.at - track.at), min(seconds, run.at - track.at)
    before = track if same else Track()
    received, sent = _of(run.received, before.received), _of(run.sent, before.sent)
    amounts = Amounts(
        cpu_ns=max(0, run.cpu_ns - before.cpu_ns),
        memory_byte_seconds=round(track.memory * seconds),
        received_bytes=max(0, received - before.received),
        sent_bytes=max(0, sent - before.sent),
        running_seconds=seconds,
    )
    counted = track._replace(
        run=run.run,
        run_at=max(before.run_at, run.at),
        cpu_ns=max(before.cpu_ns, run.cpu_ns),
        received=max(before.received, received),
        sent=max(before.sent, sent),
    )
    return counted, Addition(subject, run.ended_at - max(0.0, length), run.ended_at, amounts)


def count_running(track: Track, subject: Subject, seen: Seen, now: Clock) -> tuple[Track, Addition]:
    """A run up to now. Its memory is taken to have been what it is, since the last sample or its start.

    That holds as well for hours in which no engine ran: the run is known to have gone on.
    """
    same = track.run == seen.run
    seconds = max(0.0, now.monotonic - track.run_at if same else min(seen.age, _since(track, now)))
    before = track if same else Track()
    received, sent = _of(seen.received, before.received), _of(seen.sent, before.sent)
    amounts = Amounts(
        cpu_ns=max(0, seen.cpu_ns - before.cpu_ns),
        memory_byte_seconds=round(seen.memory * seconds),
        received_bytes=max(0, received - before.received),
        sent_bytes=max(0, sent - before.sent),
        running_seconds=seconds,
    )
    counted = track._replace(
        run=seen.run,
        run_at=now.monotonic,
        cpu_ns=max(before.cpu_ns, seen.cpu_ns),
        received=max(before.received, received),
        sent=max(before.sent, sent),
        memory=seen.memory,
    )
    return counted, Addition(subject, now.wall - seconds, now.wall, amounts)


def count_disk(track: Track, subject: Subject, size: int | None, now: Clock) -> tuple[Track, Addition]:
    """A volume of `size` bytes (None: as it was) up to now, and with it the sample of this jail.

    It is taken to have been that large since the last sample, in hours without an engine too, but not while the host
    was down.
    """
    held = track.disk if size is None else size
    seconds = _since(track, now)
    amounts = Amounts(disk_byte_seconds=round(held * seconds))
    counted = track._replace(boot=now.boot, at=now.monotonic, disk=held)
    return counted, Addition(subject, now.wall - seconds, now.wall, amounts)


def _since(track: Track, now: Clock) -> float:
    """Seconds since the last sample, or the host's boot where that was later."""
    return max(0.0, now.monotonic - track.at) if track.boot == now.boot else now.monotonic


def _of(value: int | None, known: int) -> int:
    return known if value is None else value


def spread(addition: Addition) -> Iterator[tuple[int, Addition]]:
    """An addition cut at the full hours (of UTC): each hour since the epoch with its part. The parts add up exactly."""
    begin, end, amounts = addition.begin, addition.end, addition.amounts
    done = Amounts()
    for hour in range(int(begin // HOUR), int(end // HOUR) + 1):
        until = min(end, (hour + 1) * HOUR)
        since = max(begin, hour * HOUR)
        if since >= until and hour > begin // HOUR:
            return
        share = 1.0 if until >= end else (until - begin) / (end - begin)
        upto = amounts if share == 1.0 else _scaled(amounts, share)
        yield hour, addition._replace(begin=since, end=until, amounts=combined(upto, done, -1))
        done = upto


def _scaled(amounts: Amounts, share: float) -> Amounts:
    values = {name: getattr(amounts, name) * share for name in FIELDS}
    return Amounts(**{name: value if name == "running_seconds" else int(value) for name, value in values.items()})


def combined(one: Amounts, other: Amounts, sign: int = 1) -> Amounts:
    """The sum of two, or with -1 the difference."""
    return Amounts(**{name: getattr(one, name) + sign * getattr(other, name) for name in FIELDS})


FIELDS = Amounts.__struct_fields__
