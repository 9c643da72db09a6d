"""The SQLite file behind the store: opened, checked, brought up to date, used by one transaction at a time.

WAL with `synchronous=FULL`: what was committed outlives a power cut (https://www.sqlite.org/pragma.html#pragma_synchronous).
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from jailmgr import store_copies
from jailmgr.errors import JailmgrError
from jailmgr.store_copies import Damage, check_whole, open_reader

COPY_SECONDS = 86400.0
"""How old the copy of the store may be while it is open."""
APPLICATION = 0x6A61696C
"""`jail`, in the file's header: some other program's database is not taken for ours."""
VERSION = 1

log = logging.getLogger(__name__)

_Made = TypeVar("_Made")

_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
"""Extended result codes. The second: no room for `-shm`, without which the store can't be opened."""
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
"""Result codes, as are the keys of `_HINTS`. SQLITE_ERROR: our statements are right, so the schema or a text is not."""
_UNREADABLE = (sqlite3.Error, UnicodeError)
"""What reading raises. UnicodeError: the error's own text quotes bytes of the damaged file."""
_FILE_SYSTEM = (
    "See whether its file system is full, read-only or failing (df, df -i, dmesg), and leave the file as it is."
)
_LOCKED = "Another process has it locked: try again."
_HINTS = {
    sqlite3.SQLITE_FULL: "Free some space on the host, and leave the file as it is.",
    sqlite3.SQLITE_IOERR: _FILE_SYSTEM,
    sqlite3.SQLITE_CANTOPEN: _FILE_SYSTEM,
    sqlite3.SQLITE_READONLY: _FILE_SYSTEM,
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_NOMEM: "The host is short of memory: try again.",
}
"""What to do where the host can't, and the store is as good as it was (https://www.sqlite.org/rescode.html)."""

# No table is WITHOUT ROWID: the quick_check of SQLite 3.40 (Debian 12) takes one whose key begins with a later column
# for damaged.
_SCHEMA = """
CREATE TABLE tenants (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, created_at REAL NOT NULL,
    uid INTEGER NOT NULL, config TEXT NOT NULL);
CREATE TABLE networks (id INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL REFERENCES tenants(name),
    name TEXT NOT NULL, ipv4 TEXT NOT NULL, ipv6 TEXT NOT NULL, kind TEXT NOT NULL, UNIQUE (tenant, name));
CREATE TABLE images (fingerprint TEXT PRIMARY KEY, key TEXT NOT NULL, created_at REAL NOT NULL, image BLOB NOT NULL);
CREATE TABLE aliases (alias TEXT PRIMARY KEY,
    fingerprint TEXT NOT NULL REFERENCES images(fingerprint) ON DELETE CASCADE);
CREATE TABLE jails (id INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL REFERENCES tenants(name),
    name TEXT NOT NULL, state TEXT NOT NULL, next TEXT, image TEXT NOT NULL, source TEXT NOT NULL,
    created_at REAL NOT NULL, config TEXT NOT NULL, devices TEXT NOT NULL, idmap_base INTEGER NOT NULL,
    UNIQUE (tenant, name), UNIQUE (tenant, next));
CREATE TABLE nics (jail INTEGER NOT NULL REFERENCES jails(id) ON DELETE CASCADE, name TEXT NOT NULL,
    network INTEGER NOT NULL REFERENCES networks(id), network_name TEXT NOT NULL, veth TEXT NOT NULL UNIQUE,
    mac TEXT NOT NULL, ipv4 TEXT NOT NULL, ipv6 TEXT NOT NULL,
    PRIMARY KEY (jail, name), UNIQUE (network, ipv4), UNIQUE (network, ipv6));
CREATE TABLE ports (jail INTEGER NOT NULL REFERENCES jails(id) ON DELETE CASCADE, host_address TEXT NOT NULL,
    host_port INTEGER NOT NULL, port INTEGER NOT NULL, protocol TEXT NOT NULL,
    PRIMARY KEY (protocol, host_port, host_address));
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Database:
    """The open file. All calls may come from any thread; each is one transaction, or part of the caller's.

    Raises JailmgrError `failed` where the file is damaged, to which nothing is ever written; `full` where the disk is,
    `unavailable` where the host can't for another reason.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._depth = 0
        self._undone = 0
        self._db: sqlite3.Connection | None = None

    def open_to_read(self, quiet: bool = False) -> None:
        """Open what another process may have open as well; nothing is written. JailmgrError as `open`.

        Even a reader makes a `-shm`. `quiet`: where it can't, read without, as long as all is in the file itself. What
        another process then begins to write isn't seen, so nothing may be deleted for what was read.
        """
        self._refuse_odd_file()
        try:
            try:
                self._db = open_reader(self.path)
            except sqlite3.OperationalError:
                if not quiet or _size(f"{self.path}-wal"):
                    raise
                self._db = open_reader(self.path, "&immutable=1")
        except _UNREADABLE as error:
            raise self._refused(error) from error

    def open(self, copy: bool = True) -> None:
        """Open, check, and bring the schema up to ours. With `copy`, the copy of the last good store is renewed."""
        if self._db is not None:
            return
        self._refuse_odd_file()
        new = not os.path.exists(self.path)
        try:
            db = _connect(self.path)
        except _UNREADABLE as error:
            raise self._refused(error) from error
        try:
            _migrate(db, self.path, new)
            check_whole(db)
            os.chmod(self.path, 0o600)
            self._db = db
            self.verify()
        except _UNREADABLE as error:
            self._db = None
            db.close()
            raise self._refused(error) from error
        except BaseException:
            self._db = None
            db.close()
            raise
        if copy and not new:
            self.renew_copy()

    def verify(self) -> None:
        """Read all rows once and check what they hold, as the file is opened. Raises JailmgrError, Damage."""

    def renew_copy(self, older_than: float = 0.0) -> None:
        """Renew the copies where the newest is that many seconds old. A failure is logged, and changes none of them.

        Nobody waits: a connection of its own reads, and WAL lets others write meanwhile.
        """
        try:
            store_copies.renew(self.path, older_than)
        except (*_UNREADABLE, OSError) as error:
            log.warning("store %s could not be copied to %s.good: %s", self.path, self.path, error)

    def is_blank(self) -> bool:
        """Whether the file is not there, or holds nothing at all: no schema was ever written to it."""
        self._refuse_odd_file()
        # SQLite deletes the log beside an empty file, which may be all that is left: it is not asked about one.
        if not _size(self.path):
            return True
        try:
            db = sqlite3.connect(self.path, timeout=5)
            try:
                return not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            finally:
                db.close()
        except _UNREADABLE as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Fold the log into the file and close. Fine if it isn't open."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All calls in it take effect together, or none. Nested ones join the outer."""
        with self._lock:
            db = self._db
            if db is None:
                raise JailmgrError(f"store {self.path}", "it is not open", "", "unavailable")
            if self._depth:
                yield db
                return
            try:
                db.execute("BEGIN IMMEDIATE")
                self._depth = 1
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    self._undone += 1
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
                finally:
                    self._depth = 0
            except sqlite3.IntegrityError:
                raise
            except _UNREADABLE as error:
                raise self._refused(error) from error

    def version(self) -> tuple[int, int, int]:
        """Another one after every change, ours or another process's, and after each of ours that was taken back."""
        if self._db is None:
            return -1, -1, -1
        try:
            (others,) = self._db.execute("PRAGMA data_version").fetchone()
        except _UNREADABLE as error:
            raise self._refused(error) from error
        return others, self._db.total_changes, self._undone

    def select(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            if self._db is None:
                raise JailmgrError(f"store {self.path}", "it is not open", "", "unavailable")
            try:
                return self._db.execute(query, values).fetchall()
            except _UNREADABLE as error:
                raise self._refused(error) from error

    def read(self, make: Callable[[Any], _Made], query: str, *values: object) -> list[_Made]:
        """`select`, with `make` applied to each row; what `make` can't read is damage (msgspec's errors)."""
        rows = self.select(query, *values)
        try:
            return [make(row) for row in rows]
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise self._damaged(error) from error

    def _refuse_odd_file(self) -> None:
        """Refuse a directory or a FIFO in the file's place: opening the latter would wait for a writer."""
        try:
            mode = os.stat(self.path).st_mode
        except OSError:
            return
        if not stat.S_ISREG(mode):
            raise self._damaged(Damage("it is not a file"))

    def _refused(self, error: Exception) -> JailmgrError:
        """SQLite's error as ours. Only the hint about a damaged store names a copy: to put one in place loses data."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)  # sqlite3's own errors have none
        if isinstance(error, Damage | UnicodeError) or code & 0xFF in _DAMAGED:
            return self._damaged(error)
        if code in _FULL:
            why = f"its disk has no room: {error}"
            return JailmgrError(f"store {self.path}", why, _HINTS[sqlite3.SQLITE_FULL], "full")
        hint = _HINTS.get(code & 0xFF, "")
        return JailmgrError(f"store {self.path}", str(error), hint, "unavailable" if hint else "failed")

    def _damaged(self, error: Exception) -> JailmgrError:
        hint = f"Nothing was changed: jails that run go on, volumes are in the pool. {self.remedy()}"
        return JailmgrError(f"store {self.path}", f"it can't be read: {error}", hint)

    def remedy(self) -> str:
        """What to do about a damaged or lost store, as a hint."""
        if copy := store_copies.best(self.path):
            # SQLite would put what a log left beside it holds of the damaged file into the copy.
            aside = f"move {self.path} aside, with its -wal and -shm if there are any"
            return f"The last good copy is {copy}: {aside}, and put the copy in its place."
        return "Put a copy of the file back from a backup."


def _connect(path: str) -> sqlite3.Connection:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    db = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
    except BaseException:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection, path: str, new: bool) -> None:
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if not tables and (new or version == 0):
        db.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; COMMIT"
        )
    elif application != APPLICATION:
        raise Damage("it is not a store of jailmgr")
    elif version > VERSION:
        why = f"its version is {version}, this jailmgr knows {VERSION}"
        raise JailmgrError(f"store {path}", why, "Use the newer jailmgr it was made by.")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
