"""Wall: what of the kernel a guest can reach that has no namespace: sockets that load modules, files of the whole host.

Mechanisms: the seccomp filter's allow list of socket families; masks and read-only mounts in the jail. The masks are in
the guest's own mount namespace: where the host has AppArmor its profile keeps them, elsewhere guest root may unmount
them (docs/security.md).
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from jailmgr.runtime.bundle import FILE_SYSTEMS, MASKED
from tests.security.guest import OK, Guest

FAMILIES = {"unix": 1, "inet": 2, "inet6": 10, "netlink": 16, "packet": 17}
FAMILIES_MAX = 64
PROTOCOLS_REFUSED = {"iscsi": 8, "connector": 11, "scsi": 18, "rdma": 20, "crypto": 21, "smc": 22, "none": 31}
AF_NETLINK, SOCK_RAW, SOCK_STREAM = 16, 3, 1


def test_sockets_of_families_that_no_guest_needs_are_refused(guest: Guest) -> None:
    """Mechanism: seccomp. The kernel would look for a module of each family (net-pf-N), for anybody who asks."""
    others = [family for family in range(FAMILIES_MAX) if family not in FAMILIES.values()]
    asked = guest.ask(*(("socket", family, SOCK_RAW, 0) for family in others))
    asked += guest.ask(*(("socketpair", family, SOCK_STREAM, 0, 0) for family in others))
    assert set(asked) == {"EAFNOSUPPORT"}
    assert guest.ask(*(("socket", family, SOCK_RAW, 0) for family in FAMILIES.values())) == [
        OK, "EPROTONOSUPPORT", "EPROTONOSUPPORT", OK, OK,
    ]  # fmt: skip


def test_netlink_protocols_that_no_guest_needs_are_refused(guest: Guest) -> None:
    """Mechanism: seccomp; net-pf-16-proto-N likewise."""
    asked = guest.ask(*(("socket", AF_NETLINK, SOCK_RAW, number) for number in PROTOCOLS_REFUSED.values()))
    assert dict(zip(PROTOCOLS_REFUSED, asked, strict=True)) == dict.fromkeys(PROTOCOLS_REFUSED, "EPROTONOSUPPORT")
    wanted = (socket.NETLINK_ROUTE, 4, 9, 12, 15, 16)
    assert guest.ask(*(("socket", AF_NETLINK, SOCK_RAW, number) for number in wanted)) == [OK] * len(wanted)


def test_no_pool_no_volume_and_no_disk_of_the_host_is_named(guest: Guest) -> None:
    """Mechanism: masks. Sizes of volumes are in /sys/fs/btrfs, the paths of pools in loop devices' backing_file."""
    backing = Path(f"{guest.jm.root.lib}/pool/default.img")
    if backing.exists():
        shown = [path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
        assert str(backing) in shown, "the host itself does not show it"
    script = """
        find /sys -name backing_file -exec cat {} +
        find /sys -path '*qgroups*' -type f
        find /sys/fs -name 'features' -path '*btrfs*'
        cat /proc/partitions
        ls -A /sys/block /sys/class/block /sys/dev/block /proc/fs | grep -v : """
    said = guest.sh(f"{script}; true")
    assert said.split() == [], said


def test_what_is_masked_is_empty(guest: Guest) -> None:
    """Each path of the list that the kernel has, as the jail shows it: an empty file, or an empty directory.

    AppArmor's profile refuses to list some.
    """
    there = [path for path in MASKED if Path(path).exists()]
    assert {"/sys/devices/virtual/block", "/proc/partitions"} <= set(there)
    looks = "\n".join(f"[ -d {path} ] && ls -A {path} || wc -c <{path}" for path in there)
    shown = guest.sh(f"{{\n{looks}\n}} 2>&1; true").splitlines()
    assert {line for line in shown if not line.endswith("Permission denied")} <= {"0"}


def test_file_systems_of_the_host_are_all_in_the_list(guest: Guest) -> None:
    """What is left of /sys/fs shows no mounted file system: a directory below it would be named for a device."""
    names = set(guest.sh("cd /sys/fs && ls").split())
    shown = {
        name
        for name in names
        if guest.sh(f"find /sys/fs/{name} -mindepth 1 -maxdepth 1 -type d ! -name features | head -1")
    }
    assert shown <= {"cgroup", "fuse"}
    assert set(FILE_SYSTEMS).isdisjoint(shown)


@pytest.mark.parametrize("path", ["/proc/pressure/cpu", "/proc/pressure/memory", "/proc/pressure/io"])
def test_pressure_of_the_host_takes_no_trigger(guest: Guest, path: str) -> None:
    """Mechanism: a read-only mount. A trigger would get a real-time kernel thread (accounting/psi.rst)."""
    if not Path(path).exists():
        pytest.skip("this kernel has no pressure stall information, or it is switched off")
    assert guest.sh(f"cat {path}").startswith("some ")
    assert guest.sh(f"echo 'some 500000 1000000' 2>/dev/null >{path} || echo refused") == "refused\n"
    assert guest.ask(("open", path, 2)) == ["EROFS"]
