"""Devices of the host in a jail: `unix-char` and `unix-block`, and /dev/fuse with a real file system behind it."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jailmgr.runtime import cgroups, devices
from jailmgr.runtime.devices import Device
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, until
from tests.system.test_cgroups import Jail, jail, v2_jail, without_v1_devices

__all__ = ["jail", "v2_jail"]

LOOP_CONTROL, FUSE = os.makedev(10, 237), os.makedev(10, 229)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A character device's node, of mode 0600, by a link."""
    os.mknod(tmp_path / "node", stat.S_IFCHR | 0o600, LOOP_CONTROL)
    os.symlink("node", tmp_path / "link")
    return tmp_path / "link"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A block device that holds some words."""
    image = tmp_path / "image"
    image.write_bytes(b"words of the disk\n".ljust(1 << 20, b"\0"))
    loop = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=True).stdout
    yield loop.strip()
    subprocess.run(["losetup", "--detach", loop.strip()], check=True)


def test_a_block_device_is_there_as_its_keys_say(jm: Instance, busybox_jail: MakeJail, disk: str) -> None:
    name = busybox_jail(start=False)
    jm("device", "add", name, "data", "unix-block", f"source={disk}", "path=/dev/disk/data", "mode=0440", "gid=1000")
    before = os.stat(disk)
    jm("start", name)
    shown = jm.sh(name, "stat -c '%F %a %u:%g' /dev/disk/data; head -c 18 /dev/disk/data").out
    assert shown == "block special file 440 0:1000\nwords of the disk\n"
    assert jm.sh(name, "echo changed > /dev/disk/data; sync", None).status == 0
    assert Path(disk).read_bytes()[:8] == b"changed\n"
    after = os.stat(disk)
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    listed = jm.json("device", "list", name)["data"]
    assert listed == {"type": "unix-block", "source": disk, "path": "/dev/disk/data", "mode": "0440", "gid": "1000"}


def test_a_device_of_a_running_jail_waits_for_its_next_start(jm: Instance, busybox_jail: MakeJail, node: Path) -> None:
    name = busybox_jail()
    added = jm("device", "add", name, "knob", "unix-char", f"source={node}", "path=/dev/knob", "mode=0600")
    assert f"knob: takes effect at the next start (jailmgr restart {name})" in added.err
    assert jm.sh(name, "test -e /dev/knob", None).status == 1
    jm("restart", "--force", name)
    look = "stat -c '%a %t:%T' /dev/knob; dd if=/dev/knob count=0 2>/dev/null && echo opens"
    assert jm.sh(name, look).out == "600 a:ed\nopens\n"
    # Its numbers are looked up at each start, also at one that no engine takes part in.
    os.unlink(node)
    os.mknod(node, stat.S_IFCHR | 0o600, FUSE)
    boots = jm.info(name)["restarts"]
    jm("engine", "stop")
    jm.sh(name, "kill -TERM 1; reboot -f", None)
    until(lambda: jm.info(name)["restarts"] == boots + 1)
    assert jm.sh(name, look).out == "600 a:e5\nopens\n"
    jm("device", "set", name, "knob", "mode=0606", "path=/dev/fuse")
    jm("restart", "--force", name)
    assert jm.sh(name, "stat -c '%a %t:%T' /dev/fuse; test -e /dev/knob", None).out == "606 a:e5\n"
    jm("device", "remove", name, "knob")
    jm("restart", "--force", name)
    assert jm.sh(name, "stat -c '%a %t:%T' /dev/fuse; test -e /dev/knob", None).out == "666 a:e5\n"


def test_a_device_that_is_gone_is_reported_unless_it_may_be(jm: Instance, busybox_jail: MakeJail, node: Path) -> None:
    name = busybox_jail(start=False)
    jm("device", "add", name, "knob", "unix-char", f"source={node}", "path=/dev/knob")
    os.unlink(node)
    refused = jm.refused("start", name)
    assert f"Error: device {node}: not found on the host" in refused.err
    assert "Hint: Plug it in, load its driver, or set required=false." in refused.err
    assert jm.status(name) == "Stopped"
    jm("device", "set", name, "knob", "required=false")
    jm("start", name)
    assert jm.sh(name, "test -e /dev/knob", None).status == 1
    jm("device", "set", name, "knob", "major=10", "minor=237")
    jm("restart", "--force", name)
    assert jm.sh(name, "stat -c %t:%T /dev/knob").out == "a:ed\n"


def test_what_is_no_device_of_the_host_is_refused(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail(start=False)
    for kind, source, status, why, hint in (
        ("unix-char", "/etc/passwd", 2, "it is not a char device", "Name a device of the host."),
        ("unix-char", "/proc/self/fd", 2, "it is not a char device", "Name a device of the host."),
        ("unix-block", "/dev/zero", 2, "it is a char device of the host", "Its type is unix-char."),
        ("unix-char", "/dev/none", 1, "not found on the host", "Plug it in, load its driver, or set required=false."),
        ("unix-char", "/dev/zero/x", 1, "not found on the host", "Plug it in, load its driver, or set required=false."),
    ):
        refused = jm.refused("device", "add", name, "x", kind, f"source={source}", "path=/dev/x", status=status)
        assert refused.err == f"Error: device {source}: {why}\nHint: {hint}\n"
    assert "x" not in jm.json("device", "list", name)


def test_two_devices_share_no_path(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail(start=False)
    jm("device", "add", name, "a", "unix-char", "source=/dev/kmsg", "path=/dev/x", "required=false")
    refused = jm.refused("device", "add", name, "b", "unix-char", "path=/dev/x", "major=1", "minor=11", status=2)
    assert "device b: /dev/x is device a already" in refused.err
    again = jm.refused("device", "add", name, "a", "unix-char", "path=/dev/y", "major=1", "minor=11")
    assert f"Error: device a: already exists in {name}" in again.err
    assert f"not found in {name}" in jm.refused("device", "remove", name, "b").err


def test_an_owner_that_is_none_of_the_jails_ids_is_refused(jm: Instance, busybox_jail: MakeJail) -> None:
    name = busybox_jail(start=False)
    jm("device", "add", name, "a", "unix-char", "source=/dev/fuse", "path=/dev/x", f"uid={2**32 - 2}")
    assert "is none of the jail's ids" in jm.refused("start", name, status=2).err


def test_the_cgroup_allows_the_devices_that_were_found_and_no_others(jail: Jail) -> None:
    check_rules(jail)


def test_the_cgroup_allows_them_by_bpf(v2_jail: Jail) -> None:
    v2_jail.h = without_v1_devices(v2_jail.h)
    check_rules(v2_jail)


def check_rules(jail: Jail) -> None:
    found = devices.find([Device("/dev/fuse", "c", "/dev/fuse")])
    cgroups.device_rules(jail.h, jail.cgroup, [*cgroups.DEFAULT_DEVICES, *devices.rules(found)])
    program = """
import os, sys
def mark(path):
    try:
        os.close(os.open(path, os.O_RDWR))
    except PermissionError:
        return "-"
    return "+"
print(*(mark(f"/dev/{name}") for name in ("null", "fuse", "net/tun", "loop-control", "loop0")), flush=True)
sys.stdin.read()
"""
    assert jail.said(jail.run(program)).decode() == "+ + - - -"


FUSE_PROGRAMS = ("/usr/bin/fuse-overlayfs", "/usr/bin/fusermount3")


def test_fuse_overlayfs_as_root_and_as_a_user(jm: Instance, busybox_jail: MakeJail) -> None:
    """A user mounts by the set-user-id program fusermount3, which looks into /etc/fuse.conf (mount.fuse3(8))."""
    name = busybox_jail()
    files = {file for path in FUSE_PROGRAMS for file in (path, *libraries(path))}
    packed = subprocess.run(["tar", "-ch", *files], capture_output=True, check=True, cwd="/")
    jm.exec(name, "tar", "-x", "-C", "/", stdin=packed.stdout)
    jm.sh(
        name,
        "chmod 4755 /usr/bin/fusermount3; ln -s /proc/self/mounts /etc/mtab; echo user_allow_other > /etc/fuse.conf; "
        "echo alice:x:1000:1000::/home:/bin/sh >> /etc/passwd; "
        "cd /home; mkdir lower upper work merged; echo below > lower/file; chown -R 1000:1000 .",
    )
    for user in ("alice", "root"):
        jm("exec", "--user", user, name, "--", "fuse-overlayfs", "-o", OPTIONS, "/home/merged")
        shown = jm.sh(
            name, "cd /home; grep -c fuse.fuse-overlayfs /proc/mounts; cat merged/file; echo above > merged/file"
        )
        assert shown.out == "1\nbelow\n"
        script = "cat /home/lower/file /home/upper/file; fusermount3 -u /home/merged; rm -r /home/upper/*"
        assert jm.sh(name, script).out == "below\nabove\n"


OPTIONS = "lowerdir=/home/lower,upperdir=/home/upper,workdir=/home/work,allow_other"


def libraries(program: str) -> list[str]:
    """Paths of the libraries that a program is linked to, its loader among them (ldd(1))."""
    words = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout.split()
    return [word for word in words if word.startswith("/")]
