"""Wall: system calls that no guest may make.

Mechanism: the seccomp filter of jailmgr/runtime/seccomp.py. These tests try every call of its list as the root of a
real jail. tests/unit/test_seccomp.py tests the filter itself.
"""

from __future__ import annotations

import platform
import socket
import struct
from collections.abc import Callable
from errno import errorcode
from pathlib import Path

import pytest

from jailmgr.runtime import seccomp
from tests.security.guest import OK, Guest, exists
from tests.system.instance import Instance

CLONE_NEWUSER = 0x10000000
PR_SET_SECCOMP, PR_GET_SECCOMP = 22, 21
SECCOMP_SET_MODE_FILTER = 1
PTRACE_TRACEME, PTRACE_O_SUSPEND_SECCOMP = 0, 0x200000

x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the second calling convention is x86's")


ALWAYS = {
    "bpf", "clock_settime", "init_module", "finit_module", "delete_module", "io_uring_setup", "io_uring_enter",
    "kexec_file_load", "open_by_handle_at", "perf_event_open", "swapon", "syslog", "userfaultfd", "kexec_load",
    "add_key", "keyctl", "request_key",
}  # fmt: skip
"""Calls that the list may not lose."""


def refused() -> dict[str, str]:
    """Each call that is refused whatever its arguments, with the errno it gets."""
    return {
        name: errorcode[rule["errnoRet"]]
        for rule in seccomp.default_section()["syscalls"]
        if "args" not in rule
        for name in rule["names"]
        if exists(name)
    }


def test_every_denied_call_is_denied(guest: Guest) -> None:
    expected = refused()
    assert expected.keys() >= ALWAYS
    assert guest.verdicts(*[(name, 0, 0, 0) for name in expected]) == expected


def test_a_nested_user_namespace_changes_nothing(guest: Guest) -> None:
    """Mechanism: a filter is inherited, whatever capabilities the guest's root has in a namespace of its own."""
    expected = refused()
    asked = guest.ask(("unshare", CLONE_NEWUSER), *[(name, 0, 0, 0) for name in expected])
    assert dict(zip(expected, asked[1:], strict=True)) == expected


def test_the_filter_can_not_be_taken_off(guest: Guest) -> None:
    """Mechanism: filters only add up (seccomp(2)); to suspend them takes CAP_SYS_ADMIN of the host's namespace."""
    assert guest.ask(("prctl", PR_SET_SECCOMP, 0), ("prctl", PR_GET_SECCOMP), ("bpf", 0, 0, 0)) == [
        "EINVAL", OK, "EPERM",
    ]  # fmt: skip
    assert guest.ask(("ptrace", 0x4206, 1, 0, PTRACE_O_SUSPEND_SECCOMP)) == ["EPERM"]


def test_sockets_that_know_no_network_namespace(guest: Guest) -> None:
    """AF_ALG and AF_VSOCK lead past the network namespace."""
    for family in (socket.AF_ALG, socket.AF_VSOCK):
        for number in (family, family | 1 << 32):
            assert guest.ask(("socket", number, socket.SOCK_STREAM, 0)) == ["EAFNOSUPPORT"], family
    assert guest.ask(("socket", socket.AF_UNIX, socket.SOCK_STREAM, 0)) == [OK]


def test_nothing_is_typed_into_a_terminal(guest: Guest) -> None:
    """TIOCSTI and TIOCLINUX; with a bit above those that the kernel looks at, too."""
    for command in (0x5412, 0x541C, 0x5412 | 1 << 32):
        assert guest.ask(("ioctl", 0, command, "x")) == ["EPERM"]


@x86_64
def test_32_bit_calls_are_denied_alike(guest: Guest) -> None:
    """By asm/unistd_32.h: init_module, kexec_load, bpf, perf_event_open, open_by_handle_at, syslog; then sockets."""
    assert guest.ask(*[(number, 0, 0, 0) for number in (128, 283, 357, 336, 342, 103)], old=True) == ["EPERM"] * 6
    assert guest.ask((102, 1, 0), (359, 40, 1), (64,), old=True) == ["EAFNOSUPPORT", "EAFNOSUPPORT", OK]


@x86_64
def test_32_bit_programs_have_sockets_by_a_key_of_roots(new_instance: Callable[[], Instance], tmp_path: Path) -> None:
    """socketcall(2) of socket, with its arguments in memory; all other calls are refused as before."""
    guest = Guest(new_instance(), "a", tmp_path)
    guest.jm("launch", "busybox", "a")

    def asked() -> list[str]:
        families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
        calls = [(102, 1, struct.pack("=III", family, socket.SOCK_DGRAM, 0)) for family in families]
        return guest.ask(*calls, old=True)

    assert asked() == ["EAFNOSUPPORT"] * 3
    guest.jm("set", "a", "security.syscalls.allow_socketcall=true")
    guest.jm("restart", "--force", "a")
    assert asked() == [OK] * 3
    assert guest.ask((128, 0, 0, 0), (283, 0, 0, 0), (357, 0, 0, 0), (103, 0, 0, 0), old=True) == ["EPERM"] * 4
    assert guest.ask(("socket", 40, 1, 0), ("socket", 38, 5, 0), ("bpf", 0, 0, 0)) == [
        "EAFNOSUPPORT", "EAFNOSUPPORT", "EPERM",
    ]  # fmt: skip


@x86_64
def test_the_third_calling_convention_is_not_there(guest: Guest) -> None:
    """x32: numbers with bit 30, which a filter that compares 64-bit numbers would miss."""
    assert guest.ask((0x40000000 | 39,), (0x40000000 | 175, 0, 0, 0)) == ["ENOSYS", "ENOSYS"]
