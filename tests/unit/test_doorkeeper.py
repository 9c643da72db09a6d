"""The doorkeeper's sense of who somebody is; what it does with connections is tried in tests/system/test_door.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from jailmgr.runtime.doorkeeper import first_of_range


@pytest.mark.parametrize(
    ("uid", "first"), [(1000, None), (99_999, None), (100_000, 100_000), (165_535, 100_000), (165_536, None), (0, None)]
)
def test_all_subordinate_uids_of_an_account_are_one(tmp_path: Path, uid: int, first: int | None) -> None:
    file = tmp_path / "subuid"
    file.write_text("alice:100000:65536\n# a remark\nbroken:x:y\n\n:1:\n")
    assert first_of_range(uid, str(file)) == first
    assert first_of_range(uid, str(tmp_path / "none")) is None
