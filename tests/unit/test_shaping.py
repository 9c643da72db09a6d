"""Rates: what is taken, which queues they make, and what the filter on a port says."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jailmgr import keys
from jailmgr.config import find_root
from jailmgr.errors import JailmgrError
from jailmgr.manager.configure import changed
from jailmgr.model import Jail, Tenant
from jailmgr.network import shaping
from jailmgr.runtime.shaping import MARK, program
from jailmgr.units import parse_bit_rate

ROOT = find_root("/tmp/x")
MBIT = 125_000
"""Bytes a second."""


def jail(devices: dict[str, dict[str, str]] | None = None, ids: int = 0x7001) -> Jail:
    return Jail(5, "acme", "web", "f" * 64, "busybox", 0.0, {}, devices or {}, ids << 16)


def tenant(**config: str) -> Tenant:
    return Tenant(0x2A, "acme", 0.0, 1, {f"limits.{key}": value for key, value in config.items()})


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("10Mbit", 10_000_000),
        ("1.5Gbit", 1_500_000_000),
        ("64Kibit", 65536),
        ("8000", 8000),
        ("8000bit", 8000),
        ("100kbit", 100_000),
        (" 1Mibit ", 1 << 20),
        ("1Tbit", 10**12),
    ],
)
def test_rates_are_lxds(text: str, bits: int) -> None:
    assert parse_bit_rate(text) == bits


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Mbit",
        "10MB",
        "10 MiB",
        "10mbit",
        "10Kbit",
        "1bit",
        "7999",
        "-1Mbit",
        "2Tbit",
        "1e3Mbit",
        "9" * 5000,
        "٣Mbit",
    ],
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"rate|between"):
        parse_bit_rate(text)


@given(st.text())
def test_a_rate_is_a_number_or_an_error(text: str) -> None:
    try:
        assert 8000 <= parse_bit_rate(text) <= 10**12
    except ValueError:
        return


def test_short_names_mean_the_first_nic() -> None:
    config, devices = keys.fold({"limits.ingress": "1Mbit", "limits.egress": "2Mbit"}, {"eth0": {"network": "a"}})
    assert config == {}
    assert devices["eth0"] == {"type": "nic", "network": "a", "limits.ingress": "1Mbit", "limits.egress": "2Mbit"}
    assert keys.fold({"limits.egress": "1Mbit"}, {"eth0": {"limits.egress": "1000kbit"}})[1]
    with pytest.raises(JailmgrError, match=r"limits\.egress says 2Mbit"):
        keys.fold({"limits.egress": "1Mbit"}, {"eth0": {"limits.egress": "2Mbit"}})


def test_short_names_are_set_and_unset() -> None:
    limited = changed(jail(), {"limits.egress": "1Mbit"}, {})
    assert shaping.rates_of_jail(limited) == {"egress": MBIT}
    assert shaping.rates_of_jail(changed(limited, {"limits.egress": None}, {})) == {}
    with pytest.raises(JailmgrError, match=r"limits\.ingress"):
        changed(limited, {"limits.ingress": "fast"}, {})


def test_both_directions_by_one_key() -> None:
    assert shaping.rates_of({"limits.max": "8Mbit"}) == {"ingress": 8 * MBIT, "egress": 8 * MBIT}
    assert shaping.rates_of({"limits.max": "8Mbit", "limits.egress": "1Mbit"}) == {"ingress": 8 * MBIT, "egress": MBIT}
    assert shaping.rates_of({"network": "default"}) == {}


def test_a_jail_without_rates_has_no_queues() -> None:
    assert shaping.shape_of(ROOT, tenant(), jail({"eth0": {"type": "nic", "network": "default"}})) == {}


def test_queues_are_the_tenants_and_classes_the_jails() -> None:
    own = jail({"eth0": {"type": "nic", "limits.egress": "1Mbit"}})
    assert shaping.shape_of(ROOT, tenant(), own) == {"egress": (f"{ROOT.link_prefix}e2a", 0x17001)}
    both = shaping.shape_of(ROOT, tenant(ingress="8Mbit"), own)
    assert both == {"ingress": (f"{ROOT.link_prefix}i2a", 0x17001), "egress": (f"{ROOT.link_prefix}e2a", 0x17001)}
    other = shaping.shape_of(ROOT, tenant(egress="8Mbit"), jail(ids=0x7002))
    assert other == {"egress": (f"{ROOT.link_prefix}e2a", 0x17002)}


def test_names_fit_the_kernel() -> None:
    """IFNAMSIZ is 16, with the final NUL."""
    assert len(shaping.ifb_name(ROOT, 2**28 - 1, "ingress")) <= 15


def test_the_smaller_rate_is_the_ceiling() -> None:
    assert shaping.jail_class(jail(), MBIT, None).ceil == MBIT
    assert shaping.jail_class(jail(), MBIT, 8 * MBIT).ceil == MBIT
    assert shaping.jail_class(jail(), 8 * MBIT, MBIT).ceil == MBIT
    assert shaping.jail_class(jail(), None, MBIT).ceil == MBIT
    assert shaping.jail_class(jail(), None, None).ceil == shaping.UNLIMITED


@given(st.integers(1000, shaping.UNLIMITED), st.one_of(st.none(), st.integers(1000, shaping.UNLIMITED)))
def test_leaves_borrow_all_they_send(total: int, own: int | None) -> None:
    """What a class has as its own rate it sends whatever its parent has left: the total would not hold."""
    whole, rest = shaping.tenant_classes(total)
    leaf = shaping.jail_class(jail(), own, total)
    assert (whole.rate, whole.ceil, whole.queue) == (total, total, None)
    for each in (rest, leaf):
        assert each.parent == whole.minor
        assert each.rate <= 125
        assert each.ceil <= total
        assert each.queue is not None
        assert 2 * 65536 <= each.queue <= 1 << 20
        assert 1514 < each.quantum <= 200_000, "htb wants it so"
    assert len({whole.minor, rest.minor, leaf.minor}) == 3


def test_the_filter_says_the_class_and_marks_what_is_sent() -> None:
    """struct bpf_insn: code, registers, offset, immediate; priority is at 32 and mark at 8 of struct __sk_buff."""
    received = list(struct.iter_unpack("=BBhi", program(0x17001)))
    assert received == [(0xB7, 2, 0, 0x17001), (0x63, 0x21, 32, 0), (0xB7, 0, 0, -1), (0x95, 0, 0, 0)]
    sent = list(struct.iter_unpack("=BBhi", program(0x17001, MARK)))
    assert sent[2:4] == [(0xB7, 2, 0, MARK), (0x63, 0x21, 8, 0)]
    assert sent[:2] + sent[4:] == received
