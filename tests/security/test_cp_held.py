"""Wall: files of the host, when `cp` copies a tree of the guest.

Mechanism: a process in the jail reads and writes the tree, as the jail's root. The CLI trusts nothing in the tar that
comes out: it opens every file relative to its folder and follows no link (jailmgr/cli/unpack.py).
tests/system/test_cp.py and test_hostile.py have more.
"""

from __future__ import annotations

import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from tests.system.conftest import MakeJail
from tests.system.instance import Instance

ODD = ["-rf", "a b", "a\nb", "*", "$(reboot)", "`x`", "a\\b", "\xff", "ü", ".hidden", "..x", "x" * 255, "--help", "~"]


@pytest.fixture
def jail(busybox_jail: MakeJail) -> str:
    return busybox_jail()


def test_odd_names_go_both_ways(jm: Instance, jail: str, tmp_path: Path) -> None:
    """Names that mean something to a shell, to tar, to a terminal, or are no UTF-8."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ODD:
        (tree / os.fsdecode(name.encode("latin-1") if name == "\xff" else name.encode())).write_text("text")
    jm("cp", str(tree), f"{jail}:/root/")
    jm("cp", f"{jail}:/root/tree", str(tmp_path / "back"))
    assert sorted(os.listdir(os.fsencode(tmp_path / "back"))) == sorted(os.listdir(os.fsencode(tree)))


def test_set_user_id_bits_stay_inside(jm: Instance, jail: str, tmp_path: Path) -> None:
    """Mechanism: mode bits above 0777 are dropped (sticky is kept of folders)."""
    jm.sh(jail, "mkdir /root/t; cp /bin/busybox /root/t/suid; chmod 6755 /root/t/suid; chmod 7777 /root/t")
    assert "t/suid: set-user-id" in jm.refused("cp", f"{jail}:/root/t", str(tmp_path / "t")).err
    assert stat.S_IMODE(os.stat(tmp_path / "t" / "suid").st_mode) == 0o755
    assert not os.stat(tmp_path / "t").st_mode & (stat.S_ISUID | stat.S_ISGID)


def test_attributes_and_capabilities_stay_inside(jm: Instance, jail: str, tmp_path: Path) -> None:
    """Mechanism: no extended attribute is in the tar, nor taken from one."""
    source = tmp_path / "source"
    source.write_text("x")
    os.setxattr(source, "trusted.mine", b"y")
    jm("cp", str(source), f"{jail}:/root/source")
    upper = f"{jm.root.volume('default', jail)}/upper/root/source"
    assert not [name for name in os.listxattr(upper) if "mine" in name]
    jm("cp", f"{jail}:/root/source", str(tmp_path / "back"))
    assert os.listxattr(tmp_path / "back") == []


def test_a_link_that_comes_and_goes(jm: Instance, jail: str, tmp_path: Path) -> None:
    """While a tree comes out, the guest replaces a folder of it by a link to a folder of the host, again and again.

    Mechanism: a process in the jail opens the tree, so that the link leads into the jail.
    """
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "secret").write_text("the host's")
    jm.sh(jail, "mkdir -p /root/tree/way /root/aside; for n in $(seq 200); do echo gotcha >/root/tree/way/$n; done")
    flip = (
        f"while [ ! -e /root/enough ]; do mv /root/tree/way /root/aside/way; ln -s {victim} /root/tree/way;"
        " rm /root/tree/way; mv /root/aside/way /root/tree/way; done"
    )
    process = jm.popen("exec", jail, "--", "sh", "-c", flip, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for number in range(6):
            jm("cp", f"{jail}:/root/tree", str(tmp_path / f"copy{number}"), status=None)
    finally:
        jm.sh(jail, "touch /root/enough")
        assert process.wait(30) == 0
    assert os.listdir(victim) == ["secret"]
    for found in tmp_path.glob("copy*/**/secret"):
        raise AssertionError(f"{found} came out of the host")


def test_a_link_that_comes_and_goes_where_a_tree_is_put(jm: Instance, jail: str, tmp_path: Path) -> None:
    """While a tree goes in, the guest replaces the target folder by such a link. Mechanism: as above."""
    victim, tree = tmp_path / "victim", tmp_path / "tree"
    victim.mkdir()
    tree.mkdir()
    for number in range(200):
        (tree / str(number)).write_text("text")
    jm.sh(jail, "mkdir -p /root/to/tree")
    flip = (
        f"while [ ! -e /root/enough ]; do mv /root/to/tree /root/aside; ln -s {victim} /root/to/tree; rm /root/to/tree;"
        " mv /root/aside /root/to/tree; done"
    )
    process = jm.popen("exec", jail, "--", "sh", "-c", flip, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(6):
            jm("cp", str(tree), f"{jail}:/root/to/", status=None)
    finally:
        jm.sh(jail, "touch /root/enough")
        assert process.wait(30) == 0
    assert os.listdir(victim) == []


def test_special_files_hold_up_nobody(jm: Instance, jail: str, tmp_path: Path) -> None:
    """FIFOs, sockets, circular links, a link to a device. Mechanism: only regular files are opened."""
    jm.sh(
        jail,
        "mkdir /root/odd; cd /root/odd; mkfifo fifo; ln -s b a; ln -s a b; ln -s . here",
    )
    jm.sh(jail, "cd /root/odd; nc -l -p 1 -s 127.0.0.1 </dev/null >/dev/null 2>&1 & ln -s /dev/zero /root/odd/zero")
    assert "odd/fifo: left out" in jm.refused("cp", f"{jail}:/root/odd", str(tmp_path / "odd"), within=30).err
    assert os.readlink(tmp_path / "odd" / "zero") == "/dev/zero"
    assert not (tmp_path / "odd" / "fifo").exists()


def test_hard_links_do_not_leave_the_tree(jm: Instance, jail: str, tmp_path: Path) -> None:
    """Mechanism: `cp` takes the target of a hard link for a path below the copied tree."""
    outside = tmp_path / "outside"
    outside.write_text("the host's")
    jm.sh(
        jail,
        f"mkdir -p /root/tree {tmp_path}; echo gotcha >{outside}; cd /root/tree; ln {outside} hard; ln {outside} more",
    )
    jm("cp", f"{jail}:/root/tree", str(tmp_path / "tree"))
    assert outside.read_text() == "the host's"
    assert (tmp_path / "tree" / "hard").read_text() == "gotcha\n"
    assert os.stat(tmp_path / "tree" / "hard").st_nlink == 2


def test_a_path_with_dots_stays_inside(jm: Instance, jail: str, tmp_path: Path) -> None:
    """Mechanism: the path is looked up by a process whose root is the jail's."""
    secret = tmp_path / "secret"
    secret.write_text("the host's")
    up = "../" * 20
    jm.refused("cp", f"{jail}:/{up}{secret}", str(tmp_path / "copy"))
    jm("cp", f"{jail}:/{up}etc/passwd", str(tmp_path / "passwd"))
    assert (tmp_path / "passwd").read_text() == jm.exec(jail, "cat", "/etc/passwd").out
    jm("cp", str(secret), f"{jail}:/{up}tmp/planted")
    assert jm.exec(jail, "cat", "/tmp/planted").out == "the host's"
    assert not os.path.exists("/tmp/planted")


def test_many_at_once_end(jm: Instance, jail: str, tmp_path: Path) -> None:
    """The guest kills each process that enters. Mechanism: the supervisor sees the end of its child, and `cp` fails."""
    kill = "for p in /proc/[0-9]*; do [ ${p#/proc/} -gt $$ ] && kill -9 ${p#/proc/}; done"
    program = f"n=0; while [ $n -lt 300 ]; do {kill}; n=$((n+1)); done"
    process = jm.popen("exec", jail, "--", "sh", "-c", program, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results: list[int] = []

    def copy(number: int) -> None:
        results.append(jm("cp", f"{jail}:/bin/busybox", str(tmp_path / str(number)), status=None, within=60).status)

    threads = [threading.Thread(target=copy, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    process.wait(60)
    assert set(results) <= {0, 1, 125}
    assert len(results) == 4
