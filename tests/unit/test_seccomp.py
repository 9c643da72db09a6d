"""The filter, loaded in a child of the test (with no_new_privs, so that no root is needed), and asked by real calls."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import socket
import struct
from collections.abc import Callable

import pytest

from jailmgr.errors import JailmgrError
from jailmgr.runtime import seccomp

libc = ctypes.CDLL(None, use_errno=True)
library = ctypes.CDLL("libseccomp.so.2")
x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86's second and third calling convention")

SET_NO_NEW_PRIVS = 38
FICLONE = 0x40049409
BTRFS_SUBVOL_CREATE_V2 = 0x50009418
TIOCSTI = 0x5412


def call(name: str, *args: int) -> int:
    """errno of a system call by its name, 0 for success."""
    number = library.seccomp_syscall_resolve_name(name.encode())
    assert number >= 0, f"{name} is none of this machine's"
    return call_number(number, *args)


def call_number(number: int, *args: int) -> int:
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(arg) for arg in (*args, 0, 0, 0, 0)[:5]))
    return ctypes.get_errno() if result == -1 else 0


def int80(number: int, first: int = 0, second: int = 0, third: int = 0) -> int:
    """errno of a 32-bit system call from this 64-bit process."""
    code = bytes.fromhex("53 89f8 89f3 87ca cd80 5b c3".replace(" ", ""))
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    entry = ctypes.addressof(ctypes.c_char.from_buffer(page))
    result = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int] * 4)(entry)(number, first, second, third)
    return -result if -4096 < result < 0 else 0


def under_filter(ask: Callable[[], list[int]], raw_volume: bool = False, socketcall: bool = False) -> list[int]:
    """What `ask` returns in a child under the default filter."""
    bpf = seccomp.compile(seccomp.default_section(raw_volume=raw_volume), socketcall)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            seccomp.load(bpf)
            found = ask()
            os.write(write_end, struct.pack(f"{len(found)}i", *found))
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        said = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return list(struct.unpack(f"{len(said) // 4}i", said))


def test_refused_calls_say_not_permitted() -> None:
    names = (
        "kexec_load", "init_module", "finit_module", "delete_module", "open_by_handle_at", "syslog", "bpf",
        "perf_event_open", "userfaultfd", "io_uring_setup", "swapon", "acct", "settimeofday", "clock_settime",
    )  # fmt: skip
    assert dict(zip(names, under_filter(lambda: [call(name) for name in names]), strict=True)) == dict.fromkeys(
        names, errno.EPERM
    )


@x86_64
def test_calls_of_old_kernels_are_not_implemented() -> None:
    # asm/unistd_32.h: sysfs 135; 64-bit arm never had it, nor most of the others.
    assert under_filter(lambda: [call("sysfs"), call("lookup_dcookie"), int80(135)]) == [errno.ENOSYS] * 3


def test_what_a_system_needs_is_let_through() -> None:
    """Each fails, if it does, by its arguments and not by the filter."""

    def ask() -> list[int]:
        unix = socket.socket(socket.AF_UNIX)
        unix.close()
        # clone3 of no size, mount of nothing, unshare and setns of nothing: EINVAL, EFAULT, success, EBADF.
        return [call("clone3"), call("mount"), call("unshare"), call("setns", -1), call("name_to_handle_at", -1)]

    assert under_filter(ask) == [errno.EINVAL, errno.EFAULT, 0, errno.EBADF, errno.EFAULT]


def test_socket_families_without_a_namespace_are_not_supported() -> None:
    high = 1 << 32

    def ask() -> list[int]:
        return [call("socket", family, socket.SOCK_STREAM) for family in (38, 40, high | 38, high | 40, socket.AF_UNIX)]

    assert under_filter(ask) == [errno.EAFNOSUPPORT] * 4 + [0]


FAMILIES = {1: "unix", 2: "inet", 10: "inet6", 16: "netlink", 17: "packet"}
LAST_FAMILY = 63
"""Of those that a kernel may have; linux/socket.h numbers 46 so far."""


def test_only_families_of_the_list_reach_the_kernel() -> None:
    """Each other one by socket and by socketpair, and with a bit that the kernel does not look at."""
    pair = (ctypes.c_int * 2)()
    at = ctypes.addressof(pair)
    others = [family for family in (*range(LAST_FAMILY + 1), 1 << 16, 1 << 31 | 1) if family not in FAMILIES]

    def ask() -> list[int]:
        calls = [call("socket", family, 3) for family in others] + [call("socket", 1 << 32 | n, 3) for n in others]
        return calls + [call("socketpair", family, 1, 0, at) for family in others]

    assert set(under_filter(ask)) == {errno.EAFNOSUPPORT}
    allowed = under_filter(lambda: [call("socket", family, socket.SOCK_RAW) for family in FAMILIES])
    assert errno.EAFNOSUPPORT not in allowed
    # AF_INET has no pairs, and its own word for that.
    assert under_filter(lambda: [call("socketpair", family, 1, 0, at) for family in (1, 2)]) == [0, errno.EOPNOTSUPP]


def test_netlink_protocols_that_no_guest_needs_are_not_supported() -> None:
    """iSCSI, the connector, RDMA, the crypto API and SMC would load modules; those of every system are let through."""
    refused = (8, 11, 20, 21, 22, 31, 1 << 31)
    allowed = (0, 2, 4, 9, 12, 15, 16)

    def ask() -> list[int]:
        return [call("socket", socket.AF_NETLINK, socket.SOCK_RAW, protocol) for protocol in (*refused, *allowed)]

    found = under_filter(ask)
    assert found[: len(refused)] == [errno.EPROTONOSUPPORT] * len(refused)
    assert found[len(refused) :] == [0] * len(allowed)


def test_nothing_is_typed_into_a_terminal() -> None:
    def ask() -> list[int]:
        return [call("ioctl", -1, command) for command in (TIOCSTI, 1 << 32 | TIOCSTI, 0x541C, 0x5401)]

    assert under_filter(ask) == [errno.EPERM, errno.EPERM, errno.EPERM, errno.EBADF]


def test_btrfs_ioctls_of_a_raw_volume() -> None:
    def ask() -> list[int]:
        return [
            call("ioctl", -1, command)
            for command in (BTRFS_SUBVOL_CREATE_V2, 1 << 32 | BTRFS_SUBVOL_CREATE_V2, FICLONE)
        ]

    assert under_filter(ask, raw_volume=True) == [errno.EPERM, errno.EPERM, errno.EBADF]
    assert under_filter(ask) == [errno.EBADF] * 3


def test_btrfs_patterns_leave_out_three_numbers() -> None:
    patterns = seccomp.btrfs_patterns()

    def matches(command: int) -> bool:
        return any(command & mask == value for mask, value in patterns)

    assert [number for number in range(256) if not matches(0x5000_9400 | number)] == [9, 13, 54]
    assert not any(matches(0x5000_0000 | kind << 8 | number) for kind in (0x54, 0x93, 0x95) for number in range(256))


@x86_64
def test_32_bit_calls_are_refused_alike() -> None:
    # asm/unistd_32.h: getppid, init_module, kexec_load, bpf, perf_event_open, open_by_handle_at, syslog, vm86, clone3
    numbers = (64, 128, 283, 357, 336, 342, 103, 166, 435)
    assert under_filter(lambda: [int80(number) for number in numbers]) == [
        0, *[errno.EPERM] * 6, errno.ENOSYS, errno.EINVAL,
    ]  # fmt: skip


@x86_64
def test_32_bit_sockets_are_refused_alike() -> None:
    # asm/unistd_32.h: socket 359, socketcall 102 (linux/net.h: SYS_SOCKET 1, SYS_BIND 2), ioctl 54
    def ask() -> list[int]:
        return [int80(359, 40, 1), int80(359, 1, 1), int80(102, 1), int80(102, 2), int80(54, -1, TIOCSTI)]

    assert under_filter(ask) == [errno.EAFNOSUPPORT, 0, errno.EAFNOSUPPORT, errno.EFAULT, errno.EPERM]


@x86_64
def test_32_bit_sockets_are_let_through_if_asked_for() -> None:
    """Of every family, and nothing else; 64-bit calls are refused as before."""

    def ask() -> list[int]:
        old = [int80(359, 1, 1), int80(102, 1), int80(102, 8), int80(54, -1, TIOCSTI), int80(135), int80(357)]
        return [*old, call("socket", 40, 1), call("bpf"), call_number(0x40000000 | 110)]

    refused = [errno.EPERM, errno.ENOSYS, errno.EPERM, errno.EAFNOSUPPORT, errno.EPERM, errno.ENOSYS]
    assert under_filter(ask, socketcall=True) == [0, errno.EFAULT, errno.EFAULT, *refused]


@x86_64
def test_x32_is_not_there() -> None:
    assert under_filter(lambda: [call_number(0x40000000 | 110), call_number(0x40000000 | 175)]) == [errno.ENOSYS] * 2


def test_a_filter_is_inherited_and_does_not_go_away() -> None:
    def ask() -> list[int]:
        pid = os.fork()
        if pid == 0:
            os._exit(call("bpf"))
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]

    assert under_filter(ask) == [errno.EPERM]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_section_is_oci_and_compiles_for_both_machines(machine: str) -> None:
    section = seccomp.default_section(machine)
    assert section["defaultAction"] == "SCMP_ACT_ALLOW"
    assert len(section["architectures"]) == 2
    assert len(seccomp.compile(section)) % 8 == 0


@pytest.mark.parametrize(
    "change",
    [
        {"defaultAction": "SCMP_ACT_ERRNO"},
        {"architectures": ["SCMP_ARCH_VAX"]},
        {"syscalls": [{"names": ["fly"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]},
        {"syscalls": [{"names": ["bpf"], "action": "SCMP_ACT_KILL"}]},
    ],
)
def test_what_can_not_be_compiled_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(JailmgrError) as caught:
        seccomp.compile(seccomp.default_section() | change)
    assert caught.value.code == "invalid"


@pytest.mark.parametrize("bpf", [b"", b"1234567", bytes(8 * 4097)])
def test_what_is_no_program_is_not_loaded(bpf: bytes) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        seccomp.load(bpf)
