"""`cp` keeps what `cp -a` keeps, both ways, in running and in stopped jails, and names what it can't keep."""

from __future__ import annotations

import io
import os
import socket
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.system.conftest import MakeJail
from tests.system.instance import COMMAND, Instance

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
"""cap_net_bind_service=ep, revision 2 (capabilities(7))."""
TIMES = (1_500_000_000_000_000_001, 1_600_000_000_123_456_789)


@pytest.fixture
def jail(busybox_jail: MakeJail) -> str:
    return busybox_jail()


def acl(*entries: tuple[int, int, int]) -> bytes:
    """Return a POSIX ACL as its extended attribute has it: tag, permissions, id of each entry (acl(5))."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
ACL = acl((1, 6, NOBODY), (2, 6, 1000), (4, 4, NOBODY), (0x10, 6, NOBODY), (0x20, 0, NOBODY))


def make_tree(at: Path) -> Path:
    """One file of each kind that keeps all of its attributes both ways."""
    at.mkdir()
    (at / "file").write_bytes(b"content" * 50_000)
    (at / "file").chmod(0o600)
    os.chown(at / "file", 1000, 100)
    os.setxattr(at / "file", "user.name", b"value\0\n=")
    (at / "listed").write_text("by ACL")
    os.setxattr(at / "listed", "system.posix_acl_access", ACL)
    (at / "folder").mkdir()
    os.setxattr(at / "folder", "system.posix_acl_default", ACL)
    (at / "folder").chmod(0o1770)
    (at / "link").symlink_to("nowhere")
    os.link(at / "file", at / "folder" / "hard")
    (at / ("long" * 40 + "\n")).write_text("")
    (at / os.fsdecode(b"not utf-8 \xff")).write_text("x")
    for path in [*at.rglob("*"), at]:
        os.utime(path, ns=TIMES, follow_symlinks=False)
    return at


def seen(at: Path) -> dict[str, object]:
    """Everything of a tree that `cp -a` keeps, but the times of last access, which looking at a file changes."""
    found: dict[str, object] = {}
    for path in [at, *sorted(at.rglob("*"))]:
        status = path.lstat()
        link = stat.S_ISLNK(status.st_mode)
        names = [] if link else os.listxattr(path)
        found[str(path.relative_to(at))] = (
            oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns,
            status.st_nlink if stat.S_ISREG(status.st_mode) else 0,
            os.readlink(path) if link else path.read_bytes() if path.is_file() else None,
            {name: os.getxattr(path, name) for name in names},
        )  # fmt: skip
    return found


@pytest.mark.parametrize("running", [True, False])
def test_all_that_cp_a_keeps_is_kept_both_ways(jm: Instance, jail: str, tmp_path: Path, running: bool) -> None:
    tree = make_tree(tmp_path / "tree")
    if not running:
        jm("stop", "--force", jail)
    jm("cp", str(tree), f"{jail}:/root/")
    jm("cp", f"{jail}:/root/tree", str(tmp_path / "back"))
    subprocess.run(["cp", "-a", str(tree), str(tmp_path / "real")], check=True)
    assert seen(tmp_path / "back") == seen(tmp_path / "real")
    if running:
        assert jm.exec(jail, "stat", "-c", "%a %u %g", "/root/tree/file").out == "600 1000 100\n"


@pytest.mark.parametrize("running", [True, False])
def test_holes_are_kept_both_ways(jm: Instance, jail: str, tmp_path: Path, running: bool) -> None:
    """The file would not fit into anything if it were copied with its zeros; its content alone is counted."""
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.seek(1 << 39)
        file.write(b"middle" * 1000)
        file.truncate(1 << 40)
    if not running:
        jm("stop", "--force", jail)
    jm("cp", str(sparse), f"{jail}:/root/")
    jm("cp", f"{jail}:/root/sparse", str(tmp_path / "back"))
    packed = subprocess.run(["tar", "-cS", "-C", str(tmp_path), "sparse"], capture_output=True, check=True).stdout
    jm("cp", "-", f"{jail}:/tmp/", stdin=packed)
    jm("cp", f"{jail}:/tmp/sparse", str(tmp_path / "again"))
    for copy in (tmp_path / "back", tmp_path / "again"):
        assert (copy.stat().st_size, copy.stat().st_blocks < 100) == (1 << 40, True)
        with copy.open("rb") as file:
            file.seek((1 << 39) - 6)
            assert file.read(18) == bytes(6) + b"middlemiddle"


@pytest.mark.parametrize("running", [True, False])
def test_what_only_a_jail_may_have(jm: Instance, jail: str, tmp_path: Path, running: bool) -> None:
    """FIFOs, set-user-id bits and file capabilities go in; they don't come out to the host, but in a tar."""
    tree = tmp_path / "tree"
    tree.mkdir()
    os.mkfifo(tree / "fifo", 0o640)
    (tree / "able").write_text("")
    os.setxattr(tree / "able", "security.capability", CAPABILITY)
    (tree / "suid").write_text("")
    (tree / "suid").chmod(0o4755)
    if not running:
        jm("stop", "--force", jail)
    jm("cp", str(tree), f"{jail}:/root/")
    out = subprocess.run(
        [COMMAND, "cp", f"{jail}:/root/tree", "-"], capture_output=True, env=jm.environment(), timeout=60, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(out.stdout)) as tar:
        assert tar.getmember("tree/fifo").isfifo()
        assert tar.getmember("tree/fifo").mode == 0o640
        assert tar.getmember("tree/suid").mode == 0o4755
        assert "SCHILY.xattr.security.capability" in tar.getmember("tree/able").pax_headers
    error = jm("cp", f"{jail}:/root/tree", str(tmp_path / "back"), status=1).err
    assert all(name in error for name in ("tree/fifo", "tree/able: security.capability", "tree/suid"))
    assert sorted(os.listdir(tmp_path / "back")) == ["able", "suid"]
    assert (tmp_path / "back" / "suid").stat().st_mode & 0o7777 == 0o755
    assert os.listxattr(tmp_path / "back" / "able") == []


@pytest.mark.parametrize("running", [True, False])
def test_an_odd_file_is_named_and_the_rest_goes_on(jm: Instance, jail: str, tmp_path: Path, running: bool) -> None:
    """A device, a socket and an owner beyond the jail's ids; a mode is not widened by what fails."""
    tree = tmp_path / "tree"
    tree.mkdir()
    os.mknod(tree / "a-device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tree / "b-socket"))
    (tree / "c-file").write_text("x")
    (tree / "c-file").chmod(0o600)
    os.chown(tree / "c-file", 4_000_000_000, 4_000_000_000)
    (tree / "d-last").write_text("last")
    if not running:
        jm("stop", "--force", jail)
    error = jm.refused("cp", str(tree), f"{jail}:/root/").err
    assert all(name in error for name in ("a-device", "b-socket", "c-file: owner 4000000000", "d-last")[:3])
    jm("cp", f"{jail}:/root/tree", str(tmp_path / "back"))
    assert sorted(os.listdir(tmp_path / "back")) == ["c-file", "d-last"]
    assert (tmp_path / "back" / "c-file").stat().st_mode & 0o7777 == 0o600


def test_content_from_stdin_brings_no_attributes(jm: Instance, jail: str) -> None:
    jm.sh(jail, "echo old >/root/a; chown 5:6 /root/a; chmod 640 /root/a; ln -s a /root/link")
    jm("cp", "-", f"{jail}:/root/link", stdin=b"new")
    jm("cp", "-", f"{jail}:/root/fresh", stdin=b"new")
    shown = jm.sh(jail, "cd /root; stat -c '%a %u %g %F' a link fresh; cat a").out
    assert shown.splitlines() == ["640 5 6 regular file", "777 0 0 symbolic link", "644 0 0 regular file", "new"]


def test_files_of_proc_and_sys_are_read_to_their_end(jm: Instance, jail: str, tmp_path: Path) -> None:
    for path in ("/proc/filesystems", "/proc/self/mounts", "/sys/kernel/mm/transparent_hugepage/enabled"):
        jm("cp", f"{jail}:{path}", str(tmp_path / "copy"))
        content = (tmp_path / "copy").read_text()
        assert content
        assert path == "/proc/self/mounts" or content == jm.exec(jail, "cat", path).out


def test_the_whole_jail_stays_on_one_file_system(jm: Instance, jail: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    with whole.open("wb") as file:
        subprocess.run([COMMAND, "cp", f"{jail}:/", "-"], stdout=file, env=jm.environment(), timeout=100, check=True)
    listed = subprocess.run(["tar", "-tf", str(whole)], capture_output=True, text=True, check=True).stdout.split("\n")
    assert "./proc/" in listed
    assert not [name for name in listed if name.startswith("./proc/") and name != "./proc/"]
    assert "./etc/passwd" in listed


def test_a_tree_that_changes_meanwhile(jm: Instance, jail: str, tmp_path: Path) -> None:
    """A live mail folder: files vanish and are named, all that stays is there."""
    jm.sh(jail, "mkdir -p /root/m/zz; for i in $(seq 500); do echo $i >/root/m/$i; echo x >/root/m/zz/$i; done")
    churn = jm.popen(
        "exec",
        jail,
        "--",
        "/bin/sh",
        "-c",
        "cd /root/m; while :; do for i in $(seq 200); do rm -f $i; : >$i; done; done",
    )
    try:
        for number in range(5):
            done = jm("cp", f"{jail}:/root/m", str(tmp_path / f"m{number}"), status=None)
            assert done.status in (0, 1)
            assert len(os.listdir(tmp_path / f"m{number}" / "zz")) == 500, done.told()
            assert "Operation not permitted" not in done.err
    finally:
        churn.kill()
        churn.wait()


@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("tree", "new"), ("tree", "there"), ("tree/", "there/"), ("tree/.", "there"), ("tree/.", "new"),
        ("tree", "new/"), ("tree/file", "new"), ("tree/file", "there"), ("tree/file", "there/other"),
        ("tree/file", "new/"), ("tree", "there/other"), ("tree/file", "gone/new"), ("tree/link", "new"),
        ("tree/file", "tolink"), ("tree/sub/..", "new"), ("tree", "there/clash"), ("tree/file", "away/tree"),
    ],
)  # fmt: skip
def test_names_are_those_of_cp_a(jm: Instance, jail: str, tmp_path: Path, source: str, target: str, out: bool) -> None:
    """Real `cp -a` beside ours, from one start; the target is on the host or in the jail."""
    for side in ("real", "ours"):
        for folder in ("tree/sub", "there/clash", "away/tree/file"):
            (tmp_path / side / folder).mkdir(parents=True)
        (tmp_path / side / "tree/file").write_text("content")
        (tmp_path / side / "tree/link").symlink_to("file")
        (tmp_path / side / "there/other").write_text("old")
        (tmp_path / side / "tolink").symlink_to("there")
    (tmp_path / "real/there/tree").mkdir()
    (tmp_path / "ours/there/tree").mkdir()
    real = subprocess.run(["cp", "-a", source, target], cwd=tmp_path / "real", capture_output=True)
    base = str(tmp_path / "ours")
    if out:
        jm("cp", base, f"{jail}:/root/")
        done = jm("cp", f"{jail}:/root/ours/{source}", f"{base}/{target}", status=None)
    else:
        jm("cp", base, f"{jail}:/root/")
        done = jm("cp", f"{base}/{source}", f"{jail}:/root/ours/{target}", status=None)
        jm("cp", f"{jail}:/root/ours", str(tmp_path / "after"))
        base = str(tmp_path / "after")
    assert (done.status == 0) == (real.returncode == 0), (real.stderr, done.told())

    def names(top: Path) -> dict[str, str]:
        return {
            str(path.relative_to(top)): path.read_text() if path.is_file() else "" for path in sorted(top.rglob("*"))
        }

    assert names(Path(base)) == names(tmp_path / "real")
