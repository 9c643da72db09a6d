"""Holes of sparse files in the stream of `cp`, read by our reader, by GNU tar and by tarfile."""

from __future__ import annotations

import os
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest

from jailmgr.runtime import archive, extract, pax, sparse

MIB = 1 << 20
SHAPES: dict[str, tuple[int, dict[int, bytes]]] = {
    "all-hole": (3 * MIB, {}),
    "hole-first": (2 * MIB, {MIB: b"a" * 5000, 2 * MIB - 10: b"z" * 10}),
    "hole-last": (5 * MIB + 7, {0: b"b" * 70_000}),
    "many": (40 * MIB, {at * 65536: b"%d" % at for at in range(0, 640, 2)}),
    "huge": (1 << 40, {1 << 39: b"middle"}),
    "plain": (300_000, {0: b"c" * 300_000}),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    top.mkdir()
    for name, (size, content) in SHAPES.items():
        with (top / name).open("wb") as file:
            for offset, part in content.items():
                file.seek(offset)
                file.write(part)
            file.truncate(size)
    return top


def written(tree: Path, to: Path) -> Path:
    with to.open("wb") as file:
        assert archive.write_tree(str(tree), file.fileno(), False) == []
    return to


def check(at: Path, *, holes: bool = True) -> None:
    for name, (size, content) in SHAPES.items():
        assert (at / name).stat().st_size == size, name
        with (at / name).open("rb") as file:
            for offset, part in content.items():
                file.seek(offset)
                assert file.read(len(part)) == part, name
            if name == "many":
                file.seek(3 * 65536)
                assert not file.read(65536).strip(b"\0")
        if holes:
            used = 512 * (at / name).stat().st_blocks
            assert used <= sum(len(part) + 8192 for part in content.values()), name


def test_holes_are_kept(tree: Path, tmp_path: Path) -> None:
    tar = written(tree, tmp_path / "tar")
    assert tar.stat().st_size < 2 * MIB
    (tmp_path / "ours").mkdir()
    read_end, write_end = os.pipe()

    def feed() -> None:
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(tar.read_bytes())

    sender = threading.Thread(target=feed)
    sender.start()
    assert extract.extract(pax.Reader(read_end), os.fsencode(tmp_path / "ours"), extract.Rules()) == []
    sender.join()
    os.close(read_end)
    check(tmp_path / "ours" / "tree")


def test_gnu_tar_and_tarfile_read_them(tree: Path, tmp_path: Path) -> None:
    tar = written(tree, tmp_path / "tar")
    for name in ("gnu", "python"):
        (tmp_path / name).mkdir()
    subprocess.run(["tar", "-xf", str(tar), "-C", str(tmp_path / "gnu")], check=True)
    check(tmp_path / "gnu" / "tree")
    with tarfile.open(tar) as archived:
        archived.extractall(tmp_path / "python", filter="data")
    check(tmp_path / "python" / "tree", holes=False)


def test_content_fills_holes_with_zeros(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.seek(MIB)
        file.write(b"data")
        file.truncate(2 * MIB)
    tar = written(tmp_path / "file", tmp_path / "tar")
    with tar.open("rb") as stream:
        reader = pax.Reader(stream.fileno())
        assert reader.next() is not None
        assert b"".join(reader.content()) == (tmp_path / "file").read_bytes()
        assert reader.next() is None


@pytest.mark.parametrize(
    "text",
    [
        b"1\n0\n",  # cut short: the blocks that follow hold no number
        b"x\n",
        b"1\n-5\n10\n",
        b"2\n100\n50\n0\n10\n",  # out of order
        b"1\n0\n99999\n",  # beyond the file
        b"99999999\n0\n1\n",  # too many
        b"1" * 600,
        b"",
    ],
)
def test_a_list_that_is_none_is_refused(text: bytes) -> None:
    blocks = [(text + bytes(-len(text) % 512) or bytes(512))[at : at + 512] for at in range(0, len(text) or 1, 512)]

    def take(count: int) -> bytes:
        assert count == sparse.BLOCK
        return blocks.pop(0) if blocks else bytes(512)

    with pytest.raises(ValueError, match=r".+"):
        sparse.read_map(take, 1000)


def test_a_list_of_another_size_than_its_content_is_refused(tmp_path: Path) -> None:
    member = pax.Member(b"file", pax.FILE, size=100, extents=((0, 10),))
    blocks = pax.header(member)
    at = blocks.rindex(b"2\n0\n10\n")
    (tmp_path / "tar").write_bytes(blocks[:at] + b"2\n0\n90\n" + blocks[at + 7 :] + bytes(2048))
    with (tmp_path / "tar").open("rb") as stream, pytest.raises(pax.BrokenStreamError, match="another size"):
        pax.Reader(stream.fileno()).next()
