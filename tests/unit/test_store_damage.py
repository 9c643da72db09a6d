"""A store that is damaged, empty or lost, and the copies of it that are left."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jailmgr import store_copies
from jailmgr.errors import JailmgrError
from jailmgr.model import Image, Network, Nic, Recipe
from jailmgr.store import READY, Store
from jailmgr.store_copies import DAY

IMAGE = Image("ab" * 32, "busybox", ["busybox"], 1, 2.0, "x86_64", Recipe())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"{tmp_path}/store.db")
    opened.open()
    opened.add_tenant("default", {}, 1000)
    yield opened
    opened.close()


def _fill(store: Store) -> None:
    store.put_image(IMAGE)
    network = store.add_network(
        "default", "default", lambda ident: Network(ident, "default", "default", "10.1.1.1/24", "fd00::1/64")
    )
    for number in range(2, 32):
        with store.transaction():
            jail = store.reserve("default", f"j{number}", "busybox", {"user.ü": "é" * 30}, {"root": {"type": "disk"}})
            nic = Nic("eth0", "default", f"v{number}", "0a:00:00:00:00:01", f"10.1.1.{number}", f"fd00::{number:x}")
            store.set_nics(jail, [(network, nic)])
            store.set_state(jail, READY)


@pytest.mark.parametrize("seed", range(60))
def test_scattered_bad_bytes_are_damage_or_change_nothing_that_is_read(store: Store, seed: int) -> None:
    _fill(store)
    store.close()
    chance, path = random.Random(seed), Path(store.path)
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 3, 10, 60])):
        content[chance.randrange(100, len(content))] = chance.randrange(256)
    path.write_bytes(content)
    error = _refused(store)
    if error is not None:
        assert error.why.startswith("it can't be read"), (seed, error)
        assert "Put a copy" in error.hint, (seed, error.hint)
        assert "\n" not in error.why
        assert path.read_bytes() == content


def _refused(store: Store) -> JailmgrError | None:
    """The error of opening the store and reading all of it; any other exception fails the test."""
    try:
        store.open()
        for read in (store.rows, store.tenants, store.networks, store.images, store.ports, store.count_nics):
            read()
    except JailmgrError as error:
        return error
    return None


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE jails SET idmap_base = 'many'",
        "UPDATE jails SET config = '{\"a\": 1}'",
        "UPDATE jails SET config = CAST(X'7bff7d' AS TEXT)",
        "UPDATE jails SET state = 'reaby'",
        "UPDATE nics SET ipv4 = '10.1.1.' || jail || 'x'",
        "UPDATE networks SET ipv6 = 'fd00::1/640'",
        "UPDATE images SET image = X'00'",
        "UPDATE tenants SET uid = X'00'",
        "DELETE FROM networks",
        "DROP TABLE ports",
    ],
)
def test_what_sqlite_takes_and_jailmgr_cannot_read_is_damage(store: Store, change: str) -> None:
    _fill(store)
    store.close()
    store.open()
    copy = Path(f"{store.path}.good").read_bytes()
    store.close()
    db = sqlite3.connect(store.path)
    db.execute(change)
    db.commit()
    db.close()
    with pytest.raises(JailmgrError) as caught:
        store.open()
    assert caught.value.why.startswith("it can't be read")
    assert f"{store.path}.good" in caught.value.hint
    assert Path(f"{store.path}.good").read_bytes() == copy


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_directory_or_a_fifo_is_no_store(tmp_path: Path, make: Callable[[str], None]) -> None:
    store = Store(f"{tmp_path}/odd.db")
    make(store.path)
    for open_ in (store.open, store.open_to_read):
        with pytest.raises(JailmgrError) as caught:
            open_()
        assert caught.value.hint


def test_blank(store: Store, tmp_path: Path) -> None:
    assert not store.is_blank()
    assert Store(f"{tmp_path}/none.db").is_blank()
    (tmp_path / "empty.db").touch()
    (tmp_path / "empty.db-wal").write_bytes(b"all that is left")
    assert Store(f"{tmp_path}/empty.db").is_blank()
    assert (tmp_path / "empty.db-wal").read_bytes() == b"all that is left"
    sqlite3.connect(tmp_path / "made.db").execute("VACUUM").connection.close()
    assert Store(f"{tmp_path}/made.db").is_blank()


def _jails(path: str) -> int:
    db = sqlite3.connect(path)
    try:
        return int(db.execute("SELECT count(*) FROM jails").fetchone()[0])
    finally:
        db.close()


def _age(path: str, seconds: float) -> None:
    at = time.time() - seconds
    os.utime(path, (at, at))


def test_a_copy_with_jails_is_never_replaced_by_one_without(store: Store) -> None:
    _fill(store)
    store.close()
    store.open()
    store.close()
    os.unlink(store.path)
    store.open()
    store.add_tenant("default", {}, 1000)
    for _ in range(5):
        store.renew_copy()
        for ending in ("", ".1"):
            _age(f"{store.path}.good{ending}", 30 * DAY)
        assert _jails(f"{store.path}.good") == 0
        assert _jails(store_copies.best(store.path)) == 30
    _fill(store)
    store.renew_copy()
    assert store_copies.best(store.path) == f"{store.path}.good"


def test_a_copy_with_a_tenant_that_somebody_set_up_counts_as_one_with_rows(store: Store) -> None:
    store.renew_copy()
    assert not store_copies.holds(f"{store.path}.good")
    store.set_tenant_config("default", {"limits.memory": "1GiB"})
    store.renew_copy()
    assert store_copies.holds(f"{store.path}.good")


def test_generations_of_a_day_and_a_week(store: Store) -> None:
    def jails() -> list[int]:
        return [_jails(path) for ending in ("", ".1", ".2") if os.path.exists(path := f"{store.path}.good{ending}")]

    def one_more() -> None:
        store.set_state(store.reserve("default", f"j{len(store.rows())}", "busybox", {}, {}), READY)
        store.renew_copy()

    for expected in ([1], [2, 1], [3, 1]):
        one_more()
        assert jails() == expected
    _age(f"{store.path}.good.1", 2 * DAY)
    one_more()
    assert jails() == [4, 3, 1]
    _age(f"{store.path}.good.1", 2 * DAY)
    one_more()
    assert jails() == [5, 4, 1]
    for ending in (".1", ".2"):
        _age(f"{store.path}.good{ending}", 8 * DAY)
    one_more()
    assert jails() == [6, 5, 4]
    assert store_copies.best(store.path) == f"{store.path}.good"
