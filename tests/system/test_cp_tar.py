"""`cp - NAME:DIR/`: a tar on stdin, whole or refused."""

from __future__ import annotations

import gzip
import io
import tarfile

import pytest

from tests.system.conftest import MakeJail
from tests.system.instance import Instance


def _tar(*names: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.uid = 3000, 0o640, 1000
            tar.addfile(member, io.BytesIO(b"x" * 3000))
    return out.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_on_stdin(jm: Instance, busybox_jail: MakeJail, packed: bool) -> None:
    jail, tar = busybox_jail(), _tar("one", "two")
    jm("cp", "-", f"{jail}:/root/", stdin=gzip.compress(tar) if packed else tar)
    assert jm.sh(jail, "stat -c '%n %a %u %s' /root/*").out == "/root/one 640 1000 3000\n/root/two 640 1000 3000\n"


@pytest.mark.parametrize("cut", [100, 512 + 700, 512 + 3072 + 188])
def test_a_tar_that_is_cut_short_is_an_error(jm: Instance, busybox_jail: MakeJail, cut: int) -> None:
    """In a first header, in content, and in a later header, which tarfile by itself takes for the end."""
    error = jm("cp", "-", f"{busybox_jail()}:/root/", stdin=_tar("one", "two")[:cut], status=1).err
    assert "fault of jailmgr" not in error
    assert "tar" in error or "ended early" in error


def test_no_tar_at_all(jm: Instance, busybox_jail: MakeJail) -> None:
    for content in (b"garbage", b"\xff" * 20000, gzip.compress(_tar("one"))[:50]):
        error = jm("cp", "-", f"{busybox_jail()}:/root/", stdin=content, status=1).err
        assert "fault of jailmgr" not in error
