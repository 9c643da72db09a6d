"""Usage by the hour, and how far each jail has been counted, in a SQLite file of its own.

It is written once a minute, which the store would pay for: each write of that makes `list` read all rows again. WAL
with `synchronous=FULL` is one fsync(2) for each sample of all jails; with NORMAL a power cut would take back all
samples since the last checkpoint, of which there may be forty.

A file that can't be read is set aside, and a new one begun: nothing of it is worth an engine that doesn't start.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from jailmgr.errors import JailmgrError, from_os
from jailmgr.manager.metering import FIELDS, HOUR, Addition, Amounts, JailUsage, Subject, Track, UsageRecord, spread

APPLICATION = 0x6A757365
"""`juse`, in the file's header."""
VERSION = 1
KEPT_HOURS = 400 * 24

_COLUMNS = ", ".join(FIELDS)
_SCHEMA = """
CREATE TABLE subjects (id INTEGER PRIMARY KEY, tenant_id INTEGER NOT NULL, tenant TEXT NOT NULL,
    jail_id INTEGER NOT NULL, jail TEXT NOT NULL, last_hour INTEGER NOT NULL,
    UNIQUE (tenant_id, tenant, jail_id, jail));
CREATE TABLE buckets (hour INTEGER NOT NULL, subject INTEGER NOT NULL, first REAL NOT NULL, last REAL NOT NULL,
    cpu_ns INTEGER NOT NULL, memory_byte_seconds INTEGER NOT NULL, disk_byte_seconds INTEGER NOT NULL,
    received_bytes INTEGER NOT NULL, sent_bytes INTEGER NOT NULL, running_seconds REAL NOT NULL,
    PRIMARY KEY (hour, subject)) WITHOUT ROWID;
CREATE TABLE tracks (jail INTEGER PRIMARY KEY, boot TEXT NOT NULL, "at" REAL NOT NULL, run TEXT NOT NULL,
    run_at REAL NOT NULL, cpu_ns INTEGER NOT NULL, received INTEGER NOT NULL, sent INTEGER NOT NULL,
    memory INTEGER NOT NULL, disk INTEGER NOT NULL, taken TEXT NOT NULL);
"""
_ADD = (
    f"INSERT INTO buckets (hour, subject, first, last, {_COLUMNS}) VALUES (?, ?, ?, ?, {', '.join('?' * len(FIELDS))})"
    " ON CONFLICT (hour, subject) DO UPDATE SET first = min(first, excluded.first), last = max(last, excluded.last), "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in FIELDS)
)
_TRACK = f"INSERT OR REPLACE INTO tracks VALUES (?, {', '.join('?' * len(Track._fields))})"
# A bucket's share of a span is what lies in it of the time that the bucket tells of, not of the whole hour.
_SHARE = "CASE WHEN last > first THEN (min(last, :until) - max(first, :since)) / (last - first) ELSE 1.0 END"
_WITHIN = (
    f"SELECT subject, max(hour), {', '.join(f'total({name})' for name in FIELDS)} FROM buckets"
    " WHERE hour > :first_hour AND hour < :last_hour GROUP BY subject"
)
_AT_ITS_ENDS = (
    f"SELECT subject, hour, {', '.join(f'{name} * {_SHARE}' for name in FIELDS)} FROM buckets"
    " WHERE hour IN (:first_hour, :last_hour) AND first <= :until AND last >= :since"
)

log = logging.getLogger(__name__)


class UsageStore:
    """The open file. One caller at a time. Every call opens it where it is not, and may raise JailmgrError.

    What could not be written was not written in part, and the file is looked at anew by the next call.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._db: sqlite3.Connection | None = None
        self._subjects: dict[Subject, tuple[int, int]] = {}
        """Each with its id and the last hour it is known to have been used in."""

    def open(self) -> None:
        """Open and check; a damaged file, or a newer release's, is set aside with a logged error."""
        if self._db is not None:
            return
        try:
            self._db = _open_checked(self.path)
        except (sqlite3.Error, UnicodeError) as error:
            if not _is_damage(self.path, error):
                raise self._unavailable(error) from error
            try:
                aside = _set_aside(self.path)
                log.error("usage %s can't be read (%s): set aside as %s, and begun anew", self.path, error, aside)
                self._db = _open_checked(self.path)
            except OSError as failed:
                raise from_os(f"usage {self.path}", failed) from failed
            except (sqlite3.Error, UnicodeError) as failed:
                raise self._unavailable(failed) from failed

    def close(self) -> None:
        """Fold the log into the file and close. Fine if it isn't open."""
        if self._db is not None:
            self._db.close()
            self._db = None
            self._subjects.clear()

    def tracks(self) -> dict[int, Track]:
        """How far each jail has been counted, by its id."""
        with self._opened() as db:
            return {jail: Track(*track) for jail, *track in db.execute("SELECT * FROM tracks")}

    def write(self, tracks: dict[int, Track], additions: Iterable[Addition], lasting: bool = True) -> None:
        """Add to the buckets, and note up to where that was: together, or not at all.

        On return it is there to stay; without `lasting`, a power cut takes it back unless more was written after it.
        """
        with self._opened() as db:
            db.execute(f"PRAGMA synchronous = {'FULL' if lasting else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            for addition in additions:
                if addition.amounts != Amounts():
                    self._add(db, addition)
            db.executemany(_TRACK, [(jail, *track) for jail, track in tracks.items()])
            db.execute("COMMIT")

    def tidy(self, jails: set[int], now: float) -> None:
        """Forget how far jails were counted that are not among these, and usage of more than 400 days ago.

        Of that an hour's at a time: a clock that is wrong for a moment doesn't cost all there is.
        """
        with self._opened() as db:
            gone = [jail for (jail,) in db.execute("SELECT jail FROM tracks") if jail not in jails]
            (first,) = db.execute("SELECT min(hour) FROM buckets").fetchone()
            kept = int(now // HOUR) - KEPT_HOURS
            if not gone and (first is None or first >= kept):
                return
            db.execute("BEGIN IMMEDIATE")
            db.executemany("DELETE FROM tracks WHERE jail = ?", [(jail,) for jail in gone])
            if first is not None and first < kept:
                db.execute("DELETE FROM buckets WHERE hour = ?", (first,))
                db.execute("DELETE FROM subjects WHERE last_hour <= ?", (first,))
                self._subjects.clear()
            db.execute("COMMIT")

    def usage(self, tenant: str | None, since: float, until: float) -> list[UsageRecord]:
        """What was used between two times, by tenant; a bucket that lies partly between them by its share."""
        span = {"since": since, "until": until, "first_hour": int(since // HOUR), "last_hour": int(until // HOUR)}
        used: dict[int, list[float]] = {}
        last_hours: dict[int, int] = {}
        with self._opened() as db:
            for subject, hour, *values in (*db.execute(_WITHIN, span), *db.execute(_AT_ITS_ENDS, span)):
                used[subject] = [a + b for a, b in zip(used.get(subject, [0.0] * len(values)), values, strict=True)]
                last_hours[subject] = max(hour, last_hours.get(subject, hour))
            subjects = db.execute("SELECT id, tenant_id, tenant, jail_id, jail FROM subjects ORDER BY id").fetchall()
        tenants: dict[tuple[str, int], dict[int, JailUsage]] = {}
        # A jail that was renamed has several, of which the last tells its name.
        for ident, *who in sorted((row for row in subjects if row[0] in used), key=lambda row: last_hours[row[0]]):
            subject = Subject(*who)
            if tenant in (None, subject.tenant):
                jails = tenants.setdefault((subject.tenant, subject.tenant_id), {})
                jails[subject.jail_id] = _with(jails.get(subject.jail_id), subject, used[ident])
        return [
            UsageRecord(tenant_id=ident, tenant=name, jails=[jails[jail] for jail in sorted(jails)], **_totals(jails))
            for (name, ident), jails in sorted(tenants.items())
        ]

    def _add(self, db: sqlite3.Connection, addition: Addition) -> None:
        for hour, part in spread(addition):
            values = [getattr(part.amounts, name) for name in FIELDS]
            db.execute(_ADD, (hour, self._subject(db, part.subject, hour), part.begin, part.end, *values))

    def _subject(self, db: sqlite3.Connection, subject: Subject, hour: int) -> int:
        ident, known = self._subjects.get(subject, (0, -1))
        if known < hour:
            query = (
                "INSERT INTO subjects (tenant_id, tenant, jail_id, jail, last_hour) VALUES (?, ?, ?, ?, ?) ON CONFLICT"
                " DO UPDATE SET last_hour = max(last_hour, excluded.last_hour) RETURNING id, last_hour"
            )
            ident, last = db.execute(query, (*subject, hour)).fetchone()
            self._subjects[subject] = (ident, last)
        return ident

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        self.open()
        assert self._db is not None
        try:
            yield self._db
        except (sqlite3.Error, OverflowError, UnicodeError) as error:
            self.close()
            raise self._unavailable(error) from error
        except BaseException:
            self.close()
            raise

    def _unavailable(self, error: Exception) -> JailmgrError:
        full = "full" in str(error)
        hint = "Free some space on the host." if full else ""
        return JailmgrError(f"usage {self.path}", str(error), hint, "full" if full else "unavailable")


def _open_checked(path: str) -> sqlite3.Connection:
    """Raises sqlite3.Error, UnicodeError; `_is_damage` says whether of the file or of the host."""
    if not _is_file(path):
        raise sqlite3.DatabaseError("it is not a file")
    db = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    try:
        os.chmod(path, 0o600)
        db.execute("PRAGMA journal_mode = WAL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        application = db.execute("PRAGMA application_id").fetchone()[0]
        if (version, application) == (0, 0) and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            about = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION};"
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {about} COMMIT")
        elif (version, application) != (VERSION, APPLICATION):
            raise sqlite3.DatabaseError(f"it is none of version {VERSION}")
        found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(" ".join(found.split()))
        try:
            for _, *track in db.execute("SELECT * FROM tracks"):
                msgspec.convert(track, Track)
        except msgspec.ValidationError as error:
            raise sqlite3.DatabaseError(str(error)) from error
    except BaseException:
        db.close()
        raise
    return db


def _is_file(path: str) -> bool:
    """Whether it is a file, or not there. Opening a FIFO would wait for a writer; a dangling link is neither."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return not os.path.islink(path)


def _is_damage(path: str, error: Exception) -> bool:
    """Whether the file is at fault, which another one cures; a full disk or a lock is the host's trouble and passes."""
    if not isinstance(error, sqlite3.OperationalError):
        return True
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR):
        return True
    if code not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
        return False
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                continue
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _set_aside(path: str) -> str:
    """Rename the file, its log with it: a new file would take that for its own. Raises OSError."""
    aside = f"{path}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    for tail in ("-wal", "-shm", ""):
        try:
            os.rename(f"{path}{tail}", f"{aside}{tail}")
        except FileNotFoundError:
            continue
    return aside


def _with(jail: JailUsage | None, subject: Subject, values: list[float]) -> JailUsage:
    """A jail's usage, with what it has used by this name."""
    amounts: dict[str, Any] = {
        name: value if name == "running_seconds" else round(value) for name, value in zip(FIELDS, values, strict=True)
    }
    if jail is not None:
        amounts = {name: value + getattr(jail, name) for name, value in amounts.items()}
    return JailUsage(jail_id=subject.jail_id, jail=subject.jail, **amounts)


def _totals(jails: dict[int, JailUsage]) -> dict[str, Any]:
    return {name: sum(getattr(jail, name) for jail in jails.values()) for name in FIELDS}
