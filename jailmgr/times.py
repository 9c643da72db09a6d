"""Times as people write them: a date, a time of today, RFC 3339, or how long ago."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta, timezone

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGO = re.compile(r"(?:\d+(?:\.\d+)?[smhdw])+\Z", re.ASCII)
_PART = re.compile(r"(\d+(?:\.\d+)?)([smhdw])", re.ASCII)
_DATE = r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)"
_CLOCK = r"(?P<hour>\d\d):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:\.(?P<fraction>\d+))?)?"
_ZONE = r"(?P<zone>[Zz]|[+-]\d\d:\d\d)"
_TIME = re.compile(rf"(?:{_DATE})?(?:(?(year)[Tt ]){_CLOCK}(?(year){_ZONE}?))?\Z", re.ASCII)


def parse_time(text: str, now: float) -> float:
    """Seconds since the epoch of `2026-11-25`, `14:30`, `2026-11-25T14:30:00Z`, or `1h30m` and `30d`: so long ago.

    A time without an offset is the host's local one; `14:30` is that of today, a date its midnight. `now`: the same
    unit. ValueError tells what was expected.
    """
    said = text.strip()
    if _AGO.match(said):
        ago = now - sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(said))
        if ago < 0:
            raise ValueError(f"{text!r} is before 1970")
        return ago
    match = _TIME.match(said)
    if not said or match is None:
        raise ValueError(
            f"{text!r} is no time (a date as 2026-11-25, a time as 14:30, both as 2026-11-25T14:30:00Z,"
            " or how long ago: 90m, 24h, 30d)"
        )
    part = match.groupdict()
    today = datetime.fromtimestamp(now).astimezone()
    try:
        year, month, day = (int(part[name] or getattr(today, name)) for name in ("year", "month", "day"))
        hour, minute, second = (int(part[name] or 0) for name in ("hour", "minute", "second"))
        at = datetime(year, month, day, hour, minute, second, tzinfo=_zone(part["zone"]))
        # Without an offset: as local time is on that day, not today.
        seconds = (at if at.tzinfo else at.astimezone()).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"{text!r} is no time: {error}") from None
    return seconds + float(f"0.{part['fraction'] or 0}")


def _zone(text: str | None) -> timezone | None:
    if text is None:
        return None
    if text in "Zz":
        return UTC
    minutes = int(text[1:3]) * 60 + int(text[4:6])
    return timezone(timedelta(minutes=-minutes if text[0] == "-" else minutes))


def rfc3339(at: float) -> str:
    """Seconds since the epoch as RFC 3339, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
