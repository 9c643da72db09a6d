"""Walls: the clock, the names and the keys of the host.

Mechanism: seccomp and the dropped CAP_SYS_TIME; uts and time namespaces; a new session keyring for each program, and
user keyrings for each user namespace (keyrings(7)).
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jailmgr.runtime.syscalls import libc, number
from tests.security.guest import OK, Buffer, Guest
from tests.system.conftest import MakeJail
from tests.system.instance import Instance

CLONE_NEWUSER, CLONE_NEWTIME = 0x10000000, 0x80
CLOCK_REALTIME, ADJ_OFFSET = 0, 1
ALLOW = "security.syscalls.allow_keyctl"
KEYCTL_READ, KEYCTL_LINK, KEYCTL_SEARCH, KEYCTL_DESCRIBE, KEYCTL_GET_PERSISTENT, KEYCTL_CHOWN, KEYCTL_REVOKE = (
    11, 8, 10, 6, 22, 4, 3,
)  # fmt: skip
KEYCTL_JOIN = 1
SESSION, USER, USER_SESSION = -3, -4, -5
SECRET = "jailmgr-secret"


def test_the_clock_can_not_be_set(guest: Guest) -> None:
    """Mechanism: seccomp refuses to set it, adjtimex(2) takes CAP_SYS_TIME of the host's namespace."""
    before = time.time() - time.monotonic()
    asked = guest.ask(
        ("clock_settime", CLOCK_REALTIME, bytes(16)),
        ("settimeofday", bytes(16), 0),
        ("adjtimex", struct.pack("<Qq", ADJ_OFFSET, 1000) + bytes(200)),
        ("clock_adjtime", CLOCK_REALTIME, struct.pack("<Qq", ADJ_OFFSET, 1000) + bytes(200)),
    )
    assert asked == ["EPERM"] * 4
    guest.sh("date -s @1 2>/dev/null; hwclock -w 2>/dev/null", status=None)
    assert abs(time.time() - time.monotonic() - before) < 1


def test_its_uptime_is_its_own(guest: Guest) -> None:
    """Mechanism: a time namespace, whose offsets are written before the first process is in it."""
    assert guest.sh("echo 'monotonic 1000 0' 2>/dev/null >/proc/self/timens_offsets || echo refused") == "refused\n"
    with open("/proc/uptime", encoding="ascii") as file:
        assert float(file.read().split()[0]) > float(guest.sh("cut -d' ' -f1 /proc/uptime"))


def test_names_are_its_own(guest: Guest) -> None:
    """Mechanism: a uts namespace."""
    before = os.uname()
    assert guest.ask(("sethostname", "guests-own", 10), ("setdomainname", "own.example", 11)) == [OK, OK]
    assert guest.sh("hostname") == "guests-own\n"
    assert os.uname() == before
    assert socket.gethostname() != "guests-own"


def test_a_reboot_ends_the_jail_alone(jm: Instance, busybox_jail: MakeJail, guest: Guest) -> None:
    """Mechanism: reboot(2) in a pid namespace ends its init; ctrl-alt-del and kexec are refused."""
    jail = busybox_jail()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    magic = (0xFEE1DEAD, 672274793)
    for command in (0x89ABCDEF, 0, 0x45584543, 0xD000FCE2):  # CAD_ON, CAD_OFF, KEXEC, SW_SUSPEND
        assert guest.ask(("reboot", *magic, command, 0)) == ["EINVAL"], hex(command)
    jm.sh(jail, "poweroff -f", status=None)
    assert Path("/proc/sys/kernel/random/boot_id").read_text() == boot
    assert guest.jm.status(guest.jail) == "Running"


@contextmanager
def host_key() -> Iterator[int]:
    """A key of the host's root in its user keyring; its number."""
    call = libc.syscall
    key = int(call(number("keyctl") - 2, b"user", SECRET.encode(), b"of the host", 11, USER))
    assert key > 0, "add_key"
    try:
        yield key
    finally:
        call(number("keyctl"), KEYCTL_REVOKE, key)


@pytest.fixture
def needs_keyrings() -> None:
    if not Path("/proc/keys").exists():
        pytest.skip("the kernel has no keyrings")


def allow(jm: Instance, jail: str) -> None:
    jm("set", jail, f"{ALLOW}=true")
    jm("restart", "--force", jail)


@pytest.fixture
def holder(new_instance: Callable[[], Instance], tmp_path: Path) -> Guest:
    """A jail that may have keys."""
    found = Guest(new_instance(), "holder", tmp_path)
    found.jm("launch", "busybox", "holder")
    allow(found.jm, "holder")
    return found


def test_a_jail_has_no_keys(guest: Guest) -> None:
    """They are in no memory limit. Mechanism: seccomp; programs take it for a kernel without keyrings."""
    calls = ("keyctl", KEYCTL_JOIN, 0), ("add_key", "user", "a", "b", 1, SESSION), ("request_key", "user", "a", 0, 0)
    assert guest.ask(*calls) == ["ENOSYS"] * 3
    if os.uname().machine == "x86_64":  # asm/unistd_32.h
        assert guest.ask((286, 0, 0, 0, 0), (287, 0, 0, 0), (288, 0, 0), old=True) == ["ENOSYS"] * 3


@pytest.mark.usefixtures("needs_keyrings")
def test_keys_of_the_host_are_not_there(holder: Guest) -> None:
    """Mechanism: a session keyring made before the exec, so that the caller's, which would give possession, isn't
    inherited; a key's owner has no id in the jail.
    """
    with host_key() as key:
        for call in (KEYCTL_READ, KEYCTL_DESCRIBE):
            assert holder.ask(("keyctl", call, key, Buffer(100), 100)) == ["EACCES"]
        assert holder.ask(("keyctl", KEYCTL_LINK, key, SESSION)) == ["EACCES"]
        assert holder.ask(("keyctl", KEYCTL_CHOWN, key, 0, 0))[0] in ("EACCES", "EPERM")
        assert holder.ask(("keyctl", KEYCTL_REVOKE, key)) == ["EACCES"]
        for ring in (SESSION, USER, USER_SESSION):
            assert holder.ask(("keyctl", KEYCTL_SEARCH, ring, "user", SECRET, 0)) == ["ENOKEY"], ring
        assert holder.ask(("request_key", "user", SECRET, 0, 0)) == ["ENOKEY"]
        assert SECRET not in holder.sh(
            "cat /proc/keys 2>/dev/null; umount /proc/keys 2>/dev/null; cat /proc/keys", None
        )
        nested = holder.ask(("unshare", CLONE_NEWUSER), ("keyctl", KEYCTL_READ, key, Buffer(100), 100))
        assert nested == [OK, "EACCES"]
        for uid in (0, 65535):
            assert holder.ask(("keyctl", KEYCTL_GET_PERSISTENT, uid, SESSION))[0] in (OK, "EOPNOTSUPP", "EPERM")
        persistent = holder.ask(
            ("keyctl", KEYCTL_GET_PERSISTENT, 0, SESSION), ("keyctl", KEYCTL_SEARCH, SESSION, "user", SECRET, 0)
        )
        assert persistent[1] == "ENOKEY"


@pytest.mark.usefixtures("needs_keyrings")
def test_the_callers_session_keyring_is_not_inherited(new_instance: Callable[[], Instance], guest: Guest) -> None:
    """A caller with a key in its session keyring starts the engine, and that the supervisor and the jail.

    Mechanism: each program in a jail starts with a new session keyring (KEYCTL_JOIN_SESSION_KEYRING): possession of a
    key would give all rights to it, whoever owns it.
    """
    instance = new_instance()

    def with_a_key() -> None:
        assert libc.syscall(number("keyctl"), KEYCTL_JOIN, None) > 0
        assert libc.syscall(number("keyctl") - 2, b"user", SECRET.encode(), b"of the caller", 13, SESSION) > 0

    with instance.popen("launch", "busybox", "keyless", preexec_fn=with_a_key, stdout=subprocess.DEVNULL) as launch:
        assert launch.wait(60) == 0
    allow(instance, "keyless")
    keyless = Guest(instance, "keyless", guest.programs)
    assert keyless.ask(("keyctl", KEYCTL_SEARCH, SESSION, "user", SECRET, 0)) == ["ENOKEY"]


@pytest.mark.usefixtures("needs_keyrings")
def test_keys_of_another_jail_are_not_there(holder: Guest) -> None:
    """Mechanism: another jail's keys are owned by ids of its own range, in keyrings of its own user namespace."""
    other = Guest(holder.jm, "other", holder.programs)
    other.jm("launch", "busybox", "other")
    allow(other.jm, "other")
    said = other.run("ask", stdin=f"{number('keyctl') - 2} s:user s:{SECRET} s:of-another-jail 15 {USER}\n")
    key = int(said.split()[0])
    assert key > 0
    assert other.ask(("keyctl", KEYCTL_SEARCH, USER, "user", SECRET, 0)) == [OK], "its own"
    for call in (KEYCTL_READ, KEYCTL_DESCRIBE, KEYCTL_REVOKE):
        assert holder.ask(("keyctl", call, key, Buffer(100), 100)) == ["EACCES"]
    assert holder.ask(("keyctl", KEYCTL_SEARCH, USER, "user", SECRET, 0)) == ["ENOKEY"]
