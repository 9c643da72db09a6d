"""Addresses of networks and jails."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from jailmgr import claims
from jailmgr.config import Root, find_root
from jailmgr.errors import JailmgrError
from jailmgr.model import Network
from jailmgr.network import addresses
from jailmgr.runtime import netlink

NETWORK = Network(1, "default", "default", "10.83.7.1/24", "fd42:1:2:3::1/64")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    monkeypatch.setattr(claims, "DIRECTORY", str(tmp_path / "run"))
    return find_root(str(tmp_path))


def code_of(*args: object) -> str:
    with pytest.raises(JailmgrError) as caught:
        addresses.choose_address(*args)  # type: ignore[arg-type]
    return caught.value.code


def test_the_lowest_free_address_with_its_ipv6_twin() -> None:
    assert addresses.choose_address(NETWORK, set()) == ("10.83.7.2", "fd42:1:2:3::2")
    assert addresses.choose_address(NETWORK, {"10.83.7.2", "10.83.7.4"}) == ("10.83.7.3", "fd42:1:2:3::3")
    assert addresses.choose_address(NETWORK, set(), "10.83.7.200") == ("10.83.7.200", "fd42:1:2:3::c8")


def test_a_bridge_in_the_midst_of_its_subnet() -> None:
    network = Network(1, "t", "n", "10.83.6.255/23", "fd42::1ff/64")
    taken = {f"10.83.6.{number}" for number in range(1, 255)}
    assert addresses.choose_address(network, taken) == ("10.83.7.0", "fd42::100")


@pytest.mark.parametrize(
    "wrong", ["10.83.7.0", "10.83.7.255", "10.83.7.1", "10.83.8.2", "x", "", "10.83.7.2/24", "fd42:1:2:3::2"]
)
def test_what_a_network_cannot_give(wrong: str) -> None:
    assert code_of(NETWORK, set(), wrong) == "invalid"


def test_what_is_taken_and_what_is_full() -> None:
    assert code_of(NETWORK, {"10.83.7.9"}, "10.83.7.9") == "conflict"
    assert code_of(NETWORK, {f"10.83.7.{number}" for number in range(2, 255)}) == "full"


def test_a_new_network_has_addresses_of_its_own(root: Root) -> None:
    one, two = (addresses.new_network(root, number, "t", "n") for number in (1, 2))
    own4, own6 = ipaddress.IPv4Interface(one.ipv4), ipaddress.IPv6Interface(one.ipv6)
    assert (own4.network.prefixlen, own6.network.prefixlen) == (24, 64)
    assert own4.ip == own4.network[1]
    assert own6.ip == own6.network[1]
    assert own6.network.subnet_of(ipaddress.IPv6Network("fd00::/8"))
    assert not own4.network.overlaps(ipaddress.IPv4Interface(two.ipv4).network)
    assert own6.network != ipaddress.IPv6Interface(two.ipv6).network


def test_a_network_with_addresses_somebody_wants(root: Root) -> None:
    network = addresses.new_network(root, 1, "t", "n", "10.201.202.254/25", "fd01::5/64")
    assert (network.ipv4, network.ipv6) == ("10.201.202.254/25", "fd01::5/64")
    with pytest.raises(JailmgrError, match=r"10\.201\.202"):
        addresses.new_network(root, 2, "t", "m", "10.201.202.1/24")


@pytest.mark.parametrize(
    ("ipv4", "ipv6"),
    [
        ("10.1.2.0/24", None), ("10.1.2.255/24", None), ("10.1.2.1", None), ("8.8.8.8/24", None), ("x", None),
        ("10.1.2.1/31", None), (None, "2600::1/64"), (None, "fe80::1/64"), (None, "fd00::/64"), (None, "fd00::1/48"),
        (None, "x"),
    ],
)  # fmt: skip
def test_addresses_no_bridge_can_have(root: Root, ipv4: str | None, ipv6: str | None) -> None:
    with pytest.raises(JailmgrError) as caught:
        addresses.new_network(root, 1, "t", "n", ipv4, ipv6)
    assert caught.value.code == "invalid"


def test_macs_are_local_and_never_two_alike() -> None:
    """Jails of two roots have no address in common on a host; here they do, so these two differ in their first byte."""
    roots = [find_root(at) for at in ("/srv/one", "/srv/two")]
    macs = [addresses.bridge_mac(own, number) for own in roots for number in range(300)]
    macs += [addresses.mac_for(own, f"10.7.{number}.2") for own in roots for number in range(200)]
    assert len(set(macs)) == len(macs)
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs), "locally administered, and no group's"


def test_a_mac_is_made_of_the_address(root: Root) -> None:
    """So whoever gets a deleted jail's address has its MAC, which neighbours still know (arp(7))."""
    assert addresses.mac_for(root, "10.7.1.2").endswith(":0a:07:01:02")


def test_link_local_address_of_a_mac() -> None:
    """The example of RFC 4291, appendix A, and one whose bit is set already."""
    assert netlink.link_local("34:56:78:9a:bc:de") == "fe80::3656:78ff:fe9a:bcde"
    assert netlink.link_local("0a:00:00:01:02:03") == "fe80::800:ff:fe01:203"
