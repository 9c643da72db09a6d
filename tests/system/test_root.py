"""A jail's root file system: what the overlay lets a guest do with the image's files, and at a full quota."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.image.fingerprint import fingerprint
from jailmgr.manager.files import replace_files
from jailmgr.runtime import capabilities, root_mount
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, until

MIB = 1 << 20


def disk_bytes(jm: Instance, jail: str) -> int:
    (row,) = [row for row in jm.json("list") if row["name"] == jail]
    return int(row["usage"]["disk_bytes"])


def test_directories_of_the_image_are_renamed(jm: Instance, busybox_jail: MakeJail) -> None:
    """Also deeper and back; all is as the guest left it after a restart. What mv(1) has copied has a new number."""
    jail = busybox_jail()
    before = jm.sh(jail, "ls /usr/sbin").out
    numbers = jm.sh(jail, "stat -c %i /usr/bin /usr/sbin").out
    script = """
        cd /; mkdir /root/deep
        mv -T /usr/sbin /root/deep/sbin && touch /root/deep/sbin/new && mkdir /usr/sbin && touch /usr/sbin/other
        mv /usr/bin /usr/was; rm /usr/was/yes; mv /usr /usr2
    """
    jm.sh(jail, script)
    listing = "ls /usr2 /usr2/sbin; ls /root/deep/sbin | grep -v new; ls /usr2/was/yes"
    for _ in range(2):
        found = jm.sh(jail, listing, status=None).out
        assert found == f"/usr2:\nsbin\nwas\n\n/usr2/sbin:\nother\n{before}"
        assert jm.sh(jail, "stat -c %i /usr2/was /root/deep/sbin").out == numbers
        jm("restart", "--force", jail)
    jm.sh(jail, "mv /usr2 /usr; mv /usr/was /usr/bin; rm -r /usr/sbin; mv /root/deep/sbin /usr/sbin; rm /usr/sbin/new")
    assert jm.sh(jail, "ls /usr/sbin").out == before
    assert disk_bytes(jm, jail) < MIB


def test_owners_and_modes_of_the_images_files_take_no_room(jm: Instance, busybox_jail: MakeJail) -> None:
    """`chown -R` over the image keeps its content, also after a restart, and a write to one of them brings it all.

    On btrfs a copy of the content would share its extents, which no quota counts, so the layer's blocks are.
    """
    jail = busybox_jail()
    before = disk_bytes(jm, jail)
    digest = jm.sh(jail, "md5sum </bin/busybox").out
    jm.sh(jail, "chown -R 1000:1000 /bin /usr /sbin; chmod 711 /bin/busybox; touch -d 2001-01-01 /bin/busybox; sync")
    assert disk_bytes(jm, jail) - before < MIB / 2
    assert os.stat(f"{jm.root.volume('default', jail)}/upper/bin/busybox").st_blocks == 0
    jm("restart", "--force", jail)
    assert jm.sh(jail, "md5sum </bin/busybox").out == digest
    assert jm.sh(jail, "stat -c %u.%a /bin/busybox").out == "1000.711\n"
    jm.sh(jail, "ln /bin/busybox /root/linked")
    jm("restart", "--force", jail)
    assert jm.sh(jail, "md5sum </bin/busybox; md5sum </root/linked; stat -c %h /root/linked").out == f"{digest * 2}2\n"
    passwd = jm.sh(jail, "cat /etc/passwd; chmod 600 /etc/passwd; ln /etc/passwd /root/passwd").out
    jm("restart", "--force", jail)
    jm.sh(jail, "echo end >>/root/passwd; mv /etc/passwd /root/moved")
    assert jm.sh(jail, "cat /root/moved; stat -c %a.%h /root/moved").out == f"{passwd}end\n600.2\n"


def test_what_is_removed_and_made_again_is_empty(jm: Instance, busybox_jail: MakeJail) -> None:
    """Opaque directories and whiteouts, also below a directory that was renamed."""
    jail = busybox_jail()
    script = "rm -r /usr/sbin; mkdir /usr/sbin; rm /usr/bin/yes; mv /usr /other; rm -r /other/sbin; mkdir /other/sbin"
    jm.sh(jail, script)
    for _ in range(2):
        assert jm.sh(jail, "ls /other/sbin; ls /other/bin/yes; ls /other/bin | grep -c .", status=None).out != "0\n"
        assert jm.sh(jail, "ls -A /other/sbin; ls /other/bin | grep -cx yes; ls -d /usr", status=None).out == "0\n"
        jm("restart", "--force", jail)


def test_a_file_that_is_only_metadata_is_not_read_from_the_layer(tmp_path: Path) -> None:
    """A rename writes its files into the layer: what the image still has the content of is the guest's choice."""
    upper = tmp_path / "etc"
    upper.mkdir()
    (upper / "hosts").write_bytes(bytes(4))
    os.setxattr(upper / "hosts", "trusted.overlay.metacopy", b"")
    replace_files(str(tmp_path), [("/etc/hosts", bytes(4), 0o644)], [("/etc/hosts", b"new", 0o644)])
    assert (upper / "hosts").read_bytes() == bytes(4)


def test_an_image_with_attributes_that_the_kernel_trusts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    os.setxattr(tmp_path / "file", "trusted.overlay.redirect", b"/etc/shadow")
    with pytest.raises(JailmgrError, match=r"trusted\.overlay\.redirect") as raised:
        fingerprint(str(tmp_path))
    assert raised.value.code == "invalid"


def test_a_full_jail_is_writable_after_a_start(jm: Instance, busybox_jail: MakeJail) -> None:
    """overlayfs makes directories as it is mounted, and would be read-only else; in turn, so that a reserve is kept."""
    jail = busybox_jail("--disk", "20MiB")
    reserve = Path(jm.root.volume("default", jail), "reserve")
    for number in range(3):
        jm.sh(
            jail, f"touch /root/own{number}; cat /dev/zero >/root/big{number}; while mkdir /root/$$.$i; do i=1$i; done"
        )
        jm("restart", "--force", jail)
        assert reserve.stat().st_size >= 256 * 1024
        jm.sh(jail, f"rm /root/own{number} /root/big{number}; echo text >/root/file; rm /bin/yes{number} || true")
        assert jm.sh(jail, "cat /root/file").out == "text\n"


def test_a_full_jail_without_a_reserve_says_so(jm: Instance, busybox_jail: MakeJail) -> None:
    """As one of an older release may be; nothing is changed, and it starts with more room."""
    if os.path.exists(jm.root.pool_tree):
        pytest.skip("a project quota leaves room for directories where one has been removed")
    jail = busybox_jail("--disk", "20MiB")
    jm.sh(jail, "cat /dev/zero >/root/big; while mkdir /root/$$.$i; do i=1$i; done")
    jm("stop", "--force", jail)
    os.unlink(f"{jm.root.volume('default', jail)}/reserve")
    full = f"{jm.root.volume('default', jail)}/more"
    until(lambda: not _more(full, 65536), 20, "the room is used up")
    until(lambda: not _more(full, 4096), 20, "to the last block")
    told = jm.refused("start", jail)
    assert "quota is full" in told.err
    assert "limits.disk" in told.err
    jm("set", jail, "limits.disk=25MiB")
    jm("start", jail)
    jm.sh(jail, "rm /root/big; echo text >/root/file")


def _more(path: str, size: int) -> bool:
    try:
        with open(path, "ab", 0) as file:
            file.write(bytes(size))
            os.fsync(file.fileno())
    except OSError:
        return False
    return True


def test_rights_come_back_whatever_happens() -> None:
    """The supervisor writes as a jail's root while it mounts, in a namespace of its own: neither outlives an error."""

    def attempt() -> tuple[object, ...]:
        before = _rights()
        with pytest.raises(ValueError, match="late"), root_mount.staging() as stage:
            assert os.fstat(stage).st_ino == os.stat("/proc/thread-self/ns/mnt").st_ino
            assert _rights()[0] != before[0]
            with capabilities.writing_as(1234567, root_mount.WRITES_WITH):
                assert "1234567" in str(_rights()[1])
                assert _rights()[2] != before[2]
                raise ValueError("late")
        return before, _rights()

    with ThreadPoolExecutor(1) as thread:
        before, after = thread.submit(attempt).result()
    assert after == before


def _rights() -> tuple[str, str, str]:
    """The calling thread's mount namespace, ids and capabilities in effect."""
    lines = Path("/proc/thread-self/status").read_text(encoding="ascii").splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return os.readlink("/proc/thread-self/ns/mnt"), found["Uid"] + found["Gid"], found["CapEff"]
