"""Usage by the hour: what is kept, what a query says, and that a damaged file is in nobody's way."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.manager.metering import Addition, Amounts, JailUsage, Subject, Track
from jailmgr.manager.usage_store import KEPT_HOURS, VERSION, UsageStore

HOUR = 3600.0
WALL = 490_000 * HOUR
WEB, DB = Subject(1, "acme", 7, "web"), Subject(1, "acme", 8, "db")
OTHER = Subject(2, "other", 9, "web")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[UsageStore]:
    opened = UsageStore(f"{tmp_path}/usage.db")
    yield opened
    opened.close()


def cpu(subject: Subject, first: float, last: float, cpu_ns: int) -> Addition:
    return Addition(subject, WALL + first, WALL + last, Amounts(cpu_ns=cpu_ns))


def told(store: UsageStore, tenant: str | None = None, first: float = -1e6, last: float = 1e6) -> dict[str, int]:
    found = store.usage(tenant, WALL + first, WALL + last)
    for record in found:
        assert record.cpu_ns == sum(jail.cpu_ns for jail in record.jails)
    return {f"{record.tenant}/{jail.jail}": jail.cpu_ns for record in found for jail in record.jails}


def test_usage_is_told_by_tenant_and_jail(store: UsageStore) -> None:
    store.write({}, [cpu(WEB, 0, 60, 5), cpu(DB, 0, 60, 7), cpu(OTHER, 0, 60, 11)])
    store.write({}, [cpu(WEB, 60, 2 * HOUR, 100)])
    assert told(store) == {"acme/web": 105, "acme/db": 7, "other/web": 11}
    assert told(store, "acme") == {"acme/web": 105, "acme/db": 7}
    assert told(store, "nobody") == {}
    assert [record.tenant for record in store.usage(None, WALL, WALL + 1)] == ["acme", "other"]


def test_every_amount_is_kept(store: UsageStore) -> None:
    amounts = Amounts(
        cpu_ns=1, memory_byte_seconds=1 << 62, disk_byte_seconds=1 << 62, received_bytes=4, sent_bytes=5,
        running_seconds=6.5,
    )  # fmt: skip
    for hour in range(4):
        store.write({}, [Addition(WEB, WALL + hour * HOUR, WALL + hour * HOUR + 60, amounts)])
    (record,) = store.usage(None, WALL, WALL + 1e6)
    assert record.jails == [
        JailUsage(
            jail_id=7, jail="web", cpu_ns=4, memory_byte_seconds=1 << 64, disk_byte_seconds=1 << 64,
            received_bytes=16, sent_bytes=20, running_seconds=26.0,
        )
    ]  # fmt: skip


def test_a_bucket_counts_by_its_share(store: UsageStore) -> None:
    store.write({}, [cpu(WEB, 0, HOUR, 3600), cpu(WEB, HOUR, HOUR + 600, 600)])
    assert told(store, first=0, last=HOUR - 1)["acme/web"] == 3599
    assert told(store, first=HOUR / 2, last=HOUR)["acme/web"] == 1800
    assert told(store, first=HOUR / 2, last=HOUR + 300)["acme/web"] == 2100
    assert told(store, first=HOUR + 300, last=9 * HOUR)["acme/web"] == 300, "an hour that goes on is all there so far"
    assert told(store, first=HOUR + 601) == {}
    assert told(store, last=-1) == {}


def test_what_was_used_in_no_time_is_counted(store: UsageStore) -> None:
    store.write({}, [cpu(WEB, 60, 60, 5)])
    assert told(store, first=60, last=60) == {"acme/web": 5}
    assert told(store, first=61) == {}


def test_a_jail_that_was_renamed_is_one(store: UsageStore) -> None:
    store.write({}, [cpu(WEB, 0, 60, 5), cpu(WEB._replace(jail="www"), 60, 120, 7)])
    store.write({}, [cpu(WEB._replace(jail="shop"), HOUR, HOUR + 60, 1)])
    assert told(store) == {"acme/shop": 13}
    assert told(store, last=HOUR - 1) == {"acme/www": 12}


def test_a_tenants_name_given_again_is_another_tenant(store: UsageStore) -> None:
    store.write({}, [cpu(WEB, 0, 60, 5), cpu(Subject(3, "acme", 12, "web"), 60, 120, 7)])
    assert [(record.tenant_id, record.cpu_ns) for record in store.usage("acme", WALL, WALL + HOUR)] == [(1, 5), (3, 7)]


def test_tracks_and_additions_are_written_together(store: UsageStore) -> None:
    track = Track("b", 1.0, "b/1/1", 2.0, 3, 4, 5, 6, 7, "b/0/1")
    store.write({7: track}, [cpu(WEB, 0, 60, 5)])
    with pytest.raises(JailmgrError, match="usage"):
        store.write({7: Track()}, [cpu(WEB, 0, 60, 5), cpu(DB, 0, 60, 1 << 64)])
    assert store.tracks() == {7: track}
    assert told(store) == {"acme/web": 5}


def test_it_is_there_again(store: UsageStore) -> None:
    store.write({7: Track("b", 1.0)}, [cpu(WEB, 0, 60, 5)])
    store.close()
    again = UsageStore(store.path)
    assert again.tracks() == {7: Track("b", 1.0)}
    assert told(again) == {"acme/web": 5}
    again.close()
    assert os.stat(store.path).st_mode & 0o777 == 0o600


def test_old_usage_goes_an_hour_at_a_time(store: UsageStore) -> None:
    ages = [KEPT_HOURS + 3, KEPT_HOURS + 2, KEPT_HOURS, 5]
    store.write({}, [cpu(WEB, -age * HOUR, -age * HOUR + 60, 5) for age in ages])
    store.write({}, [cpu(DB, -ages[0] * HOUR, -ages[0] * HOUR + 60, 5)])
    assert told(store, first=-1e9) == {"acme/web": 20, "acme/db": 5}
    store.tidy({7}, WALL)
    assert told(store, first=-1e9) == {"acme/web": 15}
    for _ in range(5):
        store.tidy({7}, WALL)
    assert told(store, first=-1e9) == {"acme/web": 10}
    store.write({}, [cpu(DB, 0, 60, 1)])
    assert told(store)["acme/db"] == 1


def test_a_jail_that_is_gone_keeps_its_usage_and_loses_its_track(store: UsageStore) -> None:
    store.write({7: Track("b", 1.0), 8: Track("b", 2.0)}, [cpu(WEB, 0, 60, 5)])
    store.tidy({8}, WALL)
    assert set(store.tracks()) == {8}
    assert told(store) == {"acme/web": 5}


def _garbage(path: Path) -> None:
    path.write_bytes(b"no database" * 500)


def _torn(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xa5" * (len(whole) - 4096))


def _newer(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()


def _text_for_number(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("UPDATE tracks SET cpu_ns = 'many'")
    db.commit()
    db.close()


@pytest.mark.parametrize("damage", [_garbage, _torn, _newer, _text_for_number])
def test_a_file_that_cant_be_read_is_set_aside(
    store: UsageStore, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(store.path)
    store.write({7: Track("b", 1.0)}, [cpu(WEB, 0, 60, 5)])
    store.close()
    assert callable(damage)
    damage(path)
    damaged = path.read_bytes()
    with caplog.at_level(logging.ERROR):
        assert store.tracks() == {}
    assert "set aside" in caplog.text
    store.write({}, [cpu(WEB, 0, 60, 7)])
    assert told(store) == {"acme/web": 7}
    (aside,) = list(path.parent.glob("usage.db.*"))
    assert aside.read_bytes() == damaged
    caplog.clear()
    store.close()
    assert told(store) == {"acme/web": 7}
    assert not caplog.text


def test_a_directory_in_its_place_is_set_aside(store: UsageStore, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(store.path)
    path.mkdir()
    (path / "kept").touch()
    with caplog.at_level(logging.ERROR):
        store.write({}, [cpu(WEB, 0, 60, 7)])
    assert "set aside" in caplog.text
    assert told(store) == {"acme/web": 7}
    (aside,) = list(path.parent.glob("usage.db.*T*Z"))
    assert os.listdir(aside) == ["kept"]


def test_a_fifo_in_its_place_is_set_aside(store: UsageStore) -> None:
    os.mkfifo(store.path)
    store.write({}, [cpu(WEB, 0, 60, 7)])
    assert told(store) == {"acme/web": 7}


@pytest.mark.parametrize("seed", range(40))
def test_scattered_bad_bytes_never_stop_the_accounting(store: UsageStore, seed: int) -> None:
    store.write({number: Track("boot", 1.0) for number in range(50)}, [cpu(WEB, 0, 60, 5), cpu(DB, 60, 120, 5)])
    store.close()
    chance, path = random.Random(seed), Path(store.path)
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 5, 50])):
        content[chance.randrange(100, len(content))] = chance.randrange(256)
    path.write_bytes(content)
    assert all(isinstance(track.cpu_ns, int) for track in store.tracks().values()), seed
    store.write({7: Track("boot", 2.0)}, [cpu(WEB, 120, 180, 7)])
    assert store.tracks()[7].at == 2.0


def test_a_log_left_by_a_crash_is_not_played_into_the_new_file(store: UsageStore) -> None:
    store.write({}, [cpu(WEB, 0, 60, 5)])
    store.close()
    store.write({}, [cpu(WEB, 60, 120, 5)])
    log = Path(f"{store.path}-wal").read_bytes()
    store.close()
    _garbage(Path(store.path))
    Path(f"{store.path}-wal").write_bytes(log)
    assert told(store) == {}
    store.close()
    assert told(store) == {}


def test_what_the_host_refuses_is_told_and_tried_again(tmp_path: Path) -> None:
    store = UsageStore(f"{tmp_path}/later/usage.db")
    with pytest.raises(JailmgrError) as refused:
        store.tracks()
    assert refused.value.code == "unavailable"
    (tmp_path / "later").mkdir()
    assert store.tracks() == {}
    store.close()
