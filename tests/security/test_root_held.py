"""Wall: a jail's root, an overlay whose superblock and private attributes are the host's (runtime/root_mount.py).

Mechanism: trusted.* takes CAP_SYS_ADMIN of the host's user namespace; the flags of a mount that another user namespace
has made are locked (mount_namespaces(7)).
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from tests.security.guest import OK, Buffer, Guest, Result, call_number
from tests.system.conftest import MakeJail
from tests.system.instance import Instance

AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x20000
MS_NODEV, MS_REMOUNT, MS_BIND, MS_SILENT = 4, 32, 4096, 32768
OPEN_TREE_CLONE = 1
MOUNT_ATTR_NODEV = 4
FSPICK_CLOEXEC, FSCONFIG_CMD_RECONFIGURE = 1, 7


def upper_of(guest: Guest) -> str:
    return f"{guest.jm.root.volume('default', guest.jail)}/upper"


def test_the_kernels_attributes_are_out_of_reach(guest: Guest) -> None:
    """They can't be written, removed, read, nor seen in a list."""
    guest.sh("rm -rf /root/attributes; mkdir /root/attributes; chown 1:1 /bin/busybox")
    names = ("trusted.overlay.opaque", "trusted.overlay.redirect", "trusted.overlay.metacopy", "trusted.mine")
    asked = guest.ask(
        *[(call, path, name, "y", 1, 0) for call in ("setxattr", "lsetxattr") for path in PATHS for name in names],
        *[("removexattr", path, name) for path in PATHS for name in names],
        *[("getxattr", path, name, 0, 0) for path in PATHS for name in names],
    )
    assert OK not in asked
    assert "trusted.overlay.metacopy" in os.listxattr(f"{upper_of(guest)}/bin/busybox")
    assert set(os.listxattr(f"{upper_of(guest)}/root/attributes")) <= {"trusted.overlay.opaque"}
    assert guest.results(*[("listxattr", path, Buffer(1000), 1000) for path in PATHS]) == [0, 0]


PATHS = ("/root/attributes", "/bin/busybox")


def test_attributes_of_an_unprivileged_overlay_lead_nowhere(
    jm: Instance, busybox_jail: MakeJail, tmp_path: Path
) -> None:
    """Redirects, copies of metadata, whiteouts, as a guest may write them: only data, also after a start."""
    guest = Guest(jm, busybox_jail(), tmp_path)
    guest.sh("mkdir /root/led /root/hidden; echo own >/root/file; touch /root/hidden/kept /root/hidden/gone")
    attributes = [
        ("led", "redirect", "/etc"), ("file", "redirect", "/bin/busybox"), ("file", "metacopy", "y"),
        ("hidden", "opaque", "x"), ("hidden/gone", "whiteout", "y"),
    ]  # fmt: skip
    calls = [("setxattr", f"/root/{path}", f"user.overlay.{name}", value, 1, 0) for path, name, value in attributes]
    assert set(guest.ask(*calls)) == {OK}
    jm("restart", "--force", guest.jail)
    assert guest.sh("ls /root/led; cat /root/file; ls /root/hidden") == "own\ngone\nkept\n"
    found = os.listxattr(f"{upper_of(guest)}/root/file")
    assert not [name for name in found if name.startswith("trusted.overlay.") and not name.endswith(".origin")]


def test_nodev_stays_on_the_root_and_on_all_that_is_made_of_it(guest: Guest) -> None:
    """By remount, bind mounts and detached copies, also with a user and a mount namespace of the guest's own."""
    guest.sh("mkdir -p /mnt/bound")
    for own in ([], [("unshare", CLONE_NEWUSER)], [("unshare", CLONE_NEWUSER | CLONE_NEWNS)]):
        # struct mount_attr: attr_clr is the second of four words.
        clear = b"".join(number.to_bytes(8, "little") for number in (0, MOUNT_ATTR_NODEV, 0, 0))
        asked = guest.ask(
            *own,
            ("mount", 0, "/", 0, MS_REMOUNT | MS_BIND, 0),
            ("mount", "/root", "/mnt/bound", 0, MS_BIND, 0),
            ("mount", 0, "/mnt/bound", 0, MS_REMOUNT | MS_BIND, 0),
            ("open_tree", AT_FDCWD, "/root", OPEN_TREE_CLONE),
            ("mount_setattr", Result(len(own) + 3), "", AT_EMPTY_PATH, clear, len(clear)),
        )
        assert OK not in (asked[len(own)], asked[len(own) + 2], asked[len(own) + 4]), (own, asked)
        guest.sh("umount /mnt/bound", status=None)
    with open(f"/proc/{guest.jm.info(guest.jail)['init_pid']}/mountinfo", encoding="utf-8") as file:
        root = next(line.split() for line in file if line.split()[4] == "/")
    assert "nodev" in root[5].split(",")


def test_the_superblock_is_not_the_guests_to_change(guest: Guest) -> None:
    """Mechanism: a remount takes CAP_SYS_ADMIN of the superblock's user namespace, the host's."""
    asked = guest.ask(
        ("mount", 0, "/", 0, MS_REMOUNT, 0),
        ("mount", 0, "/", 0, MS_REMOUNT | MS_SILENT, "metacopy=off"),
        ("fspick", AT_FDCWD, "/", FSPICK_CLOEXEC),
        ("fsconfig", Result(2), FSCONFIG_CMD_RECONFIGURE, 0, 0, 0),
    )
    assert OK not in asked[:2]
    assert asked[3] == "EPERM"


def test_rights_of_files_count_in_the_jail(guest: Guest) -> None:
    """Set-user-id and capabilities of files, of the image's and the guest's own, for a user of the jail."""
    guest.install("ask")
    guest.sh(
        "chmod 711 /root; mkdir -p /root/open; cd /root/open; for name in plain ask capable; do cp ../ask $name; done"
    )
    guest.sh("chmod 4755 /root/open/ask; touch /root/a")
    capability = struct.pack("<5I", 0x02000001, 1, 0, 0, 0)  # CAP_CHOWN, in effect
    assert guest.ask(("setxattr", "/root/open/capable", "security.capability", capability, len(capability), 0)) == [OK]
    calls = f"{call_number('geteuid')}\n{call_number('chown')} s:/root/a 7 7\n"
    found = {
        name: guest.jm("exec", "--user", "7", guest.jail, "--", f"/root/open/{name}", stdin=calls.encode()).out.split()
        for name in ("plain", "ask", "capable")
    }
    assert found == {
        "plain": ["7", "0", "-1", str(errno.EPERM)],
        "ask": ["0", "0", "0", "0"],
        "capable": ["7", "0", "0", "0"],
    }
    assert os.getxattr(f"{upper_of(guest)}/root/open/capable", "security.capability")[3] == 2, "revision on disk"


def test_namespaces_in_the_jail_rename_too(guest: Guest) -> None:
    """A user namespace of the guest's own, over the image's directories."""
    guest.sh(
        "unshare -Ur sh -c 'mkdir /root/n && mv /root/n /root/m && mv -T /usr/sbin /root/s && mv /root/s /usr/sbin'"
    )


def test_no_layer_is_in_sight(guest: Guest) -> None:
    """Nothing but the merged tree: no raw upper, no path of the host in the mount's options."""
    mounts = guest.sh("cat /proc/self/mountinfo")
    assert guest.jm.root.at not in mounts
    assert not {line.split(" - ")[1].split()[0] for line in mounts.splitlines()} & {"btrfs", "ext4", "xfs"}
    root = next(line for line in mounts.splitlines() if line.split()[4] == "/")
    assert "lowerdir=/usr,upperdir=upper,workdir=workdir" in root


@pytest.mark.parametrize("name", ["trusted.overlay.redirect", "trusted.overlay.opaque", "trusted.mine"])
def test_cp_brings_no_trusted_attribute(jm: Instance, busybox_jail: MakeJail, tmp_path: Path, name: str) -> None:
    """Of the host's files, with a jail that runs and one that doesn't. Mechanism: `cp` writes as the jail's root."""
    source = tmp_path / "source"
    source.mkdir()
    os.setxattr(source, name, b"/etc")
    os.setxattr(source, "user.kept", b"y")
    jail = busybox_jail()
    for state in ("running", "stopped"):
        jm("cp", str(source), f"{jail}:/root/{state}", status=None)
        found = os.listxattr(f"{jm.root.volume('default', jail)}/upper/root/{state}")
        assert "user.kept" in found
        assert name not in set(found) - {"trusted.overlay.opaque"}
        jm("stop", "--force", jail, status=None)
