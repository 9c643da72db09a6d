"""The lab VM's parts that need neither root nor qemu: options, qemu's arguments, the cache's keys, the talk."""

from __future__ import annotations

import os
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labvm import guest, tree
from labvm.__main__ import parse
from labvm.errors import FAILED, TIMED_OUT, LabError
from labvm.image import Image, key, recipe
from labvm.tree import TREE, pack
from labvm.vm import TCG, Frames, Machine, Talk, command_line, converse

ENTRIES = """\
http://other.example/repo/ stable main
http://a.example/debian/ bookworm main
http://b.example/debian/ bookworm main
http://a.example/debian/ bookworm contrib
http://s.example/security/ bookworm-security main
"""
GIB = 1 << 30


def frame(kind: bytes, payload: bytes) -> bytes:
    return guest.HEADER.pack(kind, len(payload)) + payload


def test_options() -> None:
    argv = ["--release", "trixie", "--timeout", "90", "--disk", "20GiB", "--carry", "dist", "a", "--then", "b"]
    options = parse([*argv, "--then", "c"])
    assert (options.release, options.timeout, options.disk) == ("trixie", 90.0, 20 * GIB)
    assert options.carry == ["dist"]
    assert options.commands == ["a", "b", "c"]


@pytest.mark.parametrize(
    "argv", [[], ["a", "b"], ["--disk", "1G", "a"], ["--timeout", "0", "a"], ["--timeout", "x", "a"], ["--rel", "a"]]
)
def test_wrong_usage_is_none_of_a_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == FAILED
    assert "Error: lab-vm:" in capsys.readouterr().err


def test_command_line_leaves_the_image_as_it_is() -> None:
    image = Image(Path("/c/a,b/root.ext4"), Path("/c/vmlinuz"), Path("/c/initrd.img"))
    argv = command_line(Machine(image, "/c/wheels", "/dev/fd/5", "/dev/fd/6", 7, TCG))
    drives = [value for option, value in pairwise(argv) if option == "-drive"]
    assert all("snapshot=on" in drive or "readonly=on" in drive for drive in drives)
    assert "file=/c/a,,b/root.ext4," in drives[0]
    assert "socket,id=lab,fd=7" in argv


def test_sources_are_the_hosts_first_that_has_the_suite() -> None:
    assert recipe("bookworm", ENTRIES, [], GIB).sources == (
        "deb http://a.example/debian/ bookworm main",
        "deb http://s.example/security/ bookworm-security main",
    )
    assert recipe("trixie", ENTRIES, [], GIB).sources[0] == "deb http://a.example/debian/ trixie main"
    with pytest.raises(LabError):
        recipe("bookworm", "http://other.example/repo/ stable main\n", [], GIB)


def test_key_changes_with_what_goes_in() -> None:
    plain = recipe("bookworm", ENTRIES, ["nftables", "git"], GIB)
    assert key(plain) == key(recipe("bookworm", ENTRIES, ["git", "nftables"], GIB))
    others = [
        recipe("trixie", ENTRIES, ["nftables", "git"], GIB),
        recipe("bookworm", ENTRIES, ["nftables"], GIB),
        recipe("bookworm", ENTRIES, ["nftables", "git"], 2 * GIB),
        recipe("bookworm", ENTRIES.replace("a.example", "c.example"), ["nftables", "git"], GIB),
        plain._replace(venv="x"),
    ]
    assert len({key(plain), *map(key, others)}) == 6


def test_pack_is_the_tree_as_it_is_now() -> None:
    with tempfile.TemporaryFile() as file:
        pack(file, ["true"], [])
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            members = {member.name: member for member in tar}
    assert {"lab/guest.py", "lab/commands.json", "root/jailmgr/pyproject.toml"} <= members.keys()
    assert not any(name.startswith("root/jailmgr/.venv") for name in members)
    assert {member.uid for member in members.values()} == {0}
    assert members["root/jailmgr/script/lab-vm"].mode & 0o111, TREE


def test_what_git_ignores_is_carried_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "TREE", tmp_path)
    monkeypatch.setattr(tree, "names", list)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "x.deb").write_bytes(b"deb")
    with tempfile.TemporaryFile() as file:
        pack(file, ["true"], ["dist"])
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            carried = tar.extractfile("root/jailmgr/dist/x.deb")
            assert carried is not None
            assert carried.read() == b"deb"
        for wrong in ("missing", "..", "/etc/passwd"):
            with pytest.raises(LabError, match=wrong):
                pack(file, ["true"], [wrong])


@given(
    st.lists(st.tuples(st.sampled_from([guest.OUTPUT, guest.STATUS]), st.binary(max_size=40))),
    st.integers(min_value=1, max_value=9),
)
def test_frames_come_out_whole_however_they_are_cut(frames: list[tuple[bytes, bytes]], step: int) -> None:
    stream = b"".join(frame(*one) for one in frames)
    reader = Frames()
    assert [one for start in range(0, len(stream), step) for one in reader.feed(stream[start : start + step])] == frames


def test_first_status_that_is_not_0_counts() -> None:
    reader, writer = os.pipe()
    talk = Talk(3, writer)
    assert not talk.hear(frame(guest.UP, b"0") + frame(guest.OUTPUT, frame(guest.STATUS, b"9")))
    assert talk.hear(frame(guest.STATUS, b"0"))
    assert talk.hear(frame(guest.UP, b"1") + frame(guest.STATUS, b"4"))
    assert not talk.hear(frame(guest.UP, b"2") + frame(guest.STATUS, b"5"))
    assert talk.over
    assert talk.status == 4
    assert os.read(reader, 100) == frame(guest.STATUS, b"9"), "what a command prints is no frame"
    os.close(reader)
    os.close(writer)


def test_a_boot_nobody_asked_for_is_a_failure() -> None:
    talk = Talk(2, 1)
    talk.hear(frame(guest.UP, b"0"))
    with pytest.raises(LabError) as failed:
        talk.hear(frame(guest.UP, b"0"))
    assert failed.value.status == FAILED
    assert "--then" in failed.value.hint


def _say_up(theirs: socket.socket) -> None:
    theirs.sendall(frame(guest.UP, b"0"))


@pytest.mark.parametrize(("act", "status"), [(socket.socket.close, FAILED), (_say_up, TIMED_OUT)])
def test_end_without_a_status(act: Callable[[socket.socket], None], status: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        act(theirs)
        with pytest.raises(LabError) as failed:
            converse(ours, Talk(1, 1), 0.05)
    assert failed.value.status == status


@pytest.mark.parametrize(
    ("command", "status", "output"),
    [
        ("echo out; echo err >&2; exit 3", 3, b"out\nerr\n"),
        ("kill -9 $$", 137, b""),
        ("sleep 60 & echo out", 0, b"out\n"),
        ("exec >&- 2>&-; exit 5", 5, b""),
    ],
)
def test_guest_reports(
    command: str, status: int, output: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(guest, "TREE", str(tmp_path))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert guest.run(theirs.fileno(), command) == status
        theirs.close()
        stream = b"".join(iter(lambda: ours.recv(4096), b""))
    assert b"".join(payload for _, payload in Frames().feed(stream)) == output


def test_packages_of_the_vm_have_names() -> None:
    done = subprocess.run([TREE / "script" / "apt-packages", "vm"], capture_output=True, text=True, check=True)
    assert "qemu-system-x86" in done.stdout.split()
