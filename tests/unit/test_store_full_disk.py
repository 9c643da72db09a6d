"""The store where the host can't: its disk is full or read-only, another has a lock. It isn't called damaged."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jailmgr.config import find_root
from jailmgr.database import COPY_SECONDS
from jailmgr.errors import JailmgrError
from jailmgr.manager.boot import shut_down
from jailmgr.store import READY, Store

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="it mounts a small disk")
ROOM = 64 << 10
"""Bytes: enough for the store's `-shm` and `-wal`, not for a copy of it."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """With 100 jails, closed."""
    made = _make(f"{tmp_path}/store.db")
    yield made
    made.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """Of 4 MiB."""
    at = f"{tmp_path}/disk"
    os.mkdir(at)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", at], check=True)
    yield at
    subprocess.run(["umount", "--lazy", at], check=True)


@pytest.fixture
def small(disk: str) -> Iterator[Store]:
    """The same on such a disk."""
    made = _make(f"{disk}/store.db")
    yield made
    made.close()


def _make(path: str) -> Store:
    store = Store(path)
    store.open()
    store.add_tenant("default", {}, 1000)
    with store.transaction():
        for number in range(100):
            _add(store, f"j{number}")
    store.close()
    assert os.path.getsize(path) > ROOM + (16 << 10)
    return store


def _add(store: Store, name: str) -> None:
    store.set_state(store.reserve("default", name, "debian", {"user.a": "b" * 500}, {}), READY)


def _fill(store: Store, left: int = 0) -> Path:
    """Write until the disk is full but for so many bytes; the file to delete."""
    filler = Path(store.path).with_name("filler")
    with open(filler, "wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"x" * 4096)
        file.truncate(file.tell() - left)
    return filler


def _names(path: str) -> set[str]:
    read = Store(path)
    read.open_to_read()
    try:
        return {jail.name for jail in read.jails()}
    finally:
        read.close()


def _refused(store: Store, code: str) -> JailmgrError:
    with pytest.raises(JailmgrError) as caught:
        store.open()
    error = caught.value
    assert error.code == code, error
    assert error.hint
    assert ".good" not in error.hint
    assert "backup" not in error.hint
    return error


@needs_root
def test_no_room_for_the_copy(small: Store, caplog: pytest.LogCaptureFixture) -> None:
    small.open()
    small.close()
    before = Path(f"{small.path}.good").read_bytes()
    _fill(small, ROOM)
    small.open()
    (told,) = caplog.records
    assert told.levelno == logging.WARNING
    assert "full" in told.getMessage()
    assert len(small.jails()) == 100
    assert Path(f"{small.path}.good").read_bytes() == before
    assert not [name for name in os.listdir(os.path.dirname(small.path)) if ".new" in name]
    with pytest.raises(JailmgrError) as caught:
        small.set_fact("large", "x" * 2 * ROOM)
    assert (caught.value.code, bool(caught.value.hint)) == ("full", True)
    assert small.fact("large") == ""


@needs_root
@pytest.mark.parametrize("left", [0, 4096, 16 << 10])
def test_no_room_to_open_at_all(small: Store, left: int) -> None:
    small.open()
    small.close()
    before = Path(small.path).read_bytes()
    filler = _fill(small, left)
    assert "space" in _refused(small, "full").hint
    assert Path(small.path).read_bytes() == before
    with pytest.raises(JailmgrError) as caught:
        Store(small.path).open_to_read()
    assert caught.value.code == "full"
    filler.unlink()
    small.open()
    assert len(small.jails()) == 100


@needs_root
def test_no_room_for_a_new_store(small: Store) -> None:
    filler = _fill(small)
    store = Store(f"{os.path.dirname(small.path)}/new.db")
    _refused(store, "full")
    filler.unlink()
    store.open()
    assert store.tenants() == []
    store.close()


@needs_root
def test_reading_on_a_full_disk_where_nobody_writes(small: Store) -> None:
    _fill(small, 4096)
    small.open_to_read(quiet=True)
    assert len(small.jails()) == 100


@needs_root
def test_a_host_goes_down_with_its_disk_full(disk: str) -> None:
    """The keys that say how its jails are stopped are read all the same."""
    root = find_root(disk)
    _fill(_make(root.store))
    assert shut_down(root) == []


@needs_root
def test_what_a_killed_engine_left_in_the_log_is_not_missed(small: Store) -> None:
    small.open()
    _add(small, "late")
    for tail in ("", "-wal"):
        shutil.copy(f"{small.path}{tail}", f"{small.path}.killed{tail}")
    small.close()
    killed = Store(f"{small.path}.killed")
    filler = _fill(small)
    with pytest.raises(JailmgrError) as caught:
        killed.open_to_read(quiet=True)
    assert caught.value.code == "full"
    filler.unlink()
    killed.open_to_read(quiet=True)
    assert "late" in {jail.name for jail in killed.jails()}
    killed.close()


@needs_root
def test_a_disk_that_is_mounted_read_only(small: Store) -> None:
    disk = os.path.dirname(small.path)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert "file system" in _refused(small, "unavailable").hint
    small.open_to_read(quiet=True)
    assert len(small.jails()) == 100


def test_another_process_lock(store: Store) -> None:
    store.open()
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store.select("PRAGMA busy_timeout = 0")
    with pytest.raises(JailmgrError) as caught:
        store.set_fact("a", "b")
    other.close()
    assert caught.value.code == "unavailable"
    assert ".good" not in caught.value.hint


def test_the_copy_is_renewed_once_a_day_while_the_store_is_open(store: Store) -> None:
    store.open()
    good = f"{store.path}.good"
    assert os.stat(good).st_mode & 0o777 == 0o600
    _add(store, "today")
    store.renew_copy(COPY_SECONDS)
    assert "today" not in _names(good)
    written = os.stat(good).st_mtime
    for moved in (-COPY_SECONDS - 60, 1e6):  # the other: by a clock that has been set back since
        os.utime(good, (written + moved, written + moved))
        store.renew_copy(COPY_SECONDS)
        assert abs(os.stat(good).st_mtime - written) < 600
        assert "today" in _names(good)


def test_the_copy_waits_for_nobody(store: Store) -> None:
    store.open()
    with ThreadPoolExecutor(1) as thread, store.transaction():
        _add(store, "half done")
        thread.submit(store.renew_copy).result(3)
    assert len(_names(f"{store.path}.good")) == 100


def test_a_store_that_is_damaged_while_open_is_not_copied(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.open()
    good = Path(f"{store.path}.good")
    before = good.read_bytes()
    ((page,),) = store.select("SELECT rootpage FROM sqlite_master WHERE name = 'images'")
    Path(store.path).write_bytes(before[: (page - 1) * 4096] + b"\xff" * 4096 + before[page * 4096 :])
    store.renew_copy()
    assert [told.levelno for told in caplog.records] == [logging.WARNING]
    assert good.read_bytes() == before
