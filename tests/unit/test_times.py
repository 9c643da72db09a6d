"""Times as people write them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from jailmgr.times import parse_time

NOW = 1_764_066_600.0
"""2025-11-25T10:30:00Z, 11:30 in Vienna."""


@pytest.fixture(autouse=True)
def vienna(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2025-11-25T10:30:00Z", NOW),
        ("2025-11-25t10:30:00z", NOW),
        ("2025-11-25 10:30:00.250Z", NOW + 0.25),
        ("2025-11-25T12:30:00+02:00", NOW),
        ("2025-11-25T06:00-04:30", NOW),
        ("2025-11-25T11:30", NOW),
        ("11:30", NOW),
        ("11:30:09", NOW + 9),
        ("2025-11-25", NOW - 11.5 * 3600),
        ("2025-07-01T12:00", 1_751_364_000.0),  # summer time then, whatever it is now
        ("90s", NOW - 90),
        ("1h", NOW - 3600),
        ("1h30m", NOW - 5400),
        ("1.5h", NOW - 5400),
        (" 30d ", NOW - 30 * 86400),
        ("2w", NOW - 14 * 86400),
    ],
)
def test_a_time_is_read(text: str, seconds: float) -> None:
    assert parse_time(text, NOW) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize(
    "text",
    ["", "h", "1", "1y", "-1h", "1h ago", "yesterday", "2025-13-01", "2025-02-30", "25:00", "10:60", "14:30Z",
     "2025-11-25T", "T14:30", "20251125", "2025-11-25T10:30:00+99:00", "99999w", "0001-01-01", "١٠:٣٠"],
)  # fmt: skip
def test_what_is_no_time_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"^'"):
        parse_time(text, NOW)
