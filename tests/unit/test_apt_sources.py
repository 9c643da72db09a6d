"""The host's apt sources in both formats, and which entry a release is fetched from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jailmgr.config import Root
from jailmgr.errors import JailmgrError
from jailmgr.template.apt_sources import (
    Entry,
    Mirrors,
    choose_mirrors,
    configured_mirrors,
    parse_deb822,
    parse_one_line,
    read_sources,
    without_credentials,
)

A, B, S = "http://a.example/debian", "https://b.example/debian", "http://s.example/debian-security"


def test_one_line() -> None:
    text = f"""
# deb {B} stable main
deb [arch=amd64,arm64 signed-by=/usr/share/keyrings/x.gpg] {A}/ bookworm main contrib # why
deb-src {A} bookworm main
deb\t{S}\tbookworm-security\tmain
deb cdrom:[Debian]/ bookworm main
deb file:/srv/mirror bookworm main
deb {A}
nonsense
"""
    assert list(parse_one_line(text)) == [
        Entry(A, ("bookworm",), ("main", "contrib"), ("amd64", "arm64")),
        Entry(S, ("bookworm-security",), ("main",)),
    ]


def test_deb822() -> None:
    text = f"""\
Types: deb deb-src
# a comment within
URIs: {A}
  {B}/
Suites: bookworm
# and within a field
 bookworm-updates
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 URIs: http://no.example/

Types: deb
URIs: {S}
Suites: bookworm-security
Components: main
Architectures: arm64

Types: deb
Enabled: no
URIs: http://off.example/
Suites: bookworm
Components: main

Types: deb-src
URIs: http://src.example/
Suites: bookworm
Components: main
"""
    assert list(parse_deb822(text)) == [
        Entry(A, ("bookworm", "bookworm-updates"), ("main",)),
        Entry(B, ("bookworm", "bookworm-updates"), ("main",)),
        Entry(S, ("bookworm-security",), ("main",), ("arm64",)),
    ]


@given(st.text(alphabet="deb :[]#\n\thtp/.aURIsTyeSuitComnx", max_size=200))
def test_junk_is_passed_over(text: str) -> None:
    for entry in (*parse_one_line(text), *parse_deb822(text)):
        assert entry.url.startswith("http")
        assert not any(char.isspace() for char in entry.url)


def test_read_in_apts_order(tmp_path: Path) -> None:
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text(f"deb {A} one main\n")
    (parts / "b.list").write_text(f"deb {B} two main\n")
    (parts / "a.sources").write_text(f"Types: deb\nURIs: {S}\nSuites: three\nComponents: main\n")
    (parts / "c.list.disabled").write_text("deb http://off.example/ one main\n")
    (parts / "d list.list").write_text("deb http://off.example/ one main\n")
    (parts / "e.list").write_bytes(b"deb \xff\xfe one main\n")
    assert [entry.url for entry in read_sources(str(tmp_path))] == [A, S, B]
    assert read_sources(str(tmp_path / "nothing")) == []


def never(_url: str, _suite: str) -> str:
    raise AssertionError("asked a mirror")


OTHER = Entry("https://packages.example/apt", ("stable",), ("main",))
ENTRIES = [
    OTHER,
    Entry(B, ("bookworm",), ("contrib",)),
    Entry("http://arm.example/debian", ("bookworm",), ("main",), ("arm64",)),
    Entry(A, ("bookworm", "bookworm-updates"), ("main",)),
    Entry(S, ("bookworm-security",), ("main",)),
]
RELEASES = ["bookworm", "trixie"]


def test_entry_that_carries_the_suite() -> None:
    assert choose_mirrors(Mirrors(), ENTRIES, "bookworm", RELEASES, "amd64", never) == Mirrors(A, S)


def test_configuration_comes_first() -> None:
    configured = Mirrors("http://c.example/debian")
    assert choose_mirrors(configured, ENTRIES, "bookworm", RELEASES, "amd64", never) == Mirrors(configured.url, S)


def test_entry_of_a_sibling_is_asked() -> None:
    asked: list[tuple[str, str]] = []

    def reach(url: str, suite: str) -> str:
        asked.append((url, suite))
        return "it has no such suite" if url == S else ""

    assert choose_mirrors(Mirrors(), ENTRIES, "trixie", RELEASES, "amd64", reach) == Mirrors(A, "")
    assert asked == [(A, "trixie"), (S, "trixie-security")]


def test_left_to_debootstrap_where_nothing_fits() -> None:
    assert choose_mirrors(Mirrors(), [OTHER], "trixie", RELEASES, "amd64", never) == Mirrors()


def test_credentials_stay_on_the_host() -> None:
    assert without_credentials("https://me:p%40ss@m.example:8080/debian") == "https://m.example:8080/debian"
    assert without_credentials(A) == A


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Mirrors()),
        ('[pool]\nsize = "1GiB"\n', Mirrors()),
        (f'[build]\nmirror = "{A}/"\nsecurity_mirror = "{S}"\n', Mirrors(A, S)),
    ],
)
def test_config(tmp_path: Path, text: str, expected: Mirrors) -> None:
    (tmp_path / "config.toml").write_text(text)
    assert configured_mirrors(Root("", "", str(tmp_path), ""), "debian", Mirrors()) == expected


def test_no_config(tmp_path: Path) -> None:
    assert configured_mirrors(Root("", "", str(tmp_path), ""), "debian", Mirrors()) == Mirrors()


@pytest.mark.parametrize(
    "text",
    [
        "[build\n",
        "build = 1",
        "[build]\nmirror = 1",
        '[build]\nmirror = "file:///srv"',
        '[build]\nmirror = "http://a b/"',
    ],
)
def test_bad_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(JailmgrError) as refused:
        configured_mirrors(Root("", "", str(tmp_path), ""), "debian", Mirrors())
    assert refused.value.code == "invalid"


def test_build_mirror_is_debians_only(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'[build]\nmirror = "{A}"\n[mirrors.devuan]\nurl = "{S}/"\n')
    root = Root("", "", str(tmp_path), "")
    assert configured_mirrors(root, "debian", Mirrors()) == Mirrors(A)
    assert configured_mirrors(root, "devuan", Mirrors("http://own.example")) == Mirrors(S)
    assert configured_mirrors(root, "ubuntu", Mirrors("http://own.example")) == Mirrors("http://own.example")
    assert configured_mirrors(root, "ubuntu", Mirrors()) == Mirrors()
