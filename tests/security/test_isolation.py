"""Guest root is hostile: what it can't see, reach, use up or change."""

from __future__ import annotations

import array
import fcntl
import os
import stat
from itertools import pairwise

import pytest

from jailmgr.keys import IDS
from tests.system.conftest import MakeJail
from tests.system.instance import Instance, alive

NS_GET_OWNER_UID = 0xB704
"""ioctl_ns(2)."""
BACKGROUND = "</dev/null >/dev/null 2>&1 &"
RAISED = {
    "CAP_SYS_MODULE": 16,
    "CAP_SYS_RAWIO": 17,
    "CAP_SYS_TIME": 25,
}


@pytest.fixture
def jail(busybox_jail: MakeJail) -> str:
    return busybox_jail()


def uid_map(jm: Instance, name: str) -> tuple[int, int, int]:
    with open(f"/proc/{jm.info(name)['init_pid']}/uid_map", encoding="ascii") as file:
        (line,) = file.read().splitlines()
    inner, outer, count = (int(word) for word in line.split())
    return inner, outer, count


def owner_of_userns(jm: Instance, name: str) -> int:
    fd = os.open(f"/proc/{jm.info(name)['init_pid']}/ns/user", os.O_RDONLY)
    try:
        uid = array.array("I", [0])
        fcntl.ioctl(fd, NS_GET_OWNER_UID, uid)
        return uid[0]
    finally:
        os.close(fd)


def test_no_two_jails_have_an_id_in_common(jm: Instance, busybox_jail: MakeJail, other_tenant: str) -> None:
    names = [busybox_jail(), busybox_jail(), f"{other_tenant}/third"]
    jm("launch", "busybox", names[-1])
    ranges = sorted(uid_map(jm, name)[1:] for name in names)
    for (base, count), (after, _) in pairwise(ranges):
        assert count == IDS
        assert base + count <= after
    owners = [owner_of_userns(jm, name) for name in names]
    assert owners[0] == owners[1] != owners[2]
    for owner in owners:
        assert owner != 0
        assert not any(base <= owner < base + count for base, count in ranges)


def test_the_range_survives_a_restart(jm: Instance, jail: str) -> None:
    before = uid_map(jm, jail)
    jm("restart", "--force", jail)
    assert uid_map(jm, jail) == before


def test_the_pool_is_closed_to_everyone_else(jm: Instance, jail: str) -> None:
    above = os.stat(os.path.dirname(jm.root.pool))
    assert stat.S_IMODE(above.st_mode) == 0o700
    assert above.st_uid == 0
    assert stat.S_IMODE(os.stat(jm.root.run).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(jm.root.socket).st_mode) == 0o600
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        (pool,) = [line for line in file if line.split()[4] == jm.root.pool]
    assert {"nosuid", "nodev"} <= set(pool.split()[5].split(","))
    jm.sh(jail, "cp /bin/busybox /root/suid; chmod 4755 /root/suid")
    assert os.stat(f"/proc/{jm.info(jail)['init_pid']}/root/root/suid").st_uid == uid_map(jm, jail)[1]


def test_the_hosts_files_are_not_in_sight(jm: Instance, jail: str) -> None:
    mounts = [line.split() for line in jm.exec(jail, "cat", "/proc/self/mountinfo").out.splitlines()]
    assert not [fields for fields in mounts if jm.root.at in fields[3]]
    assert not [fields for fields in mounts if fields[fields.index("-") + 1] in ("ext4", "xfs", "btrfs")]
    jm.exec(jail, "ls", jm.root.at, status=1)
    assert jm.exec(jail, "ls", "/").out.split() == sorted(jm.exec(jail, "ls", "/proc/1/root/").out.split())


def test_devices(jm: Instance, jail: str) -> None:
    names = set(jm.exec(jail, "ls", "/dev").out.split())
    assert names == {
        "null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts", "shm", "mqueue",
        "fd", "stdin", "stdout", "stderr", "fuse", "net",
    }  # fmt: skip
    assert jm.exec(jail, "ls", "/dev/net").out == "tun\n"
    jm.sh(jail, "mknod /root/disk b 254 0 2>/dev/null && cat /root/disk", status=1)
    jm.sh(jail, "mknod /root/mem c 1 1 2>/dev/null && head -c 1 /root/mem", status=1)
    jm.sh(jail, "head -c 16 /dev/urandom | wc -c; echo x > /dev/null")


def test_capabilities_and_seccomp(jm: Instance, jail: str) -> None:
    status = dict(
        line.split(":\t", 1) for line in jm.exec(jail, "cat", "/proc/1/status").out.splitlines() if ":\t" in line
    )
    bounding = int(status["CapBnd"], 16)
    for name, number in RAISED.items():
        assert not bounding >> number & 1, name
    assert bounding >> 22 & 1, "CAP_SYS_BOOT tells a reboot from a poweroff"
    assert int(status["CapAmb"], 16) == 0
    assert status["Seccomp"].strip() == "2"


@pytest.mark.parametrize(
    "script",
    [
        "echo h > /proc/sysrq-trigger",
        "rewrite /proc/sys/kernel/panic",
        "rewrite /proc/sys/kernel/core_pattern",
        "rewrite /proc/sys/fs/inotify/max_user_instances",
        "rewrite /sys/kernel/mm/transparent_hugepage/enabled",
        "cat /proc/kcore | head -c 1 | grep -q .",
        "mount -t ext4 /dev/vda /mnt",
        "mount -t cgroup -o memory none /mnt && echo -1 > /mnt/memory.limit_in_bytes",
        "mount -t cgroup -o pids none /mnt && mkdir /mnt/mine",
        "! date -s @$(date +%s) 2>&1 | grep -q 'not permitted'",
        "insmod /root/none.ko",
        "dmesg",
        "swapon /root/none",
    ],
)
def test_what_guest_root_may_not(jm: Instance, jail: str, script: str) -> None:
    rewrite = 'rewrite() { was=$(cat "$1"); echo "$was" > "$1"; }'
    assert jm.sh(jail, f"{rewrite}; ( {script} ) >/dev/null 2>&1 && echo done || true").out == ""


def test_own_cgroup_only(jm: Instance, jail: str) -> None:
    assert "0::/" in jm.exec(jail, "cat", "/proc/1/cgroup").out.splitlines()
    assert jm.root.cgroup not in jm.exec(jail, "ls", "/sys/fs/cgroup").out
    jm.sh(jail, "mkdir /sys/fs/cgroup/mine && rmdir /sys/fs/cgroup/mine")
    jm.sh(jail, "echo 0 > /sys/fs/cgroup/cgroup.freeze", status=1)


def test_own_processes_only(jm: Instance, jail: str) -> None:
    pids = [int(word) for word in jm.sh(jail, "ls /proc").out.split() if word.isdigit()]
    assert 1 in pids
    assert max(pids) < 200
    before = os.getpid()
    jm.sh(jail, "kill -9 -1", status=None)
    assert alive(before)


def test_a_guest_cannot_end_what_watches_it(jm: Instance, jail: str) -> None:
    info = jm.info(jail)
    jm.sh(jail, f"kill -9 {info['supervisor_pid']} {jm.engine_pid()}", status=None)
    assert alive(info["supervisor_pid"])


def test_nested_user_namespaces_work(jm: Instance, jail: str) -> None:
    assert jm.exec(jail, "unshare", "-U", "-r", "id", "-u").out == "0\n"
