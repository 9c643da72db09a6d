"""Files written into a jail's layer, over an image and a guest that mean no good."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.manager.files import replace_files, write_files


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Path, Path]:
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    upper.mkdir()
    (lower / "etc").mkdir(parents=True)
    return upper, lower


def test_directories_are_made_like_the_images(layers: tuple[Path, Path]) -> None:
    upper, lower = layers
    (lower / "etc").chmod(0o750)
    write_files(str(upper), str(lower), [("/etc/hostname", b"a\n", 0o644), ("/opt/x/y", b"z", 0o600)])
    assert (upper / "etc/hostname").read_bytes() == b"a\n"
    assert (upper / "etc").stat().st_mode & 0o7777 == 0o750
    assert (upper / "opt/x").stat().st_mode & 0o7777 == 0o755
    assert (upper / "opt/x/y").stat().st_mode & 0o7777 == 0o600
    assert os.listdir(upper / "etc") == ["hostname"]


def test_an_image_with_a_link_for_a_directory_is_refused(layers: tuple[Path, Path], tmp_path: Path) -> None:
    upper, lower = layers
    (lower / "etc").rmdir()
    (lower / "etc").symlink_to(tmp_path)
    with pytest.raises(JailmgrError) as caught:
        write_files(str(upper), str(lower), [("/etc/hostname", b"a\n", 0o644)])
    assert caught.value.code == "invalid"
    assert not (tmp_path / "hostname").exists()


def test_a_path_that_leads_out_is_refused(layers: tuple[Path, Path]) -> None:
    upper, lower = layers
    for path in ("/../x", "/etc/../../x", "/", "", "/etc//x"):
        with pytest.raises(JailmgrError):
            write_files(str(upper), str(lower), [(path, b"", 0o644)])


def test_a_new_name_replaces_what_the_guest_left_alone(layers: tuple[Path, Path]) -> None:
    upper, lower = layers
    old = [("/etc/hostname", b"a\n", 0o644), ("/etc/hosts", b"1 a\n", 0o644), ("/etc/mailname", b"a\n", 0o644)]
    new = [("/etc/hostname", b"b\n", 0o644), ("/etc/hosts", b"1 b\n", 0o644), ("/etc/mailname", b"b\n", 0o644)]
    write_files(str(upper), str(lower), old)
    (upper / "etc/hosts").write_text("my own\n")
    (upper / "etc/hostname").write_text("my-own\n")
    replace_files(str(upper), old, new)
    found = {name: (upper / "etc" / name).read_text() for name in ("hostname", "hosts", "mailname")}
    assert found == {"hostname": "b\n", "hosts": "my own\n", "mailname": "b\n"}


def test_no_link_of_the_guest_is_followed(layers: tuple[Path, Path], tmp_path: Path) -> None:
    upper, _ = layers
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "hostname").write_text("a\n")
    (upper / "etc").symlink_to(victim)
    old, new = [("/etc/hostname", b"a\n", 0o644)], [("/etc/hostname", b"b\n", 0o644)]
    replace_files(str(upper), old, new)
    assert (victim / "hostname").read_text() == "a\n"
    (upper / "etc").unlink()
    (upper / "etc").mkdir()
    (upper / "etc/hostname").symlink_to(victim / "hostname")
    replace_files(str(upper), old, new)
    assert (victim / "hostname").read_text() == "a\n"
    (upper / "etc/hostname").unlink()
    os.mkfifo(upper / "etc/hostname")
    replace_files(str(upper), old, new)
    os.unlink(upper / "etc/hostname")
    os.link(victim / "hostname", upper / "etc/hostname")
    replace_files(str(upper), old, new)
    assert (victim / "hostname").read_text() == "a\n"
