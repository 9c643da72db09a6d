"""Wall: rights over the whole host. What holds: the bounding set (capabilities(7)), and the kernel's own questions,
which it asks of the host's user namespace where the thing is the host's.
"""

from __future__ import annotations

import struct

from jailmgr.runtime.capabilities import BOUNDING, NAMES, mask
from tests.security.guest import OK, Guest

CLONE_NEWUSER = 0x10000000
PR_CAPBSET_READ, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 23, 47, 2
VERSION_3 = 0x20080522
SYSLOG_READ_ALL, RB_AUTOBOOT = 3, 0x01234567
RLIMIT_NOFILE = 7


def dropped() -> list[int]:
    return [number for number, name in enumerate(NAMES) if name not in BOUNDING]


def test_the_bounding_set_of_all_is_the_lists(guest: Guest) -> None:
    """Of init, of a program that is exec'd, and of what either begins."""
    script = "grep -h ^CapBnd /proc/1/status /proc/self/status; sh -c 'grep -h ^CapBnd /proc/self/status'"
    assert {int(line.split()[1], 16) for line in guest.sh(script).splitlines()} == {mask(BOUNDING)}


def test_a_capability_that_was_dropped_does_not_come_back(guest: Guest) -> None:
    """By capset(2), by the ambient set, or by a program with file capabilities."""
    header = struct.pack("<Ii", VERSION_3, 0)
    for number in dropped():
        bits = mask(BOUNDING) | 1 << number
        low, high = bits & 0xFFFFFFFF, bits >> 32
        data = struct.pack("<6I", low, low, 0, high, high, 0)
        raised = ("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0)
        assert guest.ask(("capset", header, data), raised) == ["EPERM", "EPERM"], NAMES[number]
    everything = struct.pack("<5I", 0x02000001, 0xFFFFFFFF, 0, 0x1FF, 0)
    guest.sh("cp /bin/busybox /root/all")
    assert guest.ask(("setxattr", "/root/all", "security.capability", everything, len(everything), 0)) == [OK]
    shown = guest.sh("/root/all cat /proc/self/status; echo $?", status=None)
    granted = [int(line.split()[1], 16) for line in shown.splitlines() if line.startswith("CapPrm")]
    assert granted in ([], [mask(BOUNDING)]), "not at all, or what may be had"


def test_root_of_a_nested_namespace_has_no_right_over_the_host(guest: Guest) -> None:
    """It has all capabilities there, also those dropped here. The clock, names of the jail's own namespace, raw I/O,
    kernel modules and the log are not asked of that namespace.
    """
    unshare = ("unshare", CLONE_NEWUSER)
    assert guest.ask(unshare, ("sethostname", "mine", 4)) == [OK, "EPERM"], "the jail's, of its outer namespace"
    assert guest.ask(unshare, ("clock_settime", 0, bytes(16)), ("adjtimex", struct.pack("<Q", 1) + bytes(200)))[1:] == [
        "EPERM", "EPERM",
    ]  # fmt: skip
    assert guest.ask(unshare, ("reboot", 0xFEE1DEAD, 672274793, RB_AUTOBOOT, 0))[1:] == ["EPERM"]
    assert guest.ask(unshare, ("mount", "none", "/mnt", "tmpfs", 0, 0))[1:] == ["EPERM"], "the mounts are the jail's"
    assert guest.ask(unshare, ("setpriority", 0, 0, -5))[1:] == ["EACCES"]


def test_what_the_kernel_asks_the_hosts_namespace_for(guest: Guest) -> None:
    """Mechanism: capable() and not ns_capable(): rights that no user namespace gives."""
    assert guest.ask(("setpriority", 0, 0, -20)) == ["EACCES"]
    assert guest.ask(("sched_setscheduler", 0, 1, struct.pack("<i", 50))) == ["EPERM"], "real-time"
    assert guest.ask(("quotactl", 0x800001 << 8, "/dev/root", 0, 0)) != [OK]
    assert guest.ask(("mlockall", 3), ("setrlimit", RLIMIT_NOFILE, struct.pack("<QQ", 1 << 21, 1 << 21)))[1] == "EPERM"
    assert guest.ask(("vhangup",))[0] in (OK, "EPERM")
