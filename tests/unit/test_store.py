"""The store: what it keeps, what it refuses, and that a damaged one is left as it is."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from jailmgr.errors import JailmgrError
from jailmgr.model import Image, Jail, Network, Nic, Port, Recipe
from jailmgr.store import DELETING, READY, RENAMING, Store

FINGERPRINT = "ab" * 32
IMAGE = Image(FINGERPRINT, "debian/bookworm", ["debian"], 1, 2.0, "x86_64", Recipe(), key="k1")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"{tmp_path}/store.db")
    opened.open()
    opened.add_tenant("default", {}, 1000)
    yield opened
    opened.close()


def _jail(store: Store, name: str = "a") -> Jail:
    jail = store.reserve("default", name, "debian", {"user.a": "b"}, {"root": {"type": "disk"}})
    store.set_state(jail, READY)
    return jail


def _network(store: Store) -> Network:
    return store.add_network(
        "default", "default", lambda ident: Network(ident, "default", "default", "10.1.1.1/24", "fd00::1/64")
    )


def test_a_jail_comes_back_as_it_was_kept(store: Store) -> None:
    jail, network = _jail(store), _network(store)
    nic = Nic("eth0", "default", "v1", "0a:00:00:00:00:01", "10.1.1.2", "fd00::2")
    changed = msgspec.structs.replace(jail, image=FINGERPRINT, idmap_base=7, config={"user.c": "ü"}, nics=[nic])
    store.put_image(IMAGE)
    store.update(changed)
    store.set_nics(jail, [(network, nic)])
    assert store.jail("default", "a") == changed
    assert store.addresses(network) == {"10.1.1.2"}
    store.close()
    again = Store(store.path)
    again.open()
    assert again.jails() == [changed]
    assert again.networks() == [network]
    again.close()


def test_a_name_is_taken_once_and_by_a_rename_too(store: Store) -> None:
    jail = _jail(store)
    with pytest.raises(JailmgrError) as caught:
        _jail(store)
    assert caught.value.code == "exists"
    store.set_state(jail, RENAMING, "b")
    with pytest.raises(JailmgrError):
        _jail(store, "b")
    store.set_name(jail, "b")
    assert store.jail("default", "b").id == jail.id


def test_an_id_is_never_used_again(store: Store) -> None:
    first = _jail(store)
    store.remove(first)
    assert _jail(store).id > first.id


def test_what_is_not_ready_is_told_so(store: Store) -> None:
    jail = _jail(store)
    store.set_state(jail, DELETING)
    with pytest.raises(JailmgrError) as caught:
        store.jail("default", "a")
    assert caught.value.why == "it is being deleted"
    assert store.jails() == []


def test_an_unknown_jail_is_told_with_the_nearest(store: Store) -> None:
    _jail(store, "web-server")
    with pytest.raises(JailmgrError) as caught:
        store.jail("default", "web-sever")
    assert (caught.value.code, caught.value.hint) == ("missing", "Did you mean default/web-server?")


def test_an_address_is_taken_once(store: Store) -> None:
    network = _network(store)
    nic = Nic("eth0", "default", "v1", "0a:00:00:00:00:01", "10.1.1.2", "fd00::2")
    store.set_nics(_jail(store), [(network, nic)])
    other = _jail(store, "b")
    with pytest.raises(JailmgrError) as caught:
        store.set_nics(other, [(network, msgspec.structs.replace(nic, veth="v2"))])
    assert caught.value.code == "exists"


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        (("", 80, "tcp"), ("", 80, "tcp"), True),
        (("", 80, "tcp"), ("10.0.0.1", 80, "tcp"), True),
        (("10.0.0.1", 80, "tcp"), ("", 80, "tcp"), True),
        (("10.0.0.1", 80, "tcp"), ("10.0.0.2", 80, "tcp"), False),
        (("", 80, "tcp"), ("", 80, "udp"), False),
        (("", 80, "tcp"), ("", 81, "tcp"), False),
    ],
)
def test_host_ports(store: Store, first: tuple[str, int, str], second: tuple[str, int, str], clash: bool) -> None:
    one, other = _jail(store), _jail(store, "b")
    ports = [Port("default", name, at, number, 8, kind) for name, (at, number, kind) in (("a", first), ("b", second))]
    store.set_ports(one, ports[:1])
    if clash:
        with pytest.raises(JailmgrError) as caught:
            store.set_ports(other, ports[1:])
        assert caught.value.code == "exists"
    else:
        store.set_ports(other, ports[1:])
    assert len(store.ports()) == (1 if clash else 2)
    store.set_ports(one, ports[:1])


def test_a_network_that_could_not_be_made_leaves_no_row(store: Store) -> None:
    def fail(_: int) -> Network:
        raise JailmgrError("subnet", "none is free")

    with pytest.raises(JailmgrError):
        store.add_network("default", "default", fail)
    assert store.networks() == []


def test_an_alias_moves_to_the_newest_image(store: Store) -> None:
    store.put_image(IMAGE)
    newer = msgspec.structs.replace(IMAGE, fingerprint="cd" * 32, created_at=3.0, key="k2")
    store.put_image(newer)
    assert store.image_of_alias("debian") == newer
    assert [image.aliases for image in store.images()] == [[], ["debian"]]
    assert store.image_of_key("k1") is not None
    assert store.image_of_key("") is None
    assert [image.fingerprint for image in store.images_of_prefix("cdc")] == ["cd" * 32]


def test_an_image_in_use_is_not_unused(store: Store) -> None:
    store.put_image(IMAGE)
    store.update(msgspec.structs.replace(_jail(store), image=FINGERPRINT))
    with pytest.raises(JailmgrError) as caught:
        store.check_image_unused(FINGERPRINT)
    assert caught.value.code == "conflict"


def test_a_transaction_is_all_or_nothing(store: Store) -> None:
    def both() -> None:
        with store.transaction():
            _jail(store, "x")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 (raised just above)
        both()
    assert store.jails() == []


def test_many_threads(store: Store) -> None:
    threads = [threading.Thread(target=_jail, args=(store, f"j{number}")) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({jail.id for jail in store.jails()}) == 16


@pytest.mark.parametrize("damage", ["garbage", "page", "cut", "other", "newer"])
def test_a_damaged_store_is_refused_and_left_as_it_is(store: Store, damage: str) -> None:
    for number in range(50):
        _jail(store, f"j{number}")
    store.close()
    path = Path(store.path)
    content = bytearray(path.read_bytes())
    if damage == "garbage":
        content = bytearray(b"no database at all, " * 400)
    elif damage == "page":
        content[4096 : 4096 * 8] = os.urandom(4096 * 7)
    elif damage == "cut":
        del content[5000:]
    path.write_bytes(content)
    if damage in ("other", "newer"):
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA application_id = 5" if damage == "other" else "PRAGMA user_version = 99")
        db.close()
    before = path.read_bytes()
    with pytest.raises(JailmgrError) as caught:
        Store(store.path).open()
    assert caught.value.hint
    assert str(path) in caught.value.what
    assert path.read_bytes() == before


def test_the_last_good_copy_is_kept(store: Store) -> None:
    _jail(store)
    store.close()
    store.open()
    store.close()
    Path(store.path).write_bytes(b"x" * 9000)
    with pytest.raises(JailmgrError) as caught:
        store.open()
    assert f"{store.path}.good" in caught.value.hint
    os.replace(f"{store.path}.good", store.path)
    store.open()
    assert [jail.name for jail in store.jails()] == ["a"]


def test_rows_are_the_same_until_something_changes(store: Store) -> None:
    first = _jail(store)
    before = store.rows()
    assert all(kept is row for kept, row in zip(store.rows(), before, strict=True))
    assert store.rows("default") == before
    with pytest.raises(ZeroDivisionError), store.transaction():
        _jail(store, "b")
        assert len(store.rows()) == 2
        _ = 1 // 0
    assert [row.jail.name for row in store.rows()] == ["a"]
    store.remove(first)
    assert store.rows() == []


def test_reading_beside_the_engine(store: Store) -> None:
    _jail(store)
    reader = Store(store.path)
    reader.open_to_read()
    assert len(reader.rows()) == 1
    _jail(store, "b")
    assert len(reader.rows()) == 2
    with pytest.raises(JailmgrError):
        reader.set_fact("a", "b")
    reader.close()
