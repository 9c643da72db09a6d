"""Whose a config.json is: by the row that it keeps, or by the interface in one of an earlier release."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from jailmgr.config import Root
from jailmgr.manager.kept import ANNOTATION, read
from jailmgr.model import Jail, Kept, Network, Nic, OnDisk, Tenant

JAIL = Jail(7, "acme", "web", "ab" * 32, "busybox", 1.0, {"limits.memory": "1GiB"}, {}, 1879113728)
KEPT = Kept(JAIL, Tenant(3, "acme", 0.0, 1879048193), [])
NETWORK = Network(4, "acme", "default", "10.77.0.1/24", "fd00::1/64")
NICS = json.dumps([{"name": "eth0", "veth": "jmlocalv1f"}])


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(f"{tmp_path}/lib", f"{tmp_path}/run", f"{tmp_path}/etc", "")


def _write(root: Root, content: object) -> None:
    directory = Path(root.jail_lib("acme", "web"))
    directory.mkdir(parents=True)
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (directory / "config.json").write_bytes(text)


def test_the_row_that_is_kept(root: Root) -> None:
    kept = msgspec.json.encode(KEPT).decode()
    _write(root, {"ociVersion": "1.2.0", "annotations": {ANNOTATION: kept, "org.jailmgr.nics": NICS}})
    assert read(root, "acme", "web") == OnDisk(7, KEPT)


@pytest.mark.parametrize("kept", ["", "{}", "[", msgspec.json.encode(KEPT).decode().replace("acme", "other")])
def test_without_one_the_interface_says_whose_it_is(root: Root, kept: str) -> None:
    _write(root, {"annotations": {ANNOTATION: kept, "org.jailmgr.nics": NICS}})
    assert read(root, "acme", "web") == OnDisk(0x1F)


@pytest.mark.parametrize(
    ("ipv4", "networks"),
    [("10.77.0.r", [NETWORK]), ("10.77.0.2", []), ("10.77.0.2", [msgspec.structs.replace(NETWORK, ipv6="fd00::g/64")])],
    ids=["address", "network", "subnet"],
)
def test_a_damaged_one_says_whose_it_is_and_no_more(root: Root, ipv4: str, networks: list[Network]) -> None:
    nic = Nic("eth0", "default", "jmlocalv7", "02:00:00:00:00:07", ipv4, "fd00::2")
    kept = msgspec.json.encode(Kept(msgspec.structs.replace(JAIL, nics=[nic]), KEPT.tenant, networks)).decode()
    _write(root, {"annotations": {ANNOTATION: kept, "org.jailmgr.nics": NICS}})
    assert read(root, "acme", "web") == OnDisk(0x1F)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        {"annotations": {}},
        {"annotations": {"org.jailmgr.nics": "{}"}},
        {"annotations": {"org.jailmgr.nics": '[{"veth": "eth0"}, {"veth": null}, {}]'}},
    ],
)
def test_what_says_nothing_is_nobodys(root: Root, content: object) -> None:
    _write(root, content)
    assert read(root, "acme", "web") == OnDisk()


def test_no_file(root: Root) -> None:
    assert read(root, "acme", "web") == OnDisk()
