"""Totals of a tenant against what its jails were promised, with many asking at once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jailmgr.config import find_root
from jailmgr.errors import JailmgrError
from jailmgr.key_checks import check_value
from jailmgr.keys import IDS, IDS_MAX, Devices, fold
from jailmgr.manager.admission import (
    admit,
    admit_network,
    admit_totals,
    allocated,
    check_restricted,
    check_source_allowed,
    totals_of,
)  # fmt: skip
from jailmgr.manager.host import Manager
from jailmgr.manager.ports import ports_of
from jailmgr.model import Image, Jail, Network, Recipe
from jailmgr.storage.kind import Pool
from jailmgr.template.apt_sources import Mirrors
from jailmgr.template.recipe import Build
from jailmgr.tenant_keys import IDS_OF_USERS, TENANT, check_tenant_config, parse_list, parse_ports

MIB = 1 << 20
SIZE = "security.idmap.size"
Make = Callable[..., Jail]


@pytest.fixture
def m(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(find_root(str(tmp_path)))
    manager.store.open()
    manager._pool = Pool("", "squota")
    yield manager
    manager.store.close()


def tenant(m: Manager, name: str = "acme", **limits: str) -> None:
    m.store.add_tenant(name, {key.replace("_", "."): value for key, value in limits.items()}, 1)


def take(
    m: Manager, name: str, config: dict[str, str] | None = None, of: str = "acme", devices: Devices | None = None
) -> Jail:
    """What `create` does to the store."""
    folded, placed = fold(config or {}, devices or {})
    with m.store.transaction():
        jail = m.store.reserve(of, name, "busybox", folded, placed)
        m.store.set_ports(jail, ports_of(jail))
        admit(m, jail)
        return jail


def change(m: Manager, jail: Jail, config: dict[str, str]) -> Jail:
    """What `configure` does to the store."""
    new = msgspec.structs.replace(jail, config=config)
    with m.store.transaction():
        m.store.update(new)
        admit(m, new, jail)
    return new


def refusal(do: Callable[[], object]) -> JailmgrError:
    with pytest.raises(JailmgrError) as caught:
        do()
    return caught.value


def attempt(do: Callable[[], object], *codes: str) -> bool:
    """Whether it was done; a refusal of another code is raised."""
    try:
        do()
    except JailmgrError as error:
        if error.code not in codes:
            raise
        return False
    return True


def build(template: str, release: str) -> Build:
    return Build(template, release, "", "busybox", "x86_64", [], Recipe(), [], [], [], [], [], None, Mirrors(), {}, "")


def test_a_count_is_told_with_what_is_used_and_what_was_asked(m: Manager) -> None:
    tenant(m, limits_instances="2")
    take(m, "a")
    take(m, "b")
    error = refusal(lambda: take(m, "c"))
    assert (error.what, error.code) == ("tenant acme", "full")
    assert error.why == "limits.instances is 2: 2 are used, 1 more was asked for"
    assert [row.jail.name for row in m.store.rows("acme")] == ["a", "b"]


def test_ids_are_counted_with_the_default_of_each_jail(m: Manager) -> None:
    tenant(m, limits_ids=str(2 * IDS), limits_overcommit="true")
    jail = take(m, "a")
    take(m, "b", {SIZE: str(IDS - 1)})
    error = refusal(lambda: take(m, "c", {SIZE: "65536"}))
    assert error.why == f"limits.ids is {2 * IDS}: {2 * IDS - 1} are used, 65536 more were asked for"
    change(m, jail, {SIZE: str(IDS - 65536)})
    take(m, "c", {SIZE: "65536"})
    assert allocated(m, "acme").ids == 2 * IDS - 1


@pytest.mark.parametrize("who", ["users", "groups"])
def test_users_of_a_tenant_can_not_take_all_ids_of_the_host(m: Manager, who: str) -> None:
    """By one jail or by many, and by a larger size for one that is there; root gives more by `limits.ids`."""
    tenant(m, **{who: "alice"})
    tenant(m, "free")
    most = take(m, "most", {SIZE: str(IDS_OF_USERS - IDS)})
    take(m, "one")
    error = refusal(lambda: take(m, "more"))
    assert error.why == f"limits.ids is {IDS_OF_USERS}: {IDS_OF_USERS} are used, {IDS} more were asked for"
    assert refusal(lambda: change(m, most, {SIZE: str(IDS_MAX)})).code == "full"
    m.store.set_tenant_config("acme", {who: "alice", "limits.ids": str(0xFFFFFFFF)})
    take(m, "more")
    take(m, "all", {SIZE: str(IDS_MAX)}, "free")


@pytest.mark.parametrize(
    ("total", "promises", "told"),
    [
        (
            {"limits.memory": "256MiB"},
            {"limits.memory": "128MiB"},
            "limits.memory is 256MiB: 256MiB are promised, 128MiB",
        ),
        ({"limits.cpu": "2"}, {"limits.cpu": "1"}, "limits.cpu is 2: 2 are promised, 1 more was"),
        (
            {"limits.cpu.allowance": "150ms/100ms"},
            {"limits.cpu.allowance": "75ms/100ms"},
            "limits.cpu is 1.5: 1.5 are promised, 0.75 more were",
        ),
        ({"limits.processes": "100"}, {"limits.processes": "50"}, "limits.processes is 100: 100 are promised, 50 more"),
        ({"limits.disk": "2GiB"}, {"limits.disk": "1GiB"}, "limits.disk is 2.0GiB: 2.0GiB are promised, 1.0GiB more"),
    ],
)
def test_promises_add_up(m: Manager, total: dict[str, str], promises: dict[str, str], told: str) -> None:
    m.store.add_tenant("acme", total, 1)
    take(m, "a", promises)
    take(m, "b", promises)
    assert told in refusal(lambda: take(m, "c", promises)).why
    take(m, "c")
    m.store.set_tenant_config("acme", total | {"limits.overcommit": "true"})
    take(m, "d", promises)


def test_counts_are_never_overcommitted(m: Manager) -> None:
    tenant(m, limits_instances="1", limits_ports="1", limits_networks="1", limits_overcommit="true")
    port = {"type": "proxy", "listen": "tcp:0.0.0.0:8080", "connect": "tcp:127.0.0.1:80"}
    other = port | {"listen": "tcp:0.0.0.0:8081"}
    assert "limits.ports" in refusal(lambda: take(m, "a", devices={"port-1": port, "port-2": other})).why
    assert m.store.ports("acme") == []
    take(m, "a", devices={"port-1": port})
    assert "limits.instances" in refusal(lambda: take(m, "b")).why

    def network(name: str) -> None:
        with m.store.transaction():
            m.store.add_network("acme", name, lambda n: Network(n, "acme", name, f"10.0.{n}.1/24", f"fd00:{n}::1/64"))
            admit_network(m, "acme")

    network("default")
    assert "limits.networks" in refusal(lambda: network("lab")).why
    assert [found.name for found in m.store.networks("acme")] == ["default"]


def test_only_what_grows_is_refused(m: Manager) -> None:
    tenant(m, limits_memory="100MiB", limits_overcommit="true")
    jail = take(m, "a", {"limits.memory": "150MiB"})
    m.store.set_tenant_config("acme", {"limits.memory": "100MiB"})
    jail = change(m, jail, {"limits.memory": "120MiB"})
    assert refusal(lambda: change(m, jail, {"limits.memory": "121MiB"})).code == "full"
    assert m.store.rows("acme")[0].jail.config == {"limits.memory": "120MiB"}
    change(m, jail, {"limits.processes": "10"})


def test_totals_below_what_was_promised_are_refused(m: Manager) -> None:
    tenant(m)
    take(m, "a", {"limits.memory": "64MiB"})
    for config, fits in [
        ({"limits.memory": "64MiB", "limits.instances": "1"}, True),
        ({"limits.memory": "63MiB"}, False),
        ({"limits.memory": "63MiB", "limits.overcommit": "true"}, True),
        ({"limits.instances": "0", "limits.overcommit": "true"}, False),
    ]:
        new = msgspec.structs.replace(m.store.tenant("acme"), config=config)
        if fits:
            admit_totals(m, new)
        else:
            assert refusal(lambda new=new: admit_totals(m, new)).code == "conflict"  # type: ignore[misc]


def test_what_is_kept_for_jails_must_fit_however_much_is_overcommitted(m: Manager) -> None:
    tenant(m, limits_memory="100MiB", limits_overcommit="true")
    take(m, "a", {"limits.memory": "100MiB", "limits.memory.min": "60MiB"})
    assert "limits.memory.min" in refusal(lambda: take(m, "b", {"limits.memory.min": "41MiB"})).why
    take(m, "b", {"limits.memory.min": "40MiB"})


def test_where_projects_count_every_jail_needs_a_size(m: Manager) -> None:
    m._pool = Pool("", "project")
    tenant(m, limits_disk="2GiB", limits_overcommit="true")
    assert "limits.disk" in refusal(lambda: take(m, "a")).why
    take(m, "a", {"limits.disk": "1GiB"})
    assert "1.0GiB are promised" in refusal(lambda: take(m, "b", {"limits.disk": "1100MiB"})).why
    take(m, "b", {"limits.disk": "1GiB"})


def test_another_tenants_promises_count_for_nothing(m: Manager) -> None:
    tenant(m, limits_instances="1")
    tenant(m, "other")
    for index in range(3):
        take(m, f"o{index}", of="other")
    take(m, "a")
    assert allocated(m, "acme").instances == 1


def test_restrictions(m: Manager) -> None:
    config = {"restricted.ports": "443,8000-8999", "restricted.networks.access": "lab"}
    m.store.add_tenant("acme", config, 1)

    def jail(port: int, network: str = "lab") -> Jail:
        proxy = {"type": "proxy", "listen": f"tcp:0.0.0.0:{port}", "connect": "tcp:127.0.0.1:80"}
        devices = {"p": proxy, "eth0": {"type": "nic", "network": network}}
        return Jail(1, "acme", "web", "", "busybox", 0.0, {}, devices, 0)

    for port in (443, 8000, 8999):
        check_restricted(m, jail(port))
    assert refusal(lambda: check_restricted(m, jail(9000))).code == "denied"
    assert refusal(lambda: check_restricted(m, jail(443, "default"))).code == "denied"
    check_restricted(m, jail(9000, "default"), jail(9000, "default"))


@pytest.mark.parametrize(
    ("source", "template", "allowed"),
    [
        ("debian", None, True),
        ("debian/bookworm", None, True),
        ("debian2", None, False),
        ("busybox", None, False),
        ("0123abcd", "debian/trixie", True),
        ("debian", "busybox/1.35", False),
    ],
)
def test_sources(m: Manager, source: str, template: str | None, allowed: bool) -> None:
    m.store.add_tenant("acme", {"restricted.images": "debian,alpine/3.20"}, 1)
    found: Image | Build = Image("0123abcd", template or "", [], 0, 0.0, "x86_64", Recipe())
    if template is None:
        name, _, release = source.partition("/")
        found = build(name, release or "static")
    if allowed:
        check_source_allowed(m.store.tenant("acme"), found)
    else:
        assert refusal(lambda: check_source_allowed(m.store.tenant("acme"), found)).code == "denied"


def test_a_release_that_a_template_stands_for_is_that_release(m: Manager) -> None:
    m.store.add_tenant("acme", {"restricted.images": "debian/bookworm"}, 1)
    for release in ("bookworm", "trixie"):
        found = build("debian", release)
        if release == "bookworm":
            check_source_allowed(m.store.tenant("acme"), found)
        else:
            assert refusal(lambda found=found: check_source_allowed(m.store.tenant("acme"), found)).code == "denied"  # type: ignore[misc]


def test_a_hundred_at_once_get_ten(m: Manager) -> None:
    tenant(m, limits_instances="10")
    ready = threading.Barrier(20)

    def launch(index: int) -> bool:
        if index < 20:
            ready.wait(20)
        return attempt(lambda: take(m, f"j{index}"), "full")

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(launch, range(100))) == 10
    assert len(m.store.rows("acme")) == 10


def operation(m: Manager, chance: random.Random, memory: int) -> None:
    """A launch, a change, a deletion, or other totals."""
    name, config = f"j{chance.randrange(12)}", {"limits.memory": f"{chance.randrange(4, 200)}MiB"}
    row = m.store.find_row("acme", name)
    match chance.randrange(5):
        case 0 | 1:
            take(m, name, config)
        case 2 if row is not None:
            change(m, row.jail, config)
        case 3 if row is not None:
            m.store.remove(row.jail)
        case 4:
            totals = {"limits.instances": str(chance.randrange(9)), "limits.memory": f"{memory}MiB"}
            with m.store.transaction():
                m.store.set_tenant_config("acme", totals)
                admit_totals(m, m.store.tenant("acme"))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), jails=st.integers(1, 8), memory=st.integers(64, 512))
def test_no_total_is_ever_passed(seed: int, jails: int, memory: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A thousand operations of eight threads: launches, changes, deletions, other totals."""
    m = Manager(find_root(str(tmp_path_factory.mktemp("root"))))
    m.store.open()
    tenant(m, limits_instances=str(jails), limits_memory=f"{memory}MiB")
    passed: list[str] = []

    def work(number: int) -> None:
        chance = random.Random(seed + number)
        for index in range(125):
            attempt(lambda index=index: operation(m, chance, memory + index), "full", "exists", "conflict")  # type: ignore[misc]
            with m.store.transaction():
                totals, promised = totals_of(m.store.tenant("acme").config), allocated(m, "acme")
            passed.extend(
                f"{resource}: {promised} of {totals}"
                for resource in ("instances", "memory_bytes")
                if getattr(promised, resource) > getattr(totals, resource)
            )

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert not passed, passed[:3]
    finally:
        m.store.close()


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("limits.instances", ["0", "20"], ["-1", "1.5", "many"]),
        ("limits.memory", ["8GiB"], ["1", "8 apples"]),
        ("limits.cpu.allowance", ["150ms/100ms", "50%"], ["1.5", "101%"]),
        ("limits.io", ["20MiB", "500iops"], ["fast", "0"]),
        ("limits.overcommit", ["true", "no"], ["maybe"]),
        ("restricted.containers.nesting", ["block"], ["allow"]),
        ("restricted.devices.disk", ["block"], ["allow", "managed"]),
        ("restricted.ports", ["", "80", "443, 8000-8999"], ["0", "70000", "9-8", "http"]),
        ("restricted.images", ["debian,alpine/3.20"], ["../etc", "a b"]),
        ("users", ["", "alice, bob", "svc$"], ["al ice", "a/b", "-x"]),
    ],
)
def test_values(key: str, good: list[str], bad: list[str]) -> None:
    for value in good:
        check_value(TENANT[key], key, value)
    for value in bad:
        assert refusal(lambda value=value: check_tenant_config({key: value})).code == "invalid"  # type: ignore[misc]


def test_an_unknown_key_of_a_tenant_is_told_with_the_nearest() -> None:
    assert "limits.memory" in refusal(lambda: check_tenant_config({"limits.memry": "1GiB"})).hint
    assert refusal(lambda: check_tenant_config({"security.privileged": "true"})).code == "invalid"
    check_tenant_config({"user.note": "hers"})


def test_lists() -> None:
    assert parse_list(" a, b,,a ") == ["a", "b"]
    assert parse_ports("443,8000-8999") == [(443, 443), (8000, 8999)]
