"""The system calls a jail may not make: an OCI `linux.seccomp` section, compiled to BPF once and loaded by each start.

It is a deny list, as LXC has one: a guest is a whole system, and its user namespace keeps it from most. Here is what
reaches past the namespaces (the kernel's log, vsock), what the kernel refuses to anyone but the host's root (a second
wall), and what is known best for its holes. Only socket families are an allow list, because each socket of another one
may load a module into the host's kernel. Sources: seccomp(2), OCI's config-linux.md, libseccomp's manuals.

Programs get the errno they are ready for: EPERM where the kernel would say so to the unprivileged, ENOSYS for what
newer kernels have no more, EAFNOSUPPORT for socket families. clone3, unshare and mount are let through: the flags of
clone3 are behind a pointer, and nested containers need them.

Importing costs nothing; libseccomp is opened by `compile`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from typing import Any

from jailmgr.errors import JailmgrError
from jailmgr.runtime.syscalls import libc

_NOT_PERMITTED = (
    # A kernel of one's own choice.
    "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module",
    # Files of the host by handle, past the mount namespace ("shocker"); name_to_handle_at stays, systemd needs it.
    "open_by_handle_at",
    # The host's log, with what it tells of other tenants.
    "syslog",
    # Large, young, and behind most local exploits of late. Those who use io_uring have a way without.
    "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register",
    # Of the whole host, and refused by the kernel too.
    "acct", "swapon", "swapoff", "settimeofday", "stime", "clock_settime", "clock_settime64",
    "ioperm", "iopl", "pciconfig_iobase", "pciconfig_read", "pciconfig_write",
)  # fmt: skip

_NOT_IMPLEMENTED = (
    "_sysctl", "create_module", "get_kernel_syms", "lookup_dcookie", "nfsservctl", "query_module", "sysfs", "uselib",
    "vm86", "vm86old",
)  # fmt: skip

_KEYRINGS = ("add_key", "keyctl", "request_key")
"""Keys are bounded for each id and counted in no memory limit (keyrings(7)); a jail has a million ids. Programs know
kernels without CONFIG_KEYS, hence ENOSYS."""

_FAMILIES = (1, 2, 10, 16, 17)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK and AF_PACKET (linux/socket.h); DHCP clients and servers need the last.

A socket of any other family has the kernel load the family's module, where the host has one (net-pf-N in net/socket.c),
for anybody. AF_ALG wrote to page cache that jails of one image share (CVE-2026-31431). AF_VSOCK has no network
namespace, and reaches the hypervisor, the host and the jails of others."""
_NETLINK = (0, 2, 4, 6, 9, 12, 15, 16)
"""ROUTE, USERSOCK, SOCK_DIAG, XFRM, AUDIT, NETFILTER, KOBJECT_UEVENT and GENERIC (linux/netlink.h). The others have
modules too (net-pf-16-proto-N), and no network namespace or no user in a jail: iSCSI, RDMA, the crypto API."""
_AF_NETLINK = 16
_FAMILY_BITS, _NETLINK_BITS = 8, 6
"""Higher numbers the kernel refuses by itself, in the same words and before it looks for a module: it has 46 families
(AF_MAX) and 32 netlink protocols (MAX_LINKS). A filter that tests all 32 bits has 490 instructions, this one 196."""

_TTY_IOCTLS = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX, which type into a terminal (CVE-2017-5226, CVE-2023-28100); alike on the machines below."""

_BTRFS_TYPE = 0x94
_BTRFS_ALLOWED = (9, 13, 54)
"""FICLONE, FICLONERANGE, FIDEDUPERANGE."""

_ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}
"""What a kernel of this machine runs. Calls of others, x32 too, are answered with ENOSYS."""

_ARCH_TOKENS = {
    "SCMP_ARCH_X86": 0x40000003,
    "SCMP_ARCH_X86_64": 0xC000003E,
    "SCMP_ARCH_ARM": 0x40000028,
    "SCMP_ARCH_AARCH64": 0xC00000B7,
}
"""AUDIT_ARCH_* of linux/audit.h."""

_SOCKETCALL = "SCMP_ARCH_X86"
"""Where glibc makes sockets by socketcall(2)."""
_OF_SOCKETS = frozenset({"socket", "socketpair"})

_ACT_ALLOW = 0x7FFF0000
_ACT_ERRNO = 0x00050000
_FLTATR_ACT_BADARCH = 2
_CMP_MASKED_EQ = 7
_INT = 0xFFFFFFFF
"""The kernel looks at the low half of an int argument only: a test of all 64 bits is passed by setting one above."""
_UNKNOWN = -1
"""__NR_SCMP_ERROR."""

_PR_SET_SECCOMP = 22
_MODE_FILTER = 2
_MOST_INSTRUCTIONS = 4096
_INSTRUCTION_BYTES = 8


def default_section(machine: str = "", raw_volume: bool = False, keyctl: bool = False) -> dict[str, Any]:
    """A system container's section for `machine` (as uname(2) says it; empty: this one).

    `raw_volume`: the jail writes to the volume itself and not through an overlay, so that btrfs ioctls are refused: by
    them a subvolume can leave its quota group (BTRFS_IOC_SUBVOL_CREATE_V2). `keyctl`: the jail may have kernel keys.

    32-bit x86 programs that make sockets by socketcall(2) can make none, since its family is behind a pointer and
    libseccomp refuses it whole (`compile` has a way past it); glibc's do so, direct calls (Go, musl) are not touched.
    """
    machine = machine or os.uname().machine
    calls: list[dict[str, Any]] = [
        _refuse(list(_NOT_PERMITTED), errno.EPERM),
        _refuse(list(_NOT_IMPLEMENTED), errno.ENOSYS),
        *(
            _refuse(["socket", "socketpair"], errno.EAFNOSUPPORT, (0, *other))
            for other in all_but(_FAMILIES, _FAMILY_BITS)
        ),
        *(
            _refuse(["socket"], errno.EPROTONOSUPPORT, (0, _INT, _AF_NETLINK), (2, *other))
            for other in all_but(_NETLINK, _NETLINK_BITS)
        ),
        *(_refuse(["ioctl"], errno.EPERM, (1, _INT, number)) for number in _TTY_IOCTLS),
    ]
    if not keyctl:
        calls.append(_refuse(list(_KEYRINGS), errno.ENOSYS))
    if raw_volume:
        calls += [_refuse(["ioctl"], errno.EPERM, (1, mask, value)) for mask, value in btrfs_patterns()]
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": list(_ARCHITECTURES.get(machine, ())),
        "syscalls": calls,
    }


def _refuse(names: list[str], number: int, *tests: tuple[int, int, int]) -> dict[str, Any]:
    """A rule of the section; a test is the argument's index, a mask, and what the masked argument is."""
    rule: dict[str, Any] = {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": number}
    if tests:
        rule["args"] = [
            {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
            for index, mask, value in tests
        ]
    return rule


def all_but(allowed: Iterable[int], bits: int) -> list[tuple[int, int]]:
    """Masks and values that, taken together, match every number of so many bits but the allowed ones.

    A filter that allows by default has no exceptions to a rule, so the numbers in between are cut into patterns: at
    each bit, those that no longer agree with an allowed number are done with.
    """
    found: list[tuple[int, int]] = []
    left: dict[int, tuple[int, ...]] = {0: tuple(allowed)}
    mask = 0
    for bit in (1 << place for place in range(bits - 1, -1, -1)):
        split: dict[int, tuple[int, ...]] = {}
        mask |= bit
        for value, agreed in left.items():
            for side in (value, value | bit):
                agreeing = tuple(number for number in agreed if number & bit == side & bit)
                if agreeing:
                    split[side] = agreeing
                else:
                    found.append((mask, side))
        left = split
    return found


def btrfs_patterns() -> list[tuple[int, int]]:
    """`all_but` for the ioctl numbers of btrfs."""
    return [(0xFF00 | mask, _BTRFS_TYPE << 8 | value) for mask, value in all_but(_BTRFS_ALLOWED, 8)]


class _Test(ctypes.Structure):
    """struct scmp_arg_cmp, seccomp.h."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise JailmgrError(
            "seccomp filter", "libseccomp is not installed", "apt install libseccomp2", "unavailable"
        ) from error
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_arch_native.restype = ctypes.c_uint32
    return library


def compile(section: dict[str, Any], socketcall: bool = False) -> bytes:  # noqa: A001 - the word of seccomp's manuals
    """The section as BPF for `load`, for this machine and the architectures named in it; 10 ms or so, worth keeping.

    `socketcall`: 32-bit x86 programs may make sockets of every family. libseccomp takes a rule for socket(2) as one for
    socketcall(2) too and can't refuse a family of it alone, so such rules are left out for that architecture.

    Takes what `default_section` makes: everything is allowed but what rules with SCMP_ACT_ERRNO refuse, arguments are
    tested by SCMP_CMP_MASKED_EQ. Raises JailmgrError: `invalid` on anything else, `unavailable` without libseccomp 2.5.
    """
    library = _library()
    if section["defaultAction"] != "SCMP_ACT_ALLOW":
        raise _invalid(f"default action {section['defaultAction']}")
    for name in section["architectures"]:
        if name not in _ARCH_TOKENS:
            raise _invalid(f"architecture {name}")
    apart = [name for name in section["architectures"] if socketcall and name == _SOCKETCALL]
    context = _context(library, [name for name in section["architectures"] if name not in apart])
    try:
        for rule in section["syscalls"]:
            _add(library, context, rule)
        if apart:
            other = _context(library, apart, native=False)
            for rule in section["syscalls"]:
                if not _OF_SOCKETS.issuperset(rule["names"]):
                    _add(library, other, rule)
            _call(library.seccomp_merge(context, other), "merging architectures")  # `other` is part of it from here on
        return _export(library, context)
    finally:
        library.seccomp_release(context)


def _context(library: ctypes.CDLL, architectures: list[str], native: bool = True) -> ctypes.c_void_p:
    """A filter without rules for these architectures, and for this machine's own where it is `native`."""
    context = ctypes.c_void_p(library.seccomp_init(_ACT_ALLOW))
    if context.value is None:
        raise JailmgrError("seccomp filter", "seccomp_init failed")
    _call(library.seccomp_attr_set(context, _FLTATR_ACT_BADARCH, _ACT_ERRNO | errno.ENOSYS), "bad architectures")
    for name in architectures:
        _call(library.seccomp_arch_add(context, ctypes.c_uint32(_ARCH_TOKENS[name])), name, errno.EEXIST)
    if not native:
        _call(library.seccomp_arch_remove(context, ctypes.c_uint32(library.seccomp_arch_native())), "architectures")
    return context


def _invalid(what: str) -> JailmgrError:
    return JailmgrError("seccomp filter", f"{what} is not understood", "", "invalid")


def _call(result: int, what: str, fine: int = 0) -> None:
    """libseccomp returns negative error numbers."""
    if result < 0 and -result != fine:
        raise JailmgrError("seccomp filter", f"{what}: {os.strerror(-result)}")


def _add(library: ctypes.CDLL, context: ctypes.c_void_p, rule: dict[str, Any]) -> None:
    if rule["action"] != "SCMP_ACT_ERRNO":
        raise _invalid(f"action {rule['action']}")
    tests = rule.get("args", [])
    for test in tests:
        if test["op"] != "SCMP_CMP_MASKED_EQ":
            raise _invalid(f"operator {test['op']}")
    array = (_Test * len(tests))(*(_Test(t["index"], _CMP_MASKED_EQ, t["value"], t["valueTwo"]) for t in tests))
    action = ctypes.c_uint32(_ACT_ERRNO | rule["errnoRet"])
    for name in rule["names"]:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == _UNKNOWN:
            raise _invalid(f"system call {name}")
        _call(library.seccomp_rule_add_array(context, action, number, ctypes.c_uint(len(tests)), array), name)


def _export(library: ctypes.CDLL, context: ctypes.c_void_p) -> bytes:
    fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    try:
        _call(library.seccomp_export_bpf(context, fd), "export")
        os.lseek(fd, 0, os.SEEK_SET)
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


class _Program(ctypes.Structure):
    """struct sock_fprog, linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def load(bpf: bytes) -> None:
    """Put the calling thread, and all it will fork and exec, under a compiled filter for good (seccomp(2)).

    Needs CAP_SYS_ADMIN in the user namespace; no_new_privs stays off, or setuid programs in the jail would not work.
    Raises OSError: EINVAL on what is no program, EACCES without the capability.
    """
    count, rest = divmod(len(bpf), _INSTRUCTION_BYTES)
    if rest or not 0 < count <= _MOST_INSTRUCTIONS:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), "seccomp filter")
    code = ctypes.create_string_buffer(bpf, len(bpf))
    program = _Program(count, ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(program), zero, zero) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "PR_SET_SECCOMP")
