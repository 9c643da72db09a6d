"""Files are read whole, however long they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jailmgr.runtime.plainfile import read_bytes


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 200_000])
def test_all_of_it(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    Path(tmp_path, "file").write_bytes(content)
    assert read_bytes(f"{tmp_path}/file") == content
