"""Wall: mounts of a jail go nowhere else, though all of them are shared within it (mount_namespaces(7)).

Mechanism: each was private before it was shared, so each peer group began with the one mount in it, and the host's
mounts are gone from the namespace by then. And a wall within the jail: only its root enters the procfs and sysfs
without masks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from jailmgr.runtime.bundle import UNCOVERED
from tests.security.guest import Guest
from tests.system.conftest import MakeJail
from tests.system.instance import Instance

MARK = "guests-own"
"""Source of the file systems that the guest mounts."""


def table(pid: int | str) -> list[str]:
    return Path(f"/proc/{pid}/mountinfo").read_text().splitlines()


def groups(lines: Iterable[str], tag: str = "shared") -> set[int]:
    """The peer groups that mounts are in; with `master` or `propagate_from`, those they receive mounts from."""
    return {int(number) for line in lines for number in re.findall(rf"\b{tag}:(\d+)", line.partition(" - ")[0])}


def test_no_mount_shares_a_peer_group_with_the_host_or_another_jail(jm: Instance, busybox_jail: MakeJail) -> None:
    """Also of a jail that has been rebooted, and of one with another tenant's supervisor as parent."""
    first, second = busybox_jail("--memory", "64MiB"), busybox_jail("-c", "limits.cpu=1")
    jm.sh(second, "reboot -f", status=None)
    jm("exec", first, "--", "true")
    inits = [jm.info(name)["init_pid"] for name in (first, second)]
    tables = [table(init) for init in inits]
    for lines in tables:
        assert len(groups(lines)) == len(lines), "each is shared, and alone in its group"
        assert groups(lines, "master") == groups(lines, "propagate_from") == set()
    outside = {line for pid in ("self", 1, jm.info(first)["supervisor_pid"], jm.engine_pid()) for line in table(pid)}
    assert not groups(outside) & (groups(tables[0]) | groups(tables[1]))
    assert not groups(tables[0]) & groups(tables[1])


def test_what_a_guest_mounts_and_unmounts_stays_in_its_jail(guest: Guest, busybox_jail: MakeJail) -> None:
    """On each of its mounts, on devices of the host's, lxcfs' files and in namespaces that share its tree."""
    other = busybox_jail()
    null = os.stat("/dev/null").st_rdev
    init = guest.jm.info(guest.jail)["init_pid"]
    points = sorted({line.split()[4] for line in table(init)} - {"/"}, reverse=True)
    here = [(pid, table(pid)) for pid in (1, guest.jm.info(other)["init_pid"], guest.jm.engine_pid())]
    script = f"""
        mount --make-rshared /
        mkdir -p /root/d; mount -t tmpfs {MARK} /root/d; echo x >/root/d/f
        for point in {" ".join(points)}; do
            if [ -d $point ]; then unshare -m --propagation shared mount -t tmpfs {MARK} $point
            else mount --bind /root/d/f $point; fi
        done"""
    guest.sh(script, status=None)
    mounted = {line.split()[4] for line in table(init) if f" - tmpfs {MARK} " in line}
    assert set(points) <= mounted, "in the jail they are all there"
    guest.sh("umount -l /dev/null /proc/meminfo /sys/fs/cgroup /dev/pts /; true", status=None)
    for pid, before in here:
        after = table(pid)
        assert not [line for line in after if MARK in line]
        assert len([line for line in before if "/dev" in line]) <= len([line for line in after if "/dev" in line])
    assert os.stat("/dev/null").st_rdev == null
    assert guest.jm.sh(other, "echo x >/dev/null; head -n 1 /proc/meminfo; ls /sys/fs/cgroup").out


def test_users_of_a_jail_do_not_enter_what_has_no_masks(jm: Instance, busybox_jail: MakeJail) -> None:
    """Neither directly nor in namespaces of their own. Mechanism: a directory of the jail's root, mode 0700."""
    name = busybox_jail()
    assert jm.sh(name, f"ls {UNCOVERED} {UNCOVERED}/proc/1/comm").out.split()[-2:] == ["proc", "sys"]
    for enter in ("", "unshare -Ur ", "unshare -Urm "):
        tries = f"for each in . proc proc/1 proc/keys sys sys/class/block; do {enter}ls {UNCOVERED}/$each; done"
        assert jm("exec", name, "-u", "1000:1000", "--", "sh", "-c", tries, status=None).out == ""
    copied = f"unshare -Urm sh -c 'mount --rbind {UNCOVERED}/proc /mnt || mount --rbind / /mnt; ls /mnt{UNCOVERED}'"
    assert jm("exec", name, "-u", "1000:1000", "--", "sh", "-c", copied, status=None).out == ""
