"""Device rules on cgroup v2, which has no controller for them: a BPF program on the group's directory.

OCI's `linux.resources.devices` as BPF_PROG_TYPE_CGROUP_DEVICE (cgroup-v2.rst, "Device controller"; linux/bpf.h). It is
attached with BPF_F_ALLOW_MULTI, so that it holds beside those of the groups above, and is the group's: it goes with it,
and nobody in a user namespace of a jail's can take it off. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from jailmgr.runtime.syscalls import bpf

PROG_LOAD, PROG_ATTACH = 5, 8
PROG_TYPE_CGROUP_DEVICE, CGROUP_DEVICE = 15, 6
F_ALLOW_MULTI = 2
DEV_BLOCK, DEV_CHAR = 1, 2
ACCESS = {"m": 1, "r": 2, "w": 4}
"""BPF_DEVCG_ACC_MKNOD, _READ, _WRITE."""
_TYPES = {"b": DEV_BLOCK, "c": DEV_CHAR}

_LDX_W, _MOV_REG, _MOV_IMM, _AND_IMM, _RSH_IMM = 0x61, 0xBF, 0xB7, 0x57, 0x77
_JNE_IMM, _JNE_REG, _JEQ_IMM, _EXIT = 0x55, 0x5D, 0x15, 0x95
_RESULT, _CONTEXT, _TYPE, _ASKED, _MAJOR, _MINOR, _SCRATCH = 0, 1, 2, 3, 4, 5, 6


def program(rules: Iterable[Mapping[str, Any]]) -> bytes:
    """The rules as BPF instructions: 1 lets an access be, 0 refuses it. The last rule that fits counts; none: refused.

    A rule that allows fits where all that is asked for is in its `access`, one that denies where any of it is.
    """
    code = [
        _instruction(_LDX_W, _TYPE, _CONTEXT, 0, 0),  # struct bpf_cgroup_dev_ctx: access << 16 | type, major, minor
        _instruction(_MOV_REG, _ASKED, _TYPE),
        _instruction(_AND_IMM, _TYPE, immediate=0xFFFF),
        _instruction(_RSH_IMM, _ASKED, immediate=16),
        _instruction(_LDX_W, _MAJOR, _CONTEXT, 4),
        _instruction(_LDX_W, _MINOR, _CONTEXT, 8),
    ]
    for rule in reversed(list(rules)):
        code += _rule(rule)
    return b"".join([*code, *_end(False)])


def _rule(rule: Mapping[str, Any]) -> list[bytes]:
    """One rule: past its end where it doesn't fit."""
    allow, mask = bool(rule["allow"]), sum(ACCESS[letter] for letter in set(rule.get("access", "rwm")))
    tests: list[tuple[int, int, int]] = []
    if rule.get("type", "a") != "a":
        tests.append((_JNE_IMM, _TYPE, _TYPES[rule["type"]]))
    tests += [
        (_JNE_IMM, register, int(rule[key])) for key, register in (("major", _MAJOR), ("minor", _MINOR)) if key in rule
    ]
    body = [
        _instruction(_MOV_REG, _SCRATCH, _ASKED),
        _instruction(_AND_IMM, _SCRATCH, immediate=mask),
        _instruction(_JNE_REG, _SCRATCH, _ASKED, 2) if allow else _instruction(_JEQ_IMM, _SCRATCH, 0, 2),
        *_end(allow),
    ]
    lines = [
        _instruction(code, register, 0, len(tests) - at - 1 + len(body), value)
        for at, (code, register, value) in enumerate(tests)
    ]
    return lines + body


def _end(allow: bool) -> list[bytes]:
    return [_instruction(_MOV_IMM, _RESULT, immediate=int(allow)), _instruction(_EXIT)]


def _instruction(code: int, destination: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    """struct bpf_insn; registers share a byte, low half first on the machines jailmgr runs on."""
    return struct.pack("=BBhi", code, source << 4 | destination, offset, immediate)


def attach(directory: str, rules: Iterable[Mapping[str, Any]]) -> None:
    """Hold a v2 group to the rules. Raises OSError: ENOSYS or EINVAL where the kernel has no BPF for cgroups."""
    code, license_ = ctypes.create_string_buffer(program(rules)), ctypes.create_string_buffer(b"GPL")
    count = (len(code) - 1) // 8
    load = struct.pack(
        "=IIQQIIQII16s", PROG_TYPE_CGROUP_DEVICE, count, ctypes.addressof(code), ctypes.addressof(license_),
        0, 0, 0, 0, 0, b"jailmgr_devices",
    )  # fmt: skip
    loaded = bpf(PROG_LOAD, load)
    try:
        group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            bpf(PROG_ATTACH, struct.pack("=IIII", group, loaded, CGROUP_DEVICE, F_ALLOW_MULTI))
        finally:
            os.close(group)
    finally:
        os.close(loaded)
