"""How much of its counters a jail has used since it was last looked at, and to which hours that belongs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jailmgr.manager.metering import (
    Addition,
    Amounts,
    Clock,
    Seen,
    Subject,
    Track,
    begin,
    combined,
    count_disk,
    count_ended,
    count_running,
    spread,
)
from jailmgr.runtime.runs import Run

WALL = 490_000 * 3600.0
"""A full hour."""
WHO = Subject(1, "acme", 7, "web")
NOW = Clock("b", WALL, 1000.0)
MIB = 1 << 20


def ended(run: str = "b/1/1", *, cpu_ns: int = 100, at: float = 950.0, seconds: float = 20.0) -> Run:
    return Run(run, WALL - 50 - seconds, WALL - 50, at, seconds, cpu_ns, 30, 40)


def seen(run: str = "b/1/1", *, cpu_ns: int = 100, age: float = 500.0, received: int | None = 30) -> Seen:
    return Seen(run, age, MIB, cpu_ns, received, 40)


def test_a_new_run_is_counted_from_its_start() -> None:
    track, addition = count_running(Track("b", 940.0), WHO, seen(age=20.0), NOW)
    assert addition == Addition(
        WHO,
        WALL - 20,
        WALL,
        Amounts(cpu_ns=100, memory_byte_seconds=20 * MIB, received_bytes=30, sent_bytes=40, running_seconds=20.0),
    )
    assert (track.run, track.run_at, track.cpu_ns, track.received, track.sent) == ("b/1/1", 1000.0, 100, 30, 40)


def test_a_run_seen_before_is_counted_from_there() -> None:
    track, _ = count_running(Track("b", 940.0), WHO, seen(cpu_ns=60, age=20.0, received=10), NOW)
    later = NOW._replace(wall=WALL + 60, monotonic=1060.0)
    _, addition = count_running(track, WHO, seen(age=80.0), later)
    assert addition.amounts == Amounts(cpu_ns=40, memory_byte_seconds=60 * MIB, received_bytes=20, running_seconds=60.0)
    assert (addition.begin, addition.end) == (WALL, WALL + 60)


def test_a_run_goes_on_while_no_engine_does() -> None:
    track, _ = count_running(Track("b", 940.0), WHO, seen(), NOW)
    days = 3 * 86400.0
    later = NOW._replace(wall=WALL + days, monotonic=1000.0 + days)
    _, addition = count_running(track, WHO, seen(cpu_ns=900, age=500 + days), later)
    assert addition.amounts.running_seconds == days
    assert addition.amounts.memory_byte_seconds == days * MIB, "what it has now, for all of the time"
    assert addition.amounts.cpu_ns == 800


def test_a_suspended_host_costs_nothing() -> None:
    """Its boot time goes on, and with it the age of a run."""
    _, addition = count_running(Track("b", 940.0), WHO, seen(age=90_000.0), NOW)
    assert addition.amounts.running_seconds == 60.0
    _, addition = count_ended(Track("b", 940.0), WHO, ended(at=990.0, seconds=90_000.0))
    assert addition.amounts.running_seconds == 50.0
    assert addition.end - addition.begin == 50.0


@pytest.mark.parametrize("jump", [-86400.0 * 365, 86400.0 * 365])
def test_a_clock_that_is_set_moves_the_hour_and_no_amount(jump: float) -> None:
    track, _ = count_running(Track("b", 940.0), WHO, seen(), NOW)
    track, _ = count_disk(track, WHO, 5 * MIB, NOW)
    later = NOW._replace(wall=WALL + jump, monotonic=1060.0)
    track, ran = count_running(track, WHO, seen(), later)
    track, held = count_disk(track, WHO, 5 * MIB, later)
    assert (ran.amounts.running_seconds, held.amounts.disk_byte_seconds) == (60.0, 300 * MIB)
    assert (ran.begin, ran.end) == (held.begin, held.end) == (WALL + jump - 60, WALL + jump)
    assert min(begin(WALL, later).at, begin(WALL + jump, later).at) >= 0.0


@given(
    st.builds(
        Track,
        st.sampled_from("ab"),
        st.floats(0, 1e9),
        st.sampled_from(["a/1/1", "b/1/1"]),
        st.floats(0, 1e9),
        *[st.integers(0, 2)] * 3,
        memory=st.integers(0, 1 << 40),
        disk=st.integers(0, 1 << 40),
    ),
    st.floats(0, 1e9),
    st.floats(0, 1e9),
    st.floats(0, 1e9),
)
def test_no_clock_gives_less_than_nothing(track: Track, monotonic: float, wall: float, seconds: float) -> None:
    now = Clock("b", wall, monotonic)
    run = Run("b/1/1", wall - seconds, wall, monotonic, seconds, 1, 1, 1)
    found = [
        count_running(track, WHO, seen(age=seconds), now),
        count_ended(track, WHO, run),
        count_disk(track, WHO, MIB, now),
    ]
    for _, addition in found:
        assert all(getattr(addition.amounts, name) >= 0 for name in Amounts.__struct_fields__)
        assert addition.end >= addition.begin


def test_an_end_adds_what_no_sample_saw() -> None:
    track, _ = count_running(Track("b", 900.0), WHO, seen(cpu_ns=60, received=10), NOW._replace(monotonic=930.0))
    track, addition = count_ended(track, WHO, ended())
    assert addition.amounts == Amounts(cpu_ns=40, memory_byte_seconds=20 * MIB, received_bytes=20, running_seconds=20.0)
    assert (addition.begin, addition.end) == (WALL - 70, WALL - 50)
    again, nothing = count_ended(track, WHO, ended())
    assert (again, nothing.amounts) == (track, Amounts())


def test_a_run_between_two_samples_is_counted_whole() -> None:
    before = Track("b", 900.0, "b/0/1", 890.0, 70, 70, 70, memory=MIB)
    _, addition = count_ended(before, WHO, ended())
    assert addition.amounts == Amounts(
        cpu_ns=100, memory_byte_seconds=20 * MIB, received_bytes=30, sent_bytes=40, running_seconds=20.0
    )


def test_an_end_nobody_saw_is_where_the_last_sample_was() -> None:
    track, _ = count_running(Track("b", 900.0), WHO, seen(cpu_ns=60), NOW)
    unseen = Run("b/1/1", WALL + 5000, WALL + 5000, 0.0, 0.0, 100, None, None)
    _, addition = count_ended(track, WHO, unseen)
    assert addition.amounts == Amounts(cpu_ns=40)


def test_an_interface_that_is_gone_takes_nothing_back() -> None:
    track, _ = count_running(Track("b", 940.0), WHO, seen(), NOW)
    track, addition = count_running(track, WHO, seen(received=None), NOW)
    assert addition.amounts.received_bytes == 0
    _, addition = count_running(track, WHO, seen(received=35), NOW)
    assert addition.amounts.received_bytes == 5


def test_a_disk_counts_since_the_last_sample_the_creation_or_the_boot() -> None:
    for track, seconds in [
        (Track("b", 940.0), 60.0),
        (Track("another boot", 940.0), 1000.0),
        (begin(WALL - 15, NOW), 15.0),
        (begin(WALL - 5000, NOW), 1000.0),
        (begin(WALL + 5000, NOW), 0.0),
    ]:
        after, addition = count_disk(track, WHO, MIB, NOW)
        assert addition.amounts == Amounts(disk_byte_seconds=round(seconds * MIB))
        assert (after.boot, after.at) == ("b", 1000.0)
    held, _ = count_disk(Track("b", 940.0), WHO, MIB, NOW)
    _, addition = count_disk(held, WHO, None, NOW._replace(monotonic=1010.0))
    assert addition.amounts.disk_byte_seconds == 10 * MIB, "a pool that can't be asked holds what it held"


def test_an_addition_is_cut_at_full_hours() -> None:
    amounts = Amounts(cpu_ns=7201, running_seconds=7200.0)
    parts = list(spread(Addition(WHO, WALL - 1800, WALL + 5400, amounts)))
    assert [(hour, part.begin, part.end) for hour, part in parts] == [
        (489_999, WALL - 1800, WALL),
        (490_000, WALL, WALL + 3600),
        (490_001, WALL + 3600, WALL + 5400),
    ]
    assert [part.amounts.cpu_ns for _, part in parts] == [1800, 3600, 1801]
    assert [part.amounts.running_seconds for _, part in parts] == [1800, 3600, 1800]


@pytest.mark.parametrize(("first", "last"), [(0.0, 0.0), (0.0, 3600.0), (-1.0, 0.0), (10.0, 10.0), (10.0, 20.0)])
def test_what_ends_with_an_hour_is_that_hours(first: float, last: float) -> None:
    parts = list(spread(Addition(WHO, WALL + first, WALL + last, Amounts(cpu_ns=5))))
    assert [hour for hour, _ in parts] == [490_000 if first >= 0 else 489_999]


@given(st.floats(0, 1e6), st.floats(0, 1e5), st.integers(0, 2**62), st.integers(0, 2**40))
def test_the_parts_add_up(first: float, length: float, many: int, few: int) -> None:
    amounts = Amounts(memory_byte_seconds=many, cpu_ns=few, running_seconds=length)
    parts = list(spread(Addition(WHO, WALL + first, WALL + first + length, amounts)))
    total = Amounts()
    for hour, part in parts:
        assert hour * 3600 <= part.begin <= part.end <= (hour + 1) * 3600
        assert min(part.amounts.memory_byte_seconds, part.amounts.cpu_ns) >= 0
        total = combined(total, part.amounts)
    assert (total.memory_byte_seconds, total.cpu_ns) == (many, few)
    assert total.running_seconds == pytest.approx(length)
