"""The canonical tar: what it holds, what it depends on, and that its bytes stay what they were."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.image.fingerprint import canonical_tar, disk_size, fingerprint

PINNED = "88b53d2d1287f884ab053785fd16f6b19b777a3a7905c0144fd3d4b7b935ff2c"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree of every kind an unprivileged user can make; `b-link` is the second name of `a/file`."""
    top = tmp_path / "rootfs"
    (top / "a" / "deep").mkdir(parents=True)
    (top / "a" / "file").write_bytes(b"content\n" * 100)
    (top / "a" / "deep" / "empty").write_bytes(b"")
    (top / "a.b").write_bytes(b"sorts between a and b")
    os.link(top / "a" / "file", top / "b-link")
    os.symlink("/etc/../outside", top / "link")
    os.mkfifo(top / "fifo")
    (top / ("long" * 40)).write_bytes(b"x" * 512)
    (top / "ä\udcff").write_bytes(b"no UTF-8")
    for path in [*top.rglob("*"), top]:
        if not path.is_symlink():
            path.chmod(0o750 if path.is_dir() else 0o640)
    return top


def members(tree: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(canonical_tar(str(tree)))), mode="r:") as archive:
        return {member.name: member for member in archive}


def test_fingerprint_is_the_sha256_of_the_tar(tree: Path) -> None:
    assert fingerprint(str(tree)) == hashlib.sha256(b"".join(canonical_tar(str(tree)))).hexdigest()


def test_tar_can_be_read_back_whole(tree: Path) -> None:
    found = members(tree)
    assert [*found] == [
        ".",
        "a",
        "a/deep",
        "a/deep/empty",
        "a/file",
        "a.b",
        "b-link",
        "fifo",
        "link",
        "long" * 40,
        "ä\udcff",
    ]
    assert found["a/file"].size == 800
    assert found["a/file"].mode == 0o640
    assert found["b-link"].islnk()
    assert found["b-link"].linkname == "a/file"
    assert found["link"].linkname == "/etc/../outside"
    assert found["fifo"].isfifo()
    assert found["a"].isdir()
    assert all(member.mtime == 0 for member in found.values())
    assert all(member.uid == os.getuid() for member in found.values())


def test_content_comes_back(tree: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(b"".join(canonical_tar(str(tree)))), mode="r:") as archive:
        for name in ("a/file", "a.b", "long" * 40):
            file = archive.extractfile(name)
            assert file is not None
            assert file.read() == (tree / name).read_bytes()


def test_times_and_order_of_making_do_not_count(tree: Path) -> None:
    before = fingerprint(str(tree))
    os.utime(tree / "a" / "file", (1, 1))
    os.rename(tree / "a.b", tree / "away")
    os.rename(tree / "away", tree / "a.b")
    assert fingerprint(str(tree)) == before


@pytest.mark.parametrize("change", ["content", "mode", "name", "link", "hardlink", "xattr", "empty directory"])
def test_everything_else_counts(tree: Path, change: str) -> None:
    before = fingerprint(str(tree))
    if change == "content":
        (tree / "a.b").write_bytes(b"sorts between a and c")
    elif change == "mode":
        (tree / "a.b").chmod(0o4755)
    elif change == "name":
        os.rename(tree / "a.b", tree / "a.c")
    elif change == "link":
        os.unlink(tree / "link")
        os.symlink("elsewhere", tree / "link")
    elif change == "hardlink":
        os.unlink(tree / "b-link")
        (tree / "b-link").write_bytes((tree / "a" / "file").read_bytes())
        (tree / "b-link").chmod(0o640)
    elif change == "xattr":
        os.setxattr(tree / "a.b", "user.note", b"\xff\x00binary")
    else:
        (tree / "new").mkdir()
    assert fingerprint(str(tree)) != before


def test_extended_attributes_are_told_as_gnu_tar_does(tree: Path) -> None:
    os.setxattr(tree / "a.b", "user.note", b"\xff\x00binary")
    told = members(tree)["a.b"].pax_headers["SCHILY.xattr.user.note"]
    assert told.encode("utf-8", "surrogateescape") == b"\xff\x00binary"


def test_sockets_are_left_out(tree: Path) -> None:
    before = fingerprint(str(tree))
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tree / "sock"))
        assert fingerprint(str(tree)) == before


def test_links_are_not_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    os.symlink("../outside", tree / "out")
    before = fingerprint(str(tree))
    (tmp_path / "outside" / "file").write_bytes(b"not of the tree")
    assert fingerprint(str(tree)) == before


def test_a_tree_too_deep_is_refused(tmp_path: Path) -> None:
    """An image's maker may nest directories deeper than a path can be; openat2(2) then says ENAMETOOLONG."""
    top = tmp_path / "rootfs"
    top.mkdir()
    at = os.open(top, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=at)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    with pytest.raises(JailmgrError, match="too long") as raised:
        fingerprint(str(top))
    assert raised.value.code == "invalid"


def test_size_counts_a_file_of_two_names_once(tree: Path) -> None:
    (tree / "big").write_bytes(os.urandom(1 << 20))
    before = disk_size(str(tree))
    os.link(tree / "big", tree / "big2")
    assert before >= 1 << 20
    assert disk_size(str(tree)) - before < 1 << 16


@pytest.mark.skipif(os.geteuid() != 0, reason="the owner of the files is part of it")
def test_bytes_are_as_they_were(tree: Path) -> None:
    """Images keep their name: a Python whose tarfile writes other bytes must not go unseen."""
    assert fingerprint(str(tree)) == PINNED
