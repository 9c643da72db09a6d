"""Ways to damage a database of ours, each applied to its file while no engine has it open."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

PAGE = 4096
HEADER = 100
TAILS = ("", "-wal", "-shm")

Way = Callable[[Path, random.Random], None]


def remove(path: Path) -> None:
    """Take away what is there, whatever it is, with its log."""
    for tail in TAILS:
        at = Path(f"{path}{tail}")
        if at.is_dir() and not at.is_symlink():
            shutil.rmtree(at)
        else:
            at.unlink(missing_ok=True)


def _cut(size: Callable[[int], int]) -> Way:
    def cut(path: Path, _: random.Random) -> None:
        os.truncate(path, size(path.stat().st_size))

    return cut


def _overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def _zero_header(path: Path, _: random.Random) -> None:
    _overwrite(path, 0, bytes(HEADER))


def _scatter(count: int) -> Way:
    def scatter(path: Path, chance: random.Random) -> None:
        for _ in range(count):
            _overwrite(path, chance.randrange(path.stat().st_size), chance.randbytes(1))

    return scatter


def _big_table(path: Path) -> tuple[str, int]:
    """A table that holds what must not be lost, and the number of its first page."""
    with closing(sqlite3.connect(path)) as db:
        found = dict(db.execute("SELECT name, rootpage FROM sqlite_master WHERE type = 'table'").fetchall())
    name = "jails" if "jails" in found else "tracks"
    return name, int(found[name])


def _table_page(path: Path, chance: random.Random) -> None:
    _, page = _big_table(path)
    _overwrite(path, (page - 1) * PAGE, chance.randbytes(PAGE))


def _text(value: str) -> Way:
    """Put something into a text column of each row."""

    def put(path: Path, _: random.Random) -> None:
        name, _page = _big_table(path)
        column = "config" if name == "jails" else "boot"
        with closing(sqlite3.connect(path)) as db:
            db.execute(f"UPDATE {name} SET {column} = {value}")
            db.commit()

    return put


def _statement(text: str) -> Way:
    def run(path: Path, _: random.Random) -> None:
        with closing(sqlite3.connect(path)) as db:
            db.execute(text)
            db.commit()

    return run


def _another_applications(path: Path, _: random.Random) -> None:
    remove(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
        db.execute("INSERT INTO bookmarks VALUES ('https://example.org')")
        db.commit()


def _directory(path: Path, _: random.Random) -> None:
    remove(path)
    path.mkdir()
    (path / "file").write_text("x")


def _fifo(path: Path, _: random.Random) -> None:
    remove(path)
    os.mkfifo(path)


def _dangling_link(path: Path, _: random.Random) -> None:
    remove(path)
    path.symlink_to(f"{path}.nowhere/else")


def _log_of_another(path: Path, chance: random.Random) -> None:
    """A -wal that another database has left, with a frame for each of the first pages."""
    other = Path(f"{path}.other")
    with closing(sqlite3.connect(other, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE other (text TEXT)")
        db.executemany("INSERT INTO other VALUES (?)", [(chance.randbytes(2000).hex(),) for _ in range(30)])
        shutil.copy(f"{other}-wal", f"{path}-wal")
    remove(other)


WAYS: dict[str, Way] = {
    "missing": lambda path, _: remove(path),
    "0 bytes": _cut(lambda _: 0),
    "the header alone": _cut(lambda _: HEADER),
    "one page": _cut(lambda _: PAGE),
    "half": _cut(lambda size: size // 2),
    "header of zeros": _zero_header,
    "scattered bytes, 1": _scatter(40),
    "scattered bytes, 2": _scatter(400),
    "scattered bytes, 3": _scatter(4000),
    "a table's page": _table_page,
    "no UTF-8": _text("CAST(x'fffe80' AS TEXT)"),
    "no JSON": _text("'{\"limits.memory'"),
    "a newer version": _statement("PRAGMA user_version = 99"),
    "another application's": _another_applications,
    "a directory": _directory,
    "a FIFO": _fifo,
    "a dangling link": _dangling_link,
}
"""By a name for the test. What is found of the second group of bytes depends on where they fall."""
SILENT = ("scattered bytes, 1", "scattered bytes, 2", "scattered bytes, 3")
"""Ways that may change values and leave a database that is whole as SQLite sees it."""
LOG_OF_ANOTHER: Way = _log_of_another
