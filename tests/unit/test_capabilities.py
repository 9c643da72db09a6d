"""Names, numbers and the bounding set; giving capabilities up needs some to begin with (tests/system)."""

from __future__ import annotations

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.runtime.capabilities import BOUNDING, NAMES, mask


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("CAP_CHOWN", 0),
        ("CAP_KILL", 5),
        ("CAP_NET_ADMIN", 12),
        ("CAP_SYS_ADMIN", 21),
        ("CAP_MKNOD", 27),
        ("CAP_SETFCAP", 31),
        ("CAP_AUDIT_READ", 37),
        ("CAP_BPF", 39),
        ("CAP_CHECKPOINT_RESTORE", 40),
    ],
)
def test_numbers_are_those_of_capability_h(name: str, number: int) -> None:
    assert NAMES.index(name) == number
    assert mask([name]) == 1 << number


def test_what_a_system_container_keeps() -> None:
    assert {"CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_BOOT", "CAP_SETUID", "CAP_MKNOD"} <= set(BOUNDING)
    assert not {"CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_TIME", "CAP_SYSLOG", "CAP_BPF"} & set(BOUNDING)
    assert set(BOUNDING) <= set(NAMES)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(JailmgrError) as caught:
        mask(["CAP_CHOWN", "CAP_FLY"])
    assert caught.value.code == "invalid"
    assert "CAP_FLY" in caught.value.what
