"""The SQLite file behind the store: opened, checked, brought up to date, used by one transaction at a time.

WAL with `synchronous=FULL`: what was committed outlives a power cut (https://www.sqlite.org/pragma.html#pragma_synchronous).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from jailmgr.errors import JailmgrError

APPLICATION = 0x6A61696C
"""`jail`, in the file's header: some other program's database is not taken for ours."""
VERSION = 1


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

    Raises JailmgrError `failed` where the file can't be read; nothing is ever written to a damaged one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._depth = 0
        self._undone = 0
        self._db: sqlite3.Connection | None = None

    def open_to_read(self) -> None:
        """Open what another process may have open as well; nothing is written. JailmgrError as `open`."""
        try:
            db = sqlite3.connect(f"file:{quote(self.path)}?mode=ro", uri=True, timeout=5, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._damaged(error) from error
        try:
            db.execute("SELECT count(*) FROM jails").fetchone()
        except sqlite3.Error as error:
            db.close()
            raise self._damaged(error) from error
        self._db = db

    def open(self) -> None:
        """Open, check, and bring the schema up to ours. A copy of the last good store is left beside it (`.good`)."""
        if self._db is not None:
            return
        new = not os.path.exists(self.path)
        try:
            db = _connect(self.path)
        except sqlite3.Error as error:
            raise self._damaged(error) from error
        try:
            _migrate(db, self.path, new)
            found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            os.chmod(self.path, 0o600)
            if not new:
                _keep_copy(db, f"{self.path}.good")
        except sqlite3.Error as error:
            db.close()
            raise self._damaged(error) from error
        except BaseException:
            db.close()
            raise
        self._db = db

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
            except sqlite3.OperationalError as error:
                full = "full" in str(error)
                hint = "Free some space on the host." if full else ""
                raise JailmgrError(f"store {self.path}", str(error), hint, "full" if full else "failed") from error
            except sqlite3.DatabaseError as error:
                raise self._damaged(error) from error

    def version(self) -> tuple[int, int, int]:
        """Another one after every change, ours or another process's, and after each of ours that was taken back."""
        if self._db is None:
            return -1, -1, -1
        (others,) = self._db.execute("PRAGMA data_version").fetchone()
        return others, self._db.total_changes, self._undone

    def select(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            if self._db is None:
                raise JailmgrError(f"store {self.path}", "it is not open", "", "unavailable")
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> JailmgrError:
        good = f"{self.path}.good"
        hint = "Nothing was changed: jails that run go on, volumes are in the pool. "
        if os.path.exists(good):
            hint += f"The last good copy is {good}: keep {self.path} aside and put the copy in its place."
        else:
            hint += "Put a copy of the file back from a backup."
        return JailmgrError(f"store {self.path}", f"it can't be read: {error}", hint)


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
        raise sqlite3.DatabaseError("it is not a store of jailmgr")
    elif version > VERSION:
        why = f"its version is {version}, this jailmgr knows {VERSION}"
        raise JailmgrError(f"store {path}", why, "Use the newer jailmgr it was made by.")


def _keep_copy(db: sqlite3.Connection, path: str) -> None:
    new = f"{path}.new"
    if os.path.exists(new):
        os.unlink(new)
    copy = sqlite3.connect(new)
    try:
        os.chmod(new, 0o600)
        db.backup(copy)
    finally:
        copy.close()
    os.rename(new, path)
