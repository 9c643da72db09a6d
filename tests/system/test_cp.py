"""`cp`: as `cp -a`, and never past what is the jail's or the caller's."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.system.conftest import MakeJail
from tests.system.instance import COMMAND, Instance


@pytest.fixture
def jail(busybox_jail: MakeJail) -> str:
    return busybox_jail()


def test_a_file_in_and_out(jm: Instance, jail: str, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    source = tmp_path / "source"
    source.write_bytes(content)
    source.chmod(0o741)
    os.utime(source, (1_600_000_000, 1_600_000_000))
    os.chown(source, 1000, 100)
    jm("cp", str(source), f"{jail}:/root/copy")
    assert jm.exec(jail, "stat", "-c", "%a %u %g %Y %s", "/root/copy").out == "741 1000 100 1600000000 3000000\n"
    jm("cp", f"{jail}:/root/copy", str(tmp_path / "back"))
    back = (tmp_path / "back").stat()
    assert (back.st_mode & 0o7777, back.st_uid, back.st_gid, int(back.st_mtime)) == (0o741, 1000, 100, 1_600_000_000)
    assert (tmp_path / "back").read_bytes() == content


def test_a_folder_in_and_out(jm: Instance, jail: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    (tree / "deep" / "er" / "file").write_text("text")
    (tree / "link").symlink_to("deep/er/file")
    os.link(tree / "deep" / "er" / "file", tree / "hard")
    (tree / "empty").mkdir(mode=0o700)
    (tree / "odd \n name").write_text("")
    jm("cp", str(tree), f"{jail}:/root/")
    assert jm.exec(jail, "readlink", "/root/tree/link").out == "deep/er/file\n"
    assert jm.sh(jail, "[ /root/tree/hard -ef /root/tree/deep/er/file ] && cat /root/tree/hard").out == "text"
    jm("cp", f"{jail}:/root/tree", str(tmp_path / "back"))
    back = tmp_path / "back"
    assert sorted(path.relative_to(back) for path in back.rglob("*")) == sorted(
        path.relative_to(tree) for path in tree.rglob("*")
    )
    assert os.readlink(back / "link") == "deep/er/file"
    assert (back / "hard").samefile(back / "deep" / "er" / "file")


def test_stdin_and_stdout(jm: Instance, jail: str) -> None:
    jm("cp", "-", f"{jail}:/root/note", stdin=b"by stdin\n")
    assert jm.exec(jail, "cat", "/root/note").out == "by stdin\n"
    assert jm("cp", f"{jail}:/root/note", "-").out == "by stdin\n"


def test_a_folder_to_stdout_is_a_tar(jm: Instance, jail: str) -> None:
    jm.sh(jail, "mkdir /root/tree; echo text > /root/tree/file")
    done = subprocess.run(
        [COMMAND, "cp", f"{jail}:/root/tree", "-"], capture_output=True, env=jm.environment(), timeout=60, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert any(member.name.endswith("tree/file") for member in tar)


def test_a_link_in_the_jail_leads_nowhere_outside(jm: Instance, jail: str, tmp_path: Path) -> None:
    jm.sh(jail, "ln -s /etc/shadow /root/link; ln -s ../../../../../../../../.. /root/up; mkdir -p /etc/inside")
    jm("cp", f"{jail}:/root/link", str(tmp_path / "copy"))
    assert os.readlink(tmp_path / "copy") == "/etc/shadow"
    source = tmp_path / "planted"
    source.write_text("planted")
    jm("cp", str(source), f"{jail}:/root/up/etc/inside/planted")
    assert not os.path.exists("/etc/inside")
    assert jm.exec(jail, "cat", "/etc/inside/planted").out == "planted"


def test_a_link_where_the_copy_goes_is_not_followed(jm: Instance, jail: str, tmp_path: Path) -> None:
    """The guest plants `tree/way -> /somewhere` and puts files below the same name, as a hostile tar would."""
    victim = tmp_path / "victim"
    victim.mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (target / "tree").mkdir()
    (target / "tree" / "way").symlink_to(victim)
    jm.sh(jail, "mkdir -p /root/tree/way; echo gotcha > /root/tree/way/file")
    jm("cp", f"{jail}:/root/tree", str(target), status=None)
    assert list(victim.iterdir()) == []


def test_devices_do_not_come_out(jm: Instance, jail: str, tmp_path: Path) -> None:
    jm.sh(jail, "mkdir /root/tree; mkfifo /root/tree/fifo; echo text > /root/tree/file")
    jm("cp", f"{jail}:/root/tree", str(tmp_path / "tree"), status=1)
    assert (tmp_path / "tree" / "file").read_text() == "text\n"
    assert not (tmp_path / "tree" / "fifo").exists()


def test_errors(jm: Instance, jail: str, tmp_path: Path) -> None:
    jm.refused("cp", str(tmp_path / "missing"), f"{jail}:/root/")
    jm.refused("cp", f"{jail}:/no/such/file", str(tmp_path))
    jm.refused("cp", "nowhere:/etc/hostname", str(tmp_path))
    jm.refused("cp", str(tmp_path), str(tmp_path), status=2)
    jm.refused("cp", f"{jail}:/a", f"{jail}:/b", status=2)
    assert list(tmp_path.iterdir()) == []


def test_a_full_volume_is_told(jm: Instance, busybox_jail: MakeJail, tmp_path: Path) -> None:
    name = busybox_jail("--disk", "30MiB")
    big = tmp_path / "big"
    with big.open("wb") as file:
        for _ in range(60):
            file.write(os.urandom(1 << 20))
    assert "quota" in jm.refused("cp", str(big), f"{name}:/root/").err.lower()
    assert jm.status(name) == "Running"
