"""Wall: devices of the host. What holds: mknod(2) takes CAP_MKNOD of the host's namespace, the jail's root is mounted
`nodev`, locked (test_root_held.py), its other file systems belong to its user namespace and know no device nodes, and
the devices group (v1, or BPF on v2) lets few be opened.

What the group lets be opened is tried in tests/system/test_cgroups.py.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.security.guest import OK, Guest
from tests.system.conftest import MakeJail
from tests.system.instance import Instance

AT_FDCWD = -100
CLONE_NEWUSER = 0x10000000
SEEN = ("null", "zero", "full", "random", "urandom", "tty")


def nodes() -> list[tuple[int, int]]:
    """Kind and number of each device node that the host has, and of some that it may not."""
    found = {(stat.S_IFCHR, os.makedev(1, minor)) for minor in range(1, 12)}
    found |= {(stat.S_IFCHR, os.makedev(10, minor)) for minor in (200, 229, 232, 237)}
    found |= {(stat.S_IFBLK, os.makedev(major, 0)) for major in (7, 8, 253, 254, 259)}
    for entry in Path("/dev").iterdir():
        status = entry.lstat()
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            found.add((stat.S_IFMT(status.st_mode), status.st_rdev))
    return sorted(found)


@pytest.mark.parametrize("nested", [False, True], ids=["", "in a user namespace of its own"])
def test_no_node_can_be_made(guest: Guest, nested: bool) -> None:
    """Mechanism: capable(CAP_MKNOD) in mknod(2); also of the devices that a jail has."""
    known = nodes()
    asked = guest.ask(
        *([("unshare", CLONE_NEWUSER)] if nested else []),
        *[
            ("mknodat", AT_FDCWD, f"/{folder}/node{number}", kind | 0o666, device)
            for number, (kind, device) in enumerate(known)
            for folder in ("root", "dev", "run")
        ],
    )
    assert set(asked[nested:]) <= {"EPERM", "EACCES"}
    assert len(asked) >= 3 * len(known)


def test_a_node_that_the_host_puts_there_is_dead(jm: Instance, busybox_jail: MakeJail) -> None:
    """Mechanism: the root's mount is `nodev`, and what another user namespace has mounted keeps that flag
    (mount_namespaces(7)).

    The nodes are those that the devices group lets be opened, so that it isn't the group which refuses.
    """
    jail = busybox_jail(start=False)
    upper = f"{jm.root.volume('default', jail)}/upper/root"
    for name, number in (("null", os.makedev(1, 3)), ("zero", os.makedev(1, 5)), ("disk", os.makedev(7, 0))):
        kind = stat.S_IFBLK if name == "disk" else stat.S_IFCHR
        os.makedirs(upper, exist_ok=True)
        os.mknod(f"{upper}/{name}", 0o666 | kind, number)
    jm("start", jail)
    for name in ("null", "zero", "disk"):
        assert jm.sh(jail, f"head -c 1 /root/{name} 2>&1 | grep -c denied").out == "1\n"
    jm.sh(jail, "mount -o remount,dev / 2>/dev/null; mount -o bind /root /mnt && mount -o remount,bind,dev /mnt", None)
    assert jm.sh(jail, "head -c 1 /mnt/null 2>&1 | grep -c denied").out == "1\n"


def test_nodes_of_the_host_can_be_used_and_not_changed(guest: Guest) -> None:
    """Those in a jail's /dev are the host's own. Mechanism: their owner has no id in the jail's user namespace."""

    def state() -> list[tuple[int, int, int, int]]:
        return [(at.st_mode, at.st_uid, at.st_gid, at.st_rdev) for at in (os.stat(f"/dev/{name}") for name in SEEN)]

    before, names = state(), set(os.listdir("/dev"))
    for name in SEEN:
        path = f"/dev/{name}"
        assert guest.ask(
            ("fchmodat", AT_FDCWD, path, 0o777),
            ("fchownat", AT_FDCWD, path, 0, 0, 0),
            ("setxattr", path, "user.mine", "y", 1, 0),
            ("linkat", AT_FDCWD, path, AT_FDCWD, "/dev/mine", 0),
            ("unlinkat", AT_FDCWD, path, 0),
        )[:2] == ["EPERM", "EPERM"], name
    guest.sh("mount -o remount,ro,bind /dev/zero; mv /dev/zero /dev/zer0; rm -f /dev/null", status=None)
    assert state() == before
    assert set(os.listdir("/dev")) >= names


def test_the_hosts_terminals_are_not_there(guest: Guest) -> None:
    """Mechanism: a devpts instance of the jail's own (newinstance); no tty of the kernel's is in the devices group."""
    kinds = guest.sh("for each in /dev/* /dev/pts/*; do stat -c '%F %t:%T %n' $each; done")
    found = [line for line in kinds.splitlines() if line.startswith("block")]
    assert not found
    for major, minor in ((4, 0), (4, 1), (5, 1), (5, 2), (136, 0)):
        assert guest.ask(("mknodat", AT_FDCWD, "/run/tty", stat.S_IFCHR | 0o666, os.makedev(major, minor))) != [OK]
    assert guest.sh("stat -f -c %T /dev/pts").strip() in ("devpts", "0x1cd1", "UNKNOWN", "unknown")
    assert os.stat("/dev/pts").st_dev != int(guest.sh("stat -c %d /dev/pts"))


def test_no_file_system_of_a_block_device_is_mounted(guest: Guest) -> None:
    """Mechanism: FS_USERNS_MOUNT; file systems that lack it take CAP_SYS_ADMIN of the host's namespace."""
    guest.sh("dd if=/dev/zero of=/root/image bs=1k count=256 2>/dev/null")
    calls = [
        ("mount", source, "/mnt", kind, 0, 0)
        for kind in ("ext4", "xfs", "btrfs", "squashfs", "vfat", "erofs", "iso9660")
        for source in ("/root/image", "/dev/loop0", "/dev/vda", "/dev/sda1")
    ]
    assert OK not in guest.ask(*calls)
