"""Copies of the store beside it: made while the store is whole, named in the hints about a store that is not.

    store.db.good      the newest: renewed when the store is opened, and once a day
    store.db.good.1    the newest of a day ago or more
    store.db.good.2    that of a week ago or more

A store that was lost and made again holds next to nothing. Its copy never replaces one that holds jails or tenants.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from urllib.parse import quote

DAY = 86400.0
WEEK = 7 * DAY
ENDINGS = (".good", ".good.1", ".good.2")
_HOLDS = (
    "SELECT EXISTS (SELECT 1 FROM jails) OR EXISTS (SELECT 1 FROM tenants WHERE name != 'default' OR config != '{}')"
)


class Damage(sqlite3.DatabaseError):
    """Damage found by jailmgr, not by SQLite."""


def open_reader(path: str, how: str = "") -> sqlite3.Connection:
    """Open a connection that only reads. Raises sqlite3.Error where it can't read.

    `how`: further URI parameters (https://www.sqlite.org/uri.html).
    """
    db = sqlite3.connect(f"file:{quote(path)}?mode=ro{how}", uri=True, timeout=5, check_same_thread=False)
    try:
        db.execute("SELECT count(*) FROM jails").fetchone()
    except BaseException:
        db.close()
        raise
    return db


def check_whole(db: sqlite3.Connection) -> None:
    """Check every page, index and reference. Raises sqlite3.Error, UnicodeError."""
    found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise Damage(" ".join(found.split()))
    if broken := db.execute("PRAGMA foreign_key_check").fetchone():
        raise Damage(f"a row of {broken[0]} refers to a row of {broken[2]} that is not there")


def renew(path: str, older_than: float = 0.0) -> None:
    """Renew the newest copy of an open store where it is that many seconds old, and move the older ones on.

    The copy is made whole or not at all, and never of a damaged store. Raises sqlite3.Error, UnicodeError, OSError.
    """
    newest = f"{path}.good"
    if _age(newest) < older_than:
        return
    new = f"{newest}.new"
    _unlink(new, f"{new}-journal")
    try:
        with closing(open_reader(path)) as store, closing(sqlite3.connect(new)) as copy:
            check_whole(store)
            os.chmod(new, 0o600)
            store.backup(copy)
        _move_on(path, holds(new))
        os.rename(new, newest)
    except BaseException:
        _unlink(new, f"{new}-journal")
        raise


def holds(path: str) -> bool:
    """Whether a copy can be read and holds jails, or tenants that somebody set up."""
    try:
        with closing(open_reader(path, "&immutable=1")) as db:
            return bool(db.execute(_HOLDS).fetchone()[0])
    except (sqlite3.Error, UnicodeError):
        return False


def best(path: str) -> str:
    """The newest copy that holds jails or tenants; empty where there is none."""
    return next((copy for ending in ENDINGS if holds(copy := f"{path}{ending}")), "")


def _move_on(path: str, new_holds: bool) -> None:
    """Move the newest copy to the next generation before it is replaced, where that is due, and that one on."""
    newest, day, week = (f"{path}{ending}" for ending in ENDINGS)
    if not os.path.exists(newest):
        return
    spared = holds(newest) and not new_holds
    if spared or _age(day) >= DAY:
        if os.path.exists(day) and _age(week) >= WEEK:
            _replace(day, week)
        _replace(newest, day)


def _replace(copy: str, older: str) -> None:
    if holds(copy) or not holds(older):
        os.rename(copy, older)


def _age(path: str) -> float:
    """Seconds since a file was written; infinite where there is none, or its time is yet to come."""
    try:
        age = time.time() - os.stat(path).st_mtime
    except FileNotFoundError:
        return float("inf")
    return age if age >= 0 else float("inf")


def _unlink(*paths: str) -> None:
    for path in paths:
        try:
            os.unlink(path)
        except FileNotFoundError:
            continue
