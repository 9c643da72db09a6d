"""Which id range the next start of a jail gives it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from jailmgr import claims
from jailmgr.config import find_root
from jailmgr.errors import JailmgrError
from jailmgr.keys import IDS
from jailmgr.manager import builder
from jailmgr.manager.claiming import Claims, idmap_key
from jailmgr.manager.host import Manager
from jailmgr.model import FIRST_IDMAP_SIZE, Jail
from jailmgr.store import Store

FIRST = claims.REGIONS[0][0]
SIZE = "security.idmap.size"


@pytest.fixture(autouse=True)
def own_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_in_use", lambda: iter(()))
    monkeypatch.setattr(claims, "DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setattr(claims, "SUBORDINATE", ())


@pytest.fixture
def m(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(find_root(str(tmp_path)))
    manager.store.open()
    manager.store.add_tenant("acme", {}, 1)
    yield manager
    manager.store.close()


def jail_of_0_1_0(m: Manager, name: str = "web") -> Jail:
    """A row as 0.1.0 left it, which kept the base alone, and the claim of that release."""
    jail = m.store.reserve("acme", name, "busybox", {}, {})
    base = claims.claim_idmap(m.root, idmap_key(jail))
    with m.store.transaction() as db:
        db.execute("UPDATE jails SET idmap_base = ?, state = 'ready' WHERE id = ?", (base, jail.id))
    return m.store.jail("acme", name)


def leave_free(m: Manager, size: int) -> None:
    """Claim all ids behind the others' but the last `size` of the first region."""
    (first, end), (second, second_end) = claims.REGIONS
    count = end - size - (first := claims.claim_idmap(m.root, "rest"))
    claims.claim_idmap(m.root, "rest", first, count)
    claims.claim_idmap(m.root, "second", second, second_end - second)


def test_a_jail_of_an_older_release_has_the_ids_it_had(m: Manager) -> None:
    jail = jail_of_0_1_0(m)
    assert (jail.idmap_base, jail.idmap_size) == (FIRST, FIRST_IDMAP_SIZE)
    jail_of_0_1_0(m, "next")
    moved = m.claims.idmap(jail)
    assert (moved.idmap_base, moved.idmap_size) == (FIRST + 2 * FIRST_IDMAP_SIZE, IDS)
    m.store.close()
    m.store.open()
    assert m.store.jail("acme", "web") == moved


def test_one_that_is_about_to_be_started_again_stays_where_it_is(m: Manager) -> None:
    jail = jail_of_0_1_0(m)
    assert m.claims.idmap(jail, resize=False) == jail
    assert m.claims.idmap(jail) == msgspec.structs.replace(jail, idmap_size=IDS)


def test_the_default_keeps_no_jail_of_an_older_release_from_its_start(m: Manager) -> None:
    jail, other = jail_of_0_1_0(m), jail_of_0_1_0(m, "next")
    leave_free(m, 2 * FIRST_IDMAP_SIZE)
    assert m.claims.idmap(jail) == jail
    m.claims = Claims(m)
    assert m.claims.idmap(jail) == jail
    wanted = msgspec.structs.replace(other, config={SIZE: str(IDS)})
    with pytest.raises(JailmgrError) as caught:
        m.claims.idmap(wanted)
    assert caught.value.code == "full"
    assert f"{SIZE}={2 * FIRST_IDMAP_SIZE} or less" in caught.value.hint
    smaller = msgspec.structs.replace(other, config={SIZE: str(2 * FIRST_IDMAP_SIZE)})
    assert m.claims.idmap(smaller).idmap_size == 2 * FIRST_IDMAP_SIZE


def test_a_new_jail_gets_what_it_asks_for_or_an_error(m: Manager) -> None:
    leave_free(m, 2 * FIRST_IDMAP_SIZE)
    with pytest.raises(JailmgrError) as caught:
        m.claims.idmap(m.store.reserve("acme", "new", "busybox", {}, {}))
    assert caught.value.code == "full"
    assert builder.claim_idmap(m, "build")[1] == FIRST_IDMAP_SIZE, "a build gets by with the least"
    small = m.claims.idmap(m.store.reserve("acme", "small", "busybox", {SIZE: str(FIRST_IDMAP_SIZE)}, {}))
    assert small.idmap_size == FIRST_IDMAP_SIZE


def test_a_base_that_an_older_release_changed_has_its_size(m: Manager) -> None:
    """An administrator went back to 0.1.0 for a while, which moved the jail."""
    jail = m.claims.idmap(jail_of_0_1_0(m))
    with m.store.transaction() as db:
        db.execute("UPDATE jails SET idmap_base = idmap_base + 65536 WHERE id = ?", (jail.id,))
    assert m.store.jail("acme", "web").idmap_size == FIRST_IDMAP_SIZE


def test_the_store_forgets_the_size_with_the_jail(m: Manager) -> None:
    jail = m.claims.idmap(jail_of_0_1_0(m))
    assert m.store.fact(f"idmap/{jail.id}")
    m.store.remove(jail)
    assert not m.store.fact(f"idmap/{jail.id}")


@pytest.mark.parametrize("damage", ["many", "[1]", '["a", 2]', "{"])
def test_a_size_that_is_none_is_damage(m: Manager, damage: str) -> None:
    jail = m.claims.idmap(jail_of_0_1_0(m))
    m.store.set_fact(f"idmap/{jail.id}", damage)
    m.store.close()
    with pytest.raises(JailmgrError) as caught:
        Store(m.root.store).open()
    assert "can't be read" in caught.value.why
