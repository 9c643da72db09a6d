"""Volumes of before overlays were mounted by the supervisor: converted at their next start, whatever comes between.

The older format is made by the kernel itself: an overlay with `userxattr`, as releases before mounted it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.runtime import volume_format
from tests.system.conftest import MakeJail
from tests.system.instance import Instance
from tests.unit.crash import killed_at

DEEP = 1500
"""Directories within each other: past PATH_MAX, and past the number of files that may be open."""

MOUNT = 'mount -t overlay overlay -o userxattr,lowerdir="$1",upperdir="$2/upper",workdir="$2/work" "$3"'


def make_old(lower: str, volume: str, script: str) -> None:
    """Have a volume as it was before today's format, changed by a script that runs in its root."""
    os.rename(f"{volume}/workdir", f"{volume}/work")
    merged = f"{volume}/merged"
    os.mkdir(merged)
    command = f'set -e; {MOUNT}; cd "$3"; {script}'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", lower, volume, merged],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    os.rmdir(merged)


def attributes(volume: str) -> dict[str, dict[str, bytes]]:
    """Of each file of the layer, by path."""
    found = {}
    for folder, folders, files in os.walk(f"{volume}/upper"):
        for name in (".", *folders, *files):
            path = os.path.normpath(f"{folder}/{name}")
            names = os.listxattr(path, follow_symlinks=False)
            found[os.path.relpath(path, volume)] = {
                each: os.getxattr(path, each, follow_symlinks=False) for each in names if "overlay" in each
            }
    return found


def test_an_older_volume_is_converted_by_a_start(jm: Instance, busybox_jail: MakeJail) -> None:
    """What was removed stays so, what was made stays, and what the guest wrote under the same names is its own."""
    jail = busybox_jail(start=False)
    volume = jm.root.volume("default", jail)
    image = jm.info(jail)["image"]
    lower = next(str(path) for path in Path(jm.root.pool, "images").glob(f"{image}*/rootfs"))
    script = """
        rm -r usr/sbin; mkdir usr/sbin; touch usr/sbin/new; rm usr/bin/yes; chmod 700 usr/bin; echo more >>etc/passwd
        mkdir -p root/deep; ln -s none root/link
        python3 - <<'END'
import contextlib, os
with contextlib.suppress(OSError):  # before Linux 6.7
    os.setxattr("root/deep", "user.overlay.redirect", b"/etc")
END
    """
    make_old(lower, volume, script)
    before = attributes(volume)
    assert before["upper/usr/sbin"]["user.overlay.opaque"] == b"y", "else this is not the older format"
    assert not any(name.startswith("trusted.") for found in before.values() for name in found)
    jm("start", jail)
    for _ in range(2):
        assert (
            jm.sh(jail, "ls /usr/sbin; ls /usr/bin | grep -cx yes; tail -n 1 /etc/passwd", None).out == "new\n0\nmore\n"
        )
        assert jm.sh(jail, "stat -c %a /usr/bin; ls -A /root/deep").out == "700\n"
        jm.sh(jail, "mv /usr /usr2; mv /usr2 /usr")
        jm("restart", "--force", jail)
    after = attributes(volume)
    assert after["upper/usr/sbin"].keys() >= {"trusted.overlay.opaque"}
    assert "trusted.overlay.redirect" not in after["upper/root/deep"]
    left = {path: name for path, found in after.items() for name in found if name.startswith("user.overlay.")}
    escaped = "user.overlay.overlay.redirect" in before["upper/root/deep"]  # what Linux 6.7 makes of it
    assert left == ({"upper/root/deep": "user.overlay.redirect"} if escaped else {})
    assert not os.path.exists(f"{volume}/work"), "a release from before refuses it"


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A volume in the older format, by hand: all that the kernel writes there, and what a guest might."""
    volume = tmp_path / "old"
    for folder in ("upper/opaque", "upper/merged", "upper/both", "work/work"):
        (volume / folder).mkdir(parents=True)
    files = {name: volume / "upper/merged" / name for name in ("copied", "hidden", "forged")}
    for file in files.values():
        file.write_text("text")
    os.mknod(volume / "upper/merged/gone", 0o600 | 0o020000, 0)
    os.symlink("copied", volume / "upper/merged/link")
    for path, name, value in (
        ("", "impure", b"y"), ("opaque", "opaque", b"y"), ("merged", "opaque", b"x"), ("merged", "impure", b"y"),
        ("merged/copied", "origin", b""), ("merged/hidden", "whiteout", b"y"),
        ("merged/forged", "redirect", b"/etc/shadow"), ("merged/forged", "metacopy", b""),
        ("merged/forged", "origin", b"\x00\xfb\x1d"),
        ("both", "opaque", b"y"), ("both", "overlay.opaque", b"guest"), ("both", "overlay.overlay.x", b"nested"),
    ):  # fmt: skip
        os.setxattr(volume / "upper" / path, f"user.overlay.{name}", value)
    yield volume
    subprocess.run(["rm", "-rf", "--", str(volume)], check=True)


CONVERTED = {
    "upper": {"trusted.overlay.impure": b"y"},
    "upper/opaque": {"trusted.overlay.opaque": b"y"},
    "upper/merged": {"trusted.overlay.opaque": b"x", "trusted.overlay.impure": b"y"},
    "upper/merged/copied": {"trusted.overlay.origin": b""},
    "upper/merged/hidden": {"trusted.overlay.whiteout": b"y"},
    "upper/merged/forged": {},
    "upper/merged/gone": {},
    "upper/merged/link": {},
    "upper/both": {
        "trusted.overlay.opaque": b"y", "user.overlay.opaque": b"guest", "user.overlay.overlay.x": b"nested",
    },
}  # fmt: skip


def check(volume: Path) -> None:
    assert attributes(str(volume)) == CONVERTED
    assert sorted(os.listdir(volume)) == ["upper", "workdir"]


def test_known_attributes_are_taken_over_and_others_are_not(old: Path) -> None:
    """Twice: what the guest has after the first is left alone by the second."""
    volume_format.convert(str(old))
    check(old)
    os.setxattr(old / "upper/merged/copied", "user.overlay.opaque", b"y")
    volume_format.convert(str(old))
    assert "trusted.overlay.opaque" not in os.listxattr(old / "upper/merged/copied")


def test_a_conversion_that_is_killed_goes_on(old: Path, tmp_path: Path) -> None:
    """kill -9 at each line, then again at each line of the next one's first half: the result is always the same."""
    line, killed = 0, True
    while killed:
        line += 5
        volume = tmp_path / "copy"
        subprocess.run(["cp", "--archive", str(old), str(volume)], check=True)
        convert = partial(volume_format.convert, str(volume))
        killed = killed_at(line, ("volume_format.py",), convert)
        if killed and line % 2:
            killed_at(line // 2, ("volume_format.py",), convert)
        convert()
        check(volume)
        shutil.rmtree(volume)
    assert line > 150, "it was killed in all of it"


def test_trees_of_any_shape(tmp_path: Path) -> None:
    """Deeper than PATH_MAX, names of any bytes, files that nobody should open."""
    volume = tmp_path / "volume"
    (volume / "upper").mkdir(parents=True)
    (volume / "work").mkdir()
    os.mkfifo(volume / "upper/fifo")
    os.mkdir(os.fsencode(volume / "upper") + b"/\xff\n")
    os.setxattr(os.fsencode(volume / "upper") + b"/\xff\n", "user.overlay.opaque", b"y")
    os.symlink("/", volume / "upper/link")
    fd = os.open(volume / "upper", os.O_RDONLY)
    for _ in range(DEEP):
        os.mkdir("d" * 200, dir_fd=fd)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.setxattr(fd, "user.overlay.opaque", b"y")
    volume_format.convert(str(volume))
    assert os.listxattr(fd) == ["trusted.overlay.opaque"]
    os.close(fd)
    assert os.listxattr(os.fsencode(volume / "upper") + b"/\xff\n") == ["trusted.overlay.opaque"]
    subprocess.run(["rm", "-rf", "--", str(volume)], check=True)


def test_a_volume_without_its_layer_is_reported(tmp_path: Path) -> None:
    """Nothing is changed, so that it can be looked into."""
    (tmp_path / "work").mkdir()
    for volume in (tmp_path / "missing", tmp_path):
        with pytest.raises(JailmgrError, match="No such file") as raised:
            volume_format.convert(str(volume))
        assert str(volume) in raised.value.what
    assert os.listdir(tmp_path) == ["work"]


def test_a_full_volume_is_reported_and_converted_with_more_room(jm: Instance, busybox_jail: MakeJail) -> None:
    """The quota holds the host's root as well, on btrfs."""
    jail = busybox_jail("--disk", "20MiB", start=False)
    volume = jm.root.volume("default", jail)
    upper = f"{volume}/upper"
    os.mkdir(f"{upper}/opaque")
    os.setxattr(f"{upper}/opaque", "user.overlay.opaque", b"y")
    os.rename(f"{volume}/workdir", f"{volume}/work")
    if os.path.exists(jm.root.pool_tree):
        pytest.skip("no project quota holds the host's root")
    for size in (1 << 20, 4096):
        with open(f"{volume}/filler", "ab", 0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(size))
                os.fsync(file.fileno())
    assert "limits.disk" in jm.refused("start", jail).err
    assert os.listxattr(f"{upper}/opaque") == ["user.overlay.opaque"]
    jm("set", jail, "limits.disk=25MiB")
    jm("start", jail)
    assert os.listxattr(f"{upper}/opaque") == ["trusted.overlay.opaque"]
