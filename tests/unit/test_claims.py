"""Claims: what two instances on a host never both have."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgspec
import pytest

from jailmgr import claims
from jailmgr.config import Root, find_root
from jailmgr.errors import JailmgrError
from jailmgr.keys import IDS, IDS_MAX
from jailmgr.tenant_keys import IDS_OF_USERS

FIRST_RANGE = claims.REGIONS[0][0]
MakeRoot = Callable[[str], Root]


@pytest.fixture(autouse=True)
def own_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without claims, subordinate ids, name servers and processes of ours."""
    monkeypatch.setattr(claims, "_in_use", lambda: iter(()))
    monkeypatch.setattr(claims, "DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setattr(claims, "SUBORDINATE", (str(tmp_path / "subuid"), str(tmp_path / "subgid")))
    monkeypatch.setattr(claims, "RESOLV_CONF", str(tmp_path / "resolv.conf"))


@pytest.fixture
def make_root(tmp_path: Path) -> MakeRoot:
    def make(name: str) -> Root:
        (tmp_path / name).mkdir(exist_ok=True)
        return find_root(str(tmp_path / name))

    return make


def code_of(call: Callable[..., object], *args: object) -> str:
    with pytest.raises(JailmgrError) as caught:
        call(*args)
    assert caught.value.what
    assert caught.value.why
    return caught.value.code


def test_id_ranges_are_never_two_alike(make_root: MakeRoot) -> None:
    one, two = make_root("one"), make_root("two")
    got = [claims.claim_idmap(root, key) for root in (one, two) for key in ("1", "2")]
    assert got == [FIRST_RANGE + number * claims.RANGE for number in range(4)]


def test_a_claim_made_twice_is_the_same(make_root: MakeRoot) -> None:
    root = make_root("one")
    first, uid, subnet = claims.claim_idmap(root, "1"), claims.claim_uid(root, "t"), claims.claim_subnet(root, "1")
    for range_, wanted_uid, wanted_subnet in ((None, None, None), (first, uid, subnet)):
        assert claims.claim_idmap(root, "1", range_) == first
        assert claims.claim_uid(root, "t", wanted_uid) == uid
        assert claims.claim_subnet(root, "1", wanted_subnet) == subnet


def test_a_range_given_back_is_free_again(make_root: MakeRoot) -> None:
    root = make_root("one")
    first = claims.claim_idmap(root, "1")
    second = claims.claim_idmap(root, "2")
    claims.release(root, "idmap", "1")
    claims.release(root, "idmap", "never")
    assert claims.claim_idmap(root, "3") == first
    assert claims.claim_idmap(root, "2") == second


def test_a_larger_range_is_free_as_a_whole(make_root: MakeRoot) -> None:
    root = make_root("one")
    claims.claim_idmap(root, "1")
    claims.claim_idmap(root, "2")
    claims.release(root, "idmap", "1")
    large = claims.claim_idmap(root, "large", None, 3 * claims.RANGE)
    assert large == FIRST_RANGE + 2 * claims.RANGE
    assert claims.claim_idmap(root, "3") == FIRST_RANGE
    assert claims.claim_idmap(root, "4") == large + 3 * claims.RANGE


def test_subordinate_ids_are_avoided_and_junk_is_passed_over(make_root: MakeRoot, tmp_path: Path) -> None:
    (tmp_path / "subuid").write_text(f"root:{FIRST_RANGE}:65536\nnonsense\n\na:b:c\nx:-1:7\ny:1:2:3\n")
    (tmp_path / "subgid").write_bytes(b"\xff\xfe:1:1\nroot:%d:10\n" % (FIRST_RANGE + claims.RANGE + 5))
    root = make_root("one")
    assert claims.claim_idmap(root, "1") == FIRST_RANGE + 2 * claims.RANGE
    assert code_of(claims.claim_idmap, root, "2", FIRST_RANGE) == "conflict"


def test_the_wanted_range_of_a_stored_jail(make_root: MakeRoot) -> None:
    one, two = make_root("one"), make_root("two")
    wanted = FIRST_RANGE + 7 * claims.RANGE
    assert claims.claim_idmap(one, "1", wanted) == wanted
    assert code_of(claims.claim_idmap, two, "1", wanted) == "conflict"
    assert code_of(claims.claim_idmap, two, "1", wanted + 1) == "conflict"


def test_ranges_run_out_in_words(make_root: MakeRoot) -> None:
    root = make_root("one")
    for first, end in claims.REGIONS:
        assert claims.claim_idmap(root, f"all of {first}", None, end - first) == first
    with pytest.raises(JailmgrError) as caught:
        claims.claim_idmap(root, "more")
    assert (caught.value.code, caught.value.hint) == ("full", "Delete jails.")
    claims.release(root, "idmap", f"all of {FIRST_RANGE}")
    claims.claim_idmap(root, "most", None, claims.REGIONS[0][1] - FIRST_RANGE - 3 * claims.RANGE)
    with pytest.raises(JailmgrError) as caught:
        claims.claim_idmap(root, "default", None, IDS)
    assert caught.value.why == f"no range of {IDS} ids is free on this host"
    assert "security.idmap.size=196608 or less" in caught.value.hint
    claims.claim_idmap(root, "smaller", None, 196608)


def test_thousands_of_jails_have_the_default_number_of_ids() -> None:
    """The figures of docs/architecture.md, "Ids"."""
    assert claims.count_ranges(IDS) == 255 + 2047
    assert claims.count_ranges(claims.RANGE) == 4092 + 32767
    assert max(end - first for first, end in claims.REGIONS) == IDS_MAX
    assert IDS_OF_USERS == 256 * IDS


def test_ids_that_mean_something_else_are_in_no_range() -> None:
    for reserved in (65534, 524288, 0x6FFFFFFF, claims.FIRST_ID + 1, 0x7FFE0000, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF):
        assert not any(first <= reserved < end for first, end in claims.REGIONS), reserved


def test_a_range_grows_in_its_place_or_moves(make_root: MakeRoot) -> None:
    root = make_root("one")
    first, second = claims.claim_idmap(root, "1"), claims.claim_idmap(root, "2")
    assert code_of(claims.claim_idmap, root, "1", first, 2 * claims.RANGE) == "conflict"
    moved = claims.claim_idmap(root, "1", None, 2 * claims.RANGE)
    assert moved == second + claims.RANGE
    assert claims.claim_idmap(root, "2", second, claims.RANGE) == second
    assert claims.claim_idmap(root, "1", moved, IDS) == moved
    assert claims.claim_idmap(root, "1", moved, claims.RANGE) == moved
    assert claims.claim_idmap(root, "3", None, 2 * claims.RANGE) == moved + claims.RANGE


def test_a_range_of_an_odd_size_ends_where_it_says(make_root: MakeRoot) -> None:
    root = make_root("one")
    first = claims.claim_idmap(root, "odd", None, claims.RANGE + 1)
    assert claims.claim_idmap(root, "next") == first + 2 * claims.RANGE


def test_both_releases_read_the_claims_of_the_other(make_root: MakeRoot, tmp_path: Path) -> None:
    """0.1.0 kept `[first, size]`, each of 65536, and passes over ranges that lie where it has none."""
    one = make_root("one")
    (tmp_path / "run").mkdir()
    (tmp_path / "two").mkdir()
    old = {"at": str(tmp_path / "two"), "mark": "abcde", "idmap": {"jail/1": [FIRST_RANGE, 65536]}}
    Path(claims.DIRECTORY, "claims").write_bytes(msgspec.json.encode({str(old["at"]): old}))
    first = claims.claim_idmap(one, "1", None, IDS)
    assert first == FIRST_RANGE + 65536
    claims.claim_idmap(one, "2", None, claims.REGIONS[1][1] - claims.REGIONS[1][0])
    read = msgspec.json.decode(Path(claims.DIRECTORY, "claims").read_bytes(), type=dict[str, HeldBefore])
    assert read[one.at].idmap["1"] == (first, IDS)
    assert read[str(old["at"])].idmap == {"jail/1": (FIRST_RANGE, 65536)}
    taken = sorted(span for held in read.values() for span in held.idmap.values())
    lowest = FIRST_RANGE
    for start, count in taken:
        if lowest + 65536 <= start:
            break
        lowest = max(lowest, start + count)
    assert lowest == first + IDS, "as 0.1.0 looked for a free range"


class HeldBefore(msgspec.Struct, forbid_unknown_fields=True):
    """As 0.1.0 had it."""

    at: str = ""
    mark: str = ""
    idmap: dict[str, tuple[int, int]] = {}
    uid: dict[str, int] = {}
    subnet: dict[str, str] = {}
    port: dict[str, tuple[str, int, str, int]] = {}


def test_uids_of_tenants_are_outside_of_all_ranges(make_root: MakeRoot) -> None:
    one, two = make_root("one"), make_root("two")
    uids = [claims.claim_uid(root, tenant) for root in (one, two) for tenant in ("a", "b")]
    assert len(set(uids)) == 4
    assert all(claims.FIRST_ID < uid < FIRST_RANGE for uid in uids)
    assert code_of(claims.claim_uid, two, "c", uids[0]) == "conflict"


def test_subnets_do_not_overlap_each_other_or_the_host(make_root: MakeRoot, tmp_path: Path) -> None:
    one, two = make_root("one"), make_root("two")
    got = [ipaddress.IPv4Network(claims.claim_subnet(root, key)) for root in (one, two) for key in "1234"]
    assert all(not first.overlaps(second) for first in got for second in got if first is not second)
    assert all(not network.overlaps(host) for network in got for host in claims.host_networks())
    assert all(network.prefixlen == 24 and network.subnet_of(ipaddress.IPv4Network("10.0.0.0/8")) for network in got)
    assert code_of(claims.claim_subnet, two, "5", str(got[0])) == "conflict"
    assert code_of(claims.claim_subnet, two, "5", "127.0.0.0/24") == "conflict"


def test_the_hosts_name_servers_stay_reachable(make_root: MakeRoot, tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text(
        "search x\nnameserver 10.11.12.53\nnameserver ::1\nnameserver\nnameserver x\n"
    )
    assert ipaddress.IPv4Network("10.11.12.53/32") in claims.host_networks()
    assert code_of(claims.claim_subnet, make_root("one"), "1", "10.11.12.0/24") == "conflict"


@pytest.mark.parametrize("wrong", ["", "10.1.2.3/24", "x", "8.8.8.0/24", "10.0.0.0/30", "fd00::/64", "10.0.0.0/4"])
def test_what_is_no_private_subnet_is_refused(make_root: MakeRoot, wrong: str) -> None:
    assert code_of(claims.claim_subnet, make_root("one"), "1", wrong) == "invalid"


def test_ports_meet_where_addresses_do(make_root: MakeRoot) -> None:
    one, two = make_root("one"), make_root("two")
    claims.claim_port(one, "web", "", 8080, "tcp")
    claims.claim_port(one, "web", "", 8080, "tcp")
    claims.claim_port(one, "udp", "", 8080, "udp")
    claims.claim_port(two, "a", "127.0.0.1", 9090, "tcp")
    claims.claim_port(two, "b", "192.0.2.1", 9090, "tcp")
    claims.claim_port(two, "c", "::", 9090, "tcp")
    for address in ("", "127.0.0.1", "::"):
        assert code_of(claims.claim_port, two, "x", address, 8080, "tcp") == "conflict"
    for address in ("", "0.0.0.0", "127.0.0.1", "::1"):
        assert code_of(claims.claim_port, two, "x", address, 9090, "tcp") == "conflict"
    claims.release(one, "port", "web")
    claims.claim_port(two, "x", "", 8080, "tcp")


def test_marks_are_not_shared(make_root: MakeRoot) -> None:
    one = make_root("one")
    claims.claim_mark(one)
    claims.claim_mark(one)
    claims.claim_mark(make_root("two"))
    other = make_root("three")
    assert code_of(claims.claim_mark, Root(other.lib, other.run, other.etc, one.mark, other.at)) == "conflict"
    assert code_of(claims.claim_mark, Root(other.lib, other.run, other.etc, "local", other.at)) == "conflict"


def test_nothing_is_left_of_the_last_one(make_root: MakeRoot) -> None:
    one, two = make_root("one"), make_root("two")
    claims.claim_idmap(one, "1")
    claims.claim_idmap(two, "1")
    claims.release_all(one)
    assert os.listdir(claims.DIRECTORY) == ["claims"]
    claims.release_all(two)
    assert not os.path.exists(claims.DIRECTORY)
    claims.release_all(two)
    assert not os.path.exists(claims.DIRECTORY)


def test_files_of_others_keep_the_directory(make_root: MakeRoot) -> None:
    one = make_root("one")
    claims.claim_idmap(one, "1")
    Path(claims.DIRECTORY, "engine.sock").touch()
    claims.release_all(one)
    assert os.listdir(claims.DIRECTORY) == ["engine.sock"]


def test_an_instance_that_was_thrown_away_is_forgotten(make_root: MakeRoot) -> None:
    one, two = make_root("one"), make_root("two")
    first = claims.claim_idmap(one, "1")
    os.rmdir(one.at)
    assert claims.claim_idmap(two, "1") == first


def test_claims_that_were_lost_are_made_again(make_root: MakeRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges that processes use are kept for the instance that says they are its own."""
    one, two = make_root("one"), make_root("two")
    monkeypatch.setattr(claims, "_in_use", lambda: iter([(FIRST_RANGE, claims.RANGE)]))
    for lost in (b"", b"{", b'{"x": 1}', b"\xff\x00"):
        claims.claim_idmap(two, "1")
        Path(claims.DIRECTORY, "claims").write_bytes(lost)
        assert claims.claim_idmap(two, "2") != FIRST_RANGE
        assert claims.claim_idmap(one, "1", FIRST_RANGE) == FIRST_RANGE
        assert code_of(claims.claim_idmap, two, "3", FIRST_RANGE) == "conflict"
        claims.release_all(one)
        claims.release_all(two)


def test_parts_of_a_lost_range_are_not_in_the_way_of_its_jail(
    monkeypatch: pytest.MonkeyPatch, make_root: MakeRoot
) -> None:
    """A jail's own user namespaces, such as podman's, map a part of its range each; a neighbour's is not given away."""
    one, two = make_root("one"), make_root("two")
    neighbour = (FIRST_RANGE + IDS, claims.RANGE)
    lost = [(FIRST_RANGE, IDS), (FIRST_RANGE + 100_000, 65536), (FIRST_RANGE + 1000, 1), neighbour]
    monkeypatch.setattr(claims, "_in_use", lambda: iter(lost))
    assert claims.claim_idmap(two, "1", None, IDS) == FIRST_RANGE + IDS + claims.RANGE
    assert claims.claim_idmap(one, "1", FIRST_RANGE, IDS, IDS) == FIRST_RANGE
    assert code_of(claims.claim_idmap, one, "1", FIRST_RANGE, IDS + claims.RANGE, IDS) == "conflict"


def test_lost_claims_of_others_are_not_in_the_hosts_own_way(
    monkeypatch: pytest.MonkeyPatch, make_root: MakeRoot
) -> None:
    """What is found of processes whose claims were lost has no mark, and neither has the host's own instance."""
    monkeypatch.setattr(claims, "_in_use", lambda: iter([(FIRST_RANGE, claims.RANGE)]))
    own = Root("lib", "run", "etc", "")
    claims.claim_mark(own)
    claims.claim_mark(own)
    assert claims.claim_idmap(own, "1") != FIRST_RANGE


def test_a_failed_claim_changes_nothing(make_root: MakeRoot) -> None:
    one = make_root("one")
    claims.claim_idmap(one, "1")
    before = Path(claims.DIRECTORY, "claims").read_bytes()
    assert code_of(claims.claim_idmap, one, "2", FIRST_RANGE) == "conflict"
    assert Path(claims.DIRECTORY, "claims").read_bytes() == before


def test_no_permission_is_told(make_root: MakeRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(claims, "DIRECTORY", str(tmp_path / "file" / "run"))
    assert code_of(claims.claim_idmap, make_root("one"), "1") == "failed"


def _claim(directory: str, root: Root, number: int) -> list[int]:
    claims.DIRECTORY = directory
    return [claims.claim_idmap(root, f"{number}-{place}") for place in range(20)]


def test_many_processes_at_once(make_root: MakeRoot) -> None:
    with ProcessPoolExecutor(4) as pool:
        asked = [pool.submit(_claim, claims.DIRECTORY, make_root(f"r{number}"), number) for number in range(4)]
        got = [first for future in asked for first in future.result()]
    assert sorted(got) == [FIRST_RANGE + number * claims.RANGE for number in range(80)]
