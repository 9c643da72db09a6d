"""Walls: ids and files of the host.

Mechanism: a user namespace with 1,048,576 ids of the jail's own (user_namespaces(7)), layers that are mounted with the
idmap of that namespace (mount_setattr(2)), and a mount namespace without any mount of the host (pivot_root(2)).
"""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from pathlib import Path

from jailmgr.keys import IDS
from tests.security.guest import OK, Guest, Result

AT_FDCWD = -100
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x20000
MNT_DETACH = 2
NS_GET_USERNS, NS_GET_PARENT = 0xB701, 0xB702


def test_an_id_outside_of_the_range_can_not_be_taken(guest: Guest) -> None:
    """Mechanism: the kernel maps each id by the jail's user namespace, which has 1,048,576."""
    for id_ in (IDS, IDS + 1000, 0x7000_0000):
        assert guest.ask(("setresuid", id_, id_, id_), ("setresgid", id_, id_, id_), ("setfsuid", id_)) == [
            "EINVAL", "EINVAL", OK,
        ]  # fmt: skip
        groups = struct.pack("I", id_)
        assert guest.ask(("setgroups", 1, groups)) == ["EINVAL"]
    assert guest.ask(("setresuid", IDS - 1, IDS - 1, IDS - 1)) == [OK], "the last of its own"


def test_a_file_can_not_be_given_to_an_id_outside_of_the_range(guest: Guest) -> None:
    """Mechanism: as above, and on disk an owner is the id in the jail, by the layers' idmap."""
    guest.sh("rm -f /root/mine; echo x >/root/mine")
    for id_ in (IDS, 0x7000_0000):
        assert guest.ask(("fchownat", AT_FDCWD, "/root/mine", id_, -1, 0)) == ["EINVAL"]
        assert guest.ask(("fchownat", AT_FDCWD, "/root/mine", -1, id_, 0)) == ["EINVAL"]
    guest.sh("chown 65534:65534 /root/mine")
    on_disk = os.stat(f"{guest.jm.root.volume('default', guest.jail)}/upper/root/mine")
    assert (on_disk.st_uid, on_disk.st_gid) == (65534, 65534)


def test_the_map_is_written_once(guest: Guest) -> None:
    """Mechanism: the kernel takes one map for each namespace; a nested one gets ids of the jail's only."""
    base = guest.sh("cat /proc/self/uid_map").split()[1]
    assert guest.sh("echo '0 0 1' 2>/dev/null >/proc/self/uid_map || echo refused") == "refused\n"
    for line in ("0 0 4294967295", f"0 {base} 1", f"0 {IDS} 1"):
        script = f"unshare -U sh -c 'echo $$; read x' & sleep 0.2; echo '{line}' >/proc/$!/uid_map || echo refused"
        assert guest.sh(f"({script}) 2>/dev/null </dev/null").splitlines()[-1] == "refused", line


def test_a_setuid_program_of_the_jails_is_no_ones_on_the_host(guest: Guest) -> None:
    """Mechanism: as the host's processes see it, its owner is an id of the range; on disk, its folder is closed."""
    guest.sh("cp /bin/busybox /root/suid; chown 0:0 /root/suid; chmod 6755 /root/suid")
    init = guest.jm.info(guest.jail)["init_pid"]
    seen = os.stat(f"/proc/{init}/root/root/suid")
    assert seen.st_mode & stat.S_ISUID
    assert min(seen.st_uid, seen.st_gid) >= 0x7000_0000
    way = Path(guest.jm.root.volume("default", guest.jail))
    closed = [folder for folder in (way, *way.parents) if folder.exists() and not folder.stat().st_mode & 0o007]
    assert closed, "an unprivileged user of the host can't come to it"


def test_capabilities_of_a_file_count_in_the_jail_only(guest: Guest) -> None:
    """Mechanism: the kernel honours them on mounts of the file's own user namespace; the pool's mount is nosuid."""
    capability = struct.pack("<5I", 0x02000001, 0xFFFFFFFF, 0, 0x1FF, 0)
    guest.sh("cp /bin/busybox /root/capable")
    asked = guest.ask(("setxattr", "/root/capable", "security.capability", capability, len(capability), 0))
    assert asked == [OK]
    init = guest.jm.info(guest.jail)["init_pid"]
    for way in (f"/proc/{init}/root", f"{guest.jm.root.volume('default', guest.jail)}/upper"):
        program = os.open(f"{way}/root/capable", os.O_RDONLY)
        try:
            done = subprocess.run(
                ["cat", "/proc/self/status"],
                executable=f"/proc/self/fd/{program}",  # the folders above are closed to everybody but root
                capture_output=True, text=True, pass_fds=[program], timeout=30,
                user=65534, group=65534, extra_groups=[],
            )  # fmt: skip
        finally:
            os.close(program)
        assert done.returncode == 0, done.stderr
        assert "CapEff:\t0000000000000000" in done.stdout, way


def test_no_way_leads_out_of_the_root(guest: Guest) -> None:
    """Mechanism: pivot_root(2) and an unmount of all that was the host's: nothing lies under or above the root."""
    here = guest.sh("stat -c %d:%i /")
    assert guest.sh("stat -c %d:%i /../.. /proc/self/root/../../.. /proc/1/root/..").split() == [here.strip()] * 3
    assert guest.ask(
        # The way out of a chroot: a folder is kept open, the root is moved below it, and .. goes up without end.
        ("openat", AT_FDCWD, "/", os.O_RDONLY | os.O_DIRECTORY),
        ("mkdirat", AT_FDCWD, "/root/cell", 0o755),
        ("chroot", "/root/cell"),
        ("fchdir", Result(0)),
        *[("chdir", "..")] * 20,
        ("chroot", "."),
        ("openat", AT_FDCWD, f"{guest.jm.root.lib}/store.db", os.O_RDONLY),
    )[-2:] == [OK, "ENOENT"]
    guest.sh("rmdir /root/cell")
    # The root taken away shows what lies under it.
    assert guest.ask(
        ("unshare", CLONE_NEWNS),
        ("umount2", "/", MNT_DETACH),
        ("openat", AT_FDCWD, f"{guest.jm.root.lib}/store.db", os.O_RDONLY),
        ("openat", AT_FDCWD, f"/..{guest.jm.root.lib}/store.db", os.O_RDONLY),
    ) == [OK, "EINVAL", "ENOENT", "ENOENT"]


def test_no_namespace_of_the_hosts_can_be_had(guest: Guest) -> None:
    """Mechanism: ioctl_ns(2) gives a namespace's parent or owner to those only who are in it; a handle is refused."""
    for kind in ("user", "pid"):
        assert guest.ask(
            ("openat", AT_FDCWD, f"/proc/1/ns/{kind}", os.O_RDONLY),
            ("ioctl", Result(0), NS_GET_PARENT, 0),
        ) == [OK, "EPERM"], kind
    assert guest.ask(
        ("openat", AT_FDCWD, "/proc/1/ns/net", os.O_RDONLY),
        ("ioctl", Result(0), NS_GET_USERNS, 0),
        ("ioctl", Result(1), NS_GET_PARENT, 0),
        ("ioctl", Result(1), NS_GET_USERNS, 0),
    )[2:] == ["EPERM", "EPERM"]
    # "Shocker": the inode number of a root directory, in a handle that nobody gave.
    handle = struct.pack("<IiQ", 8, 1, 2)
    assert guest.ask(
        ("openat", AT_FDCWD, "/", os.O_RDONLY | os.O_DIRECTORY), ("open_by_handle_at", Result(0), handle, os.O_RDONLY)
    ) == [OK, "EPERM"]


def test_a_process_has_no_descriptor_of_the_hosts(guest: Guest) -> None:
    """Mechanism: close_range(2) before the jail is entered; what is left leads into the jail."""
    mounts = {line.split()[0] for line in guest.sh("cat /proc/1/mountinfo").splitlines()}
    script = 'for fd in /proc/1/fd/*; do echo "$(readlink $fd) $(grep mnt_id /proc/1/fdinfo/${fd##*/})"; done'
    files = [line.split() for line in guest.sh(script).splitlines() if line.startswith("/")]
    assert files
    assert not [link for link, _, mount in files if mount not in mounts]
