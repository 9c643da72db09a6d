"""Files of a hostile tree: no link in it leads out, no entry of it hangs the host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jailmgr.template import tree


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "secret").write_text("secret")
    return directory


@pytest.fixture
def rootfs(tmp_path: Path, outside: Path) -> Path:
    directory = tmp_path / "rootfs"
    (directory / "etc").mkdir(parents=True)
    (directory / "out").symlink_to(outside)
    (directory / "up").symlink_to("../outside")
    return directory


@pytest.fixture
def top(rootfs: Path) -> Iterator[int]:
    with tree.open_tree(str(rootfs)) as fd:
        yield fd


def test_write_and_read(top: int, rootfs: Path) -> None:
    tree.write(top, "/usr/lib/x/file", b"one", 0o640)
    tree.write(top, "/usr/lib/x/file", b"two", 0o755)
    assert tree.read(top, "/usr/lib/x/file", 2) == b"tw"
    assert (rootfs / "usr/lib/x/file").stat().st_mode & 0o7777 == 0o755
    assert (rootfs / "usr/lib").stat().st_mode & 0o7777 == 0o755
    assert os.listdir(rootfs / "usr/lib/x") == ["file"]


def test_links_within_are_followed(top: int, rootfs: Path) -> None:
    (rootfs / "usr").mkdir()
    (rootfs / "lib").symlink_to("/usr")
    tree.write(top, "/lib/file", b"x", 0o644)
    assert (rootfs / "usr/file").read_bytes() == b"x"


@pytest.mark.parametrize("link", ["out", "up"])
def test_links_out_are_not(top: int, outside: Path, link: str) -> None:
    assert tree.read(top, f"/{link}/secret", 100) is None
    with pytest.raises(OSError, match=r"exists|No such file"):
        tree.write(top, f"/{link}/secret", b"x", 0o644)
    tree.remove(top, f"/{link}/*")
    assert (outside / "secret").read_text() == "secret"


def test_a_link_in_the_files_place_is_replaced(top: int, rootfs: Path, outside: Path) -> None:
    (rootfs / "etc/file").symlink_to(outside / "secret")
    (rootfs / "etc/.file.new").symlink_to(outside / "secret")
    tree.write(top, "/etc/file", b"x", 0o644)
    assert (outside / "secret").read_text() == "secret"
    assert (rootfs / "etc/file").read_bytes() == b"x"
    assert os.listdir(rootfs / "etc") == ["file"]


def test_what_is_no_regular_file(top: int, rootfs: Path) -> None:
    os.mkfifo(rootfs / "etc/fifo")
    (rootfs / "etc/loop").symlink_to("loop")
    for path in ("/etc/fifo", "/etc/loop", "/etc", "/etc/none", "/etc/none/x"):
        assert tree.read(top, path, 100) is None


def test_link_replaces_a_directory(top: int, rootfs: Path) -> None:
    (rootfs / "etc/x/y").mkdir(parents=True)
    tree.link(top, "/etc/x", "../lib/x")
    assert os.readlink(rootfs / "etc/x") == "../lib/x"


def test_remove(top: int, rootfs: Path, outside: Path) -> None:
    for path in ("a/b/c", "a/d"):
        (rootfs / "tmp" / path).mkdir(parents=True)
    (rootfs / "tmp/a/b/file").touch()
    (rootfs / "tmp/a/link").symlink_to(outside)
    (rootfs / "tmp/keep.log").touch()
    tree.remove(top, "/tmp/a*")
    tree.remove(top, "/none/*")
    tree.remove(top, "/tmp/keep.log/*")
    assert os.listdir(rootfs / "tmp") == ["keep.log"]
    assert (outside / "secret").exists()


def test_remove_goes_as_deep_as_a_guest_can(top: int, rootfs: Path) -> None:
    here = os.open(rootfs, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    tree.remove(top, "/d")
    assert not (rootfs / "d").exists()


def test_no_fd_is_left(top: int, rootfs: Path) -> None:
    def work() -> None:
        tree.write(top, "/p/q/file", b"x", 0o644)
        tree.read(top, "/p/q/file", 1)
        tree.read(top, "/p", 1)
        tree.link(top, "/p/link", "x")
        tree.remove(top, "/p")

    work()
    before = len(os.listdir("/proc/self/fd"))
    work()
    assert len(os.listdir("/proc/self/fd")) == before
