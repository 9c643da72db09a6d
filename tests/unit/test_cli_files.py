"""`cp` on the host's side: a hostile tar, `-`, and which side is the jail's. `logs`: what may reach a terminal."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jailmgr.cli.files import split_side, transfer
from jailmgr.cli.sessions import tame
from jailmgr.cli.settings import settle
from jailmgr.cli.unpack import unpack
from jailmgr.errors import JailmgrError
from jailmgr.runtime import archive, extract, pax

Entry = tuple[pax.Member, bytes]


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644, content: bytes = b"") -> Entry:
    size = len(content)
    member = pax.Member(name.encode(), kind, mode, os.geteuid(), os.getegid(), size, 10**18, target=link.encode())
    return member, content


def opened(*entries: Entry) -> pax.Reader:
    file = os.memfd_create("stream")
    for member, content in entries:
        os.write(file, pax.header(member) + pax.pad(content))
    os.write(file, pax.end())
    os.lseek(file, 0, os.SEEK_SET)
    FILES.append(file)
    return pax.Reader(file)


FILES: list[int] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while FILES:
        os.close(FILES.pop())


FOLDER = entry("site", tarfile.DIRTYPE, mode=0o750)


def test_a_folder_goes_into_a_folder_or_under_a_new_name(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for to, at in (("there", "there/site"), ("new", "new")):
        unpack(
            opened(FOLDER, entry("site/a", content=b"hi"), entry("site/l", tarfile.SYMTYPE, "a")), str(tmp_path / to)
        )
        made = tmp_path / at
        assert (made / "a").read_bytes() == b"hi"
        assert os.readlink(made / "l") == "a"
        assert stat.S_IMODE(made.stat().st_mode) == 0o750
        assert made.stat().st_mtime == 1_000_000_000


def test_who_is_not_root_owns_what_he_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    entries = [FOLDER, entry("site/a", content=b"hi"), entry("site/l", tarfile.SYMTYPE, "a")]
    entries[1:] = [(member._replace(uid=54321, gid=54321), content) for member, content in entries[1:]]
    unpack(opened(*entries), str(tmp_path))
    assert {os.lstat(tmp_path / name).st_uid for name in ("site", "site/a", "site/l")} == {os.getuid()}


def test_hard_links_stay_and_a_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a").write_text("old")
    unpack(opened(FOLDER, entry("site/a", content=b"new"), entry("site/b", tarfile.LNKTYPE, "site/a")), str(tmp_path))
    assert (tmp_path / "site/b").read_text() == "new"
    assert (tmp_path / "site/a").stat().st_ino == (tmp_path / "site/b").stat().st_ino


@pytest.mark.parametrize("name", ["../x", "site/../../x", "site/./x", "site//x", ".."])
def test_paths_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    with pytest.raises(JailmgrError, match="leads out"):
        unpack(opened(FOLDER, entry(name, content=b"x")), str(tmp_path / "to"))
    assert sorted(os.listdir(tmp_path)) == ["to"]


def test_a_link_is_never_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("safe")
    to = tmp_path / "to"
    to.mkdir()
    into = entry("site/link", tarfile.SYMTYPE, str(outside))
    for bad in (
        entry("site/link/file", content=b"bad"),
        entry("site/link/new", content=b"bad"),
        entry("site/link/dir", tarfile.DIRTYPE),
        entry("site/hard", tarfile.LNKTYPE, "site/link/file"),
        entry("site/link", tarfile.DIRTYPE),
    ):
        assert unpack(opened(FOLDER, into, bad), str(to)), "the member that can't be made is named"
    file = entry("site/at", tarfile.SYMTYPE, str(outside / "file"))
    unpack(opened(FOLDER, file, entry("site/at", content=b"bad")), str(to))
    assert (to / "site/at").read_text() == "bad", "the link is replaced, what it leads to is not"
    assert (outside / "file").read_text() == "safe"
    assert os.listdir(outside) == ["file"]


def test_devices_are_left_out_and_set_user_id_is_dropped(tmp_path: Path) -> None:
    left_out = unpack(
        opened(
            FOLDER,
            entry("site/null", tarfile.CHRTYPE),
            entry("site/p", tarfile.FIFOTYPE),
            entry("site/su", mode=0o6755),
        ),
        str(tmp_path),
    )
    assert [text.partition(":")[0] for text in left_out] == ["site/null", "site/p", "site/su"]
    assert os.listdir(tmp_path / "site") == ["su"]
    assert stat.S_IMODE((tmp_path / "site/su").stat().st_mode) == 0o755


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    unpack(opened(FOLDER, entry("site/a", content=b"hi")), str(tmp_path))
    assert unpack(opened(FOLDER, entry("site/none/a")), str(tmp_path)) == ["site/none/a: No such file or directory"]
    with pytest.raises(JailmgrError):
        unpack(opened(FOLDER, entry("../a")), str(tmp_path))
    while FILES:
        os.close(FILES.pop())
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("web:/etc/hosts", ("default", "web", "/etc/hosts")),
        ("acme/web:/a:b", ("acme", "web", "/a:b")),
        ("./web:/x", None),
        ("/tmp/a:b", None),
        ("-", None),
        ("file", None),
    ],
)
def test_which_side_is_in_a_jail(text: str, side: tuple[str, str, str] | None) -> None:
    assert split_side(settle({}), text) == side


@pytest.mark.parametrize("text", ["web:etc", "web:", "We_b:/etc", "../x/web:"])
def test_sides_that_are_neither(text: str) -> None:
    if text.startswith("."):
        assert split_side(settle({}), text) is None
        return
    with pytest.raises(JailmgrError):
        split_side(settle({}), text)


def test_the_first_fault_of_a_copy_is_told() -> None:
    full, theirs = OSError(28, "No space left on device"), JailmgrError("cp", "broken pipe")

    def here(error: Exception) -> None:
        raise error

    def run(ours: Exception, echo: type[Exception]) -> None:
        def end(mine: object) -> None:
            assert callable(mine)
            mine(0)
            raise theirs

        transfer(lambda _: here(ours), end, echo)

    with pytest.raises(OSError, match="No space left"):
        run(full, pax.BrokenStreamError)
    with pytest.raises(JailmgrError, match="broken pipe"):
        run(pax.broken("empty"), pax.BrokenStreamError)
    with pytest.raises(JailmgrError, match="broken pipe"):
        run(BrokenPipeError(), BrokenPipeError)


def stream(tree: Path) -> pax.Reader:
    file = os.memfd_create("stream")
    FILES.append(file)
    assert archive.write_tree(str(tree), file, True) == []
    os.lseek(file, 0, os.SEEK_SET)
    return pax.Reader(file)


def test_a_member_is_read_as_it_was_written() -> None:
    name = b"a" * 150 + b"\n\xff"
    member = pax.Member(name, pax.FILE, 0o4755, 3_000_000, 4_000_000_000, 9 << 30, -1_500_000_001, 5)
    member = member._replace(xattrs=((b"user.a=%3D", b"\0\n=x"), (b"user.b", b"")), target=b"t" * 101)
    file = os.memfd_create("stream")
    FILES.append(file)
    os.write(file, pax.header(member))
    os.lseek(file, 0, os.SEEK_SET)
    assert pax.Reader(file).next() == member


def test_equal_inode_numbers_are_no_hard_links_if_the_content_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image's file and a volume's can have one number (overlayfs over two subvolumes), and all else equal."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("a", "b"):
        (tree / name).write_text(name)
        os.link(tree / name, tree / f"{name}2")
    monkeypatch.setattr(archive, "_identity", lambda status: (status.st_mode, status.st_size))
    unpack(stream(tree), str(tmp_path / "copy"))
    copied = {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()}
    assert copied == {"a": "a", "a2": "a", "b": "b", "b2": "b"}


def test_tar_reports_an_archive_that_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two members GNU tar takes the end of the stream for the end of the archive."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("a", "b"):
        (tree / name).write_text(name)
    whole = archive.Writer.add

    def add(self: archive.Writer, path: str, name: bytes) -> None:
        if name.endswith(b"b"):
            raise MemoryError
        whole(self, path, name)

    monkeypatch.setattr(archive.Writer, "add", add)
    written = os.open(tmp_path / "a.tar", os.O_WRONLY | os.O_CREAT, 0o600)
    FILES.append(written)
    with pytest.raises(MemoryError):
        archive.write_tree(str(tree), written, True)
    done = subprocess.run(["tar", "-tf", tmp_path / "a.tar"], capture_output=True, text=True)
    assert "tree/a" in done.stdout
    assert done.returncode == 2, done.stderr


def test_a_file_is_never_wider_than_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is written while only the owner may read it, and the mode comes after owner and ACL."""
    modes = []
    write, chown = extract._write, os.fchown

    def watched_write(reader: pax.Reader, fd: int) -> None:
        modes.append(os.fstat(fd).st_mode)
        write(reader, fd)
        modes.append(os.fstat(fd).st_mode)

    def watched_chown(fd: int, uid: int, gid: int) -> None:
        modes.append(os.fstat(fd).st_mode)
        chown(fd, uid, gid)

    monkeypatch.setattr(extract, "_write", watched_write)
    monkeypatch.setattr(os, "fchown", watched_chown)
    unpack(opened(entry("a", mode=0o640, content=b"x")), str(tmp_path / "a"))
    assert {stat.S_IMODE(mode) for mode in modes} == {0o600}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@given(st.lists(st.binary(max_size=12) | st.sampled_from([b"\x1b[31m", b"\x1b]0;x\x07", b"\x1b[2J", b"\x1b", b"[0m"])))
def test_a_log_steers_nothing_however_it_is_cut(parts: list[bytes]) -> None:
    shown, rest = b"", b""
    for part in parts:
        text, rest = tame(rest + part)
        shown += text
    assert not set(shown) & (set(range(0x20)) - {0x09, 0x0A, 0x0D, 0x1B} | {0x7F})
    for piece in shown.split(b"\x1b")[1:]:
        head = piece.partition(b"m")
        assert head[0][:1] == b"["
        assert head[1] == b"m"
        assert not head[0][1:].strip(b"0123456789;")


def test_colours_survive_a_cut() -> None:
    first, rest = tame(b"a\x1b[3")
    second, left = tame(rest + b"1mred\r\n")
    assert (first + second, left) == (b"a\x1b[31mred\r\n", b"")
