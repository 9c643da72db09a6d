"""Device rules on cgroup v2, which has no controller for them: a BPF program on the group's directory.

OCI's `linux.resources.devices` as BPF_PROG_TYPE_CGROUP_DEVICE (cgroup-v2.rst, "Device controller"; linux/bpf.h). It is
attached with BPF_F_ALLOW_MULTI, so that it holds beside those of the groups above, and is the group's: it goes with it,
and nobody in a user namespace of a jail's can take it off. Standard library only.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from jailmgr.runtime import syscalls
from jailmgr.runtime.bpf import (
    AND_IMM,
    EXIT,
    JEQ_IMM,
    JNE_IMM,
    JNE_REG,
    LDX_W,
    MOV_IMM,
    MOV_REG,
    RSH_IMM,
    instruction,
    load,
)  # fmt: skip

PROG_ATTACH = 8
PROG_TYPE_CGROUP_DEVICE, CGROUP_DEVICE = 15, 6
F_ALLOW_MULTI = 2
DEV_BLOCK, DEV_CHAR = 1, 2
ACCESS = {"m": 1, "r": 2, "w": 4}
"""BPF_DEVCG_ACC_MKNOD, _READ, _WRITE."""
_TYPES = {"b": DEV_BLOCK, "c": DEV_CHAR}

_RESULT, _CONTEXT, _TYPE, _ASKED, _MAJOR, _MINOR, _SCRATCH = 0, 1, 2, 3, 4, 5, 6


def program(rules: Iterable[Mapping[str, Any]]) -> bytes:
    """The rules as BPF instructions: 1 lets an access be, 0 refuses it. The last rule that fits counts; none: refused.

    A rule that allows fits where all that is asked for is in its `access`, one that denies where any of it is.
    """
    code = [
        instruction(LDX_W, _TYPE, _CONTEXT, 0, 0),  # struct bpf_cgroup_dev_ctx: access << 16 | type, major, minor
        instruction(MOV_REG, _ASKED, _TYPE),
        instruction(AND_IMM, _TYPE, immediate=0xFFFF),
        instruction(RSH_IMM, _ASKED, immediate=16),
        instruction(LDX_W, _MAJOR, _CONTEXT, 4),
        instruction(LDX_W, _MINOR, _CONTEXT, 8),
    ]
    for rule in reversed(list(rules)):
        code += _rule(rule)
    return b"".join([*code, *_end(False)])


def _rule(rule: Mapping[str, Any]) -> list[bytes]:
    """One rule: past its end where it doesn't fit."""
    allow, mask = bool(rule["allow"]), sum(ACCESS[letter] for letter in set(rule.get("access", "rwm")))
    tests: list[tuple[int, int, int]] = []
    if rule.get("type", "a") != "a":
        tests.append((JNE_IMM, _TYPE, _TYPES[rule["type"]]))
    tests += [
        (JNE_IMM, register, int(rule[key])) for key, register in (("major", _MAJOR), ("minor", _MINOR)) if key in rule
    ]
    body = [
        instruction(MOV_REG, _SCRATCH, _ASKED),
        instruction(AND_IMM, _SCRATCH, immediate=mask),
        instruction(JNE_REG, _SCRATCH, _ASKED, 2) if allow else instruction(JEQ_IMM, _SCRATCH, 0, 2),
        *_end(allow),
    ]
    lines = [
        instruction(code, register, 0, len(tests) - at - 1 + len(body), value)
        for at, (code, register, value) in enumerate(tests)
    ]
    return lines + body


def _end(allow: bool) -> list[bytes]:
    return [instruction(MOV_IMM, _RESULT, immediate=int(allow)), instruction(EXIT)]


def attach(directory: str, rules: Iterable[Mapping[str, Any]]) -> None:
    """Hold a v2 group to the rules. Raises OSError: ENOSYS or EINVAL where the kernel has no BPF for cgroups."""
    loaded = load(PROG_TYPE_CGROUP_DEVICE, program(rules), "jailmgr_devices")
    try:
        group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syscalls.bpf(PROG_ATTACH, struct.pack("=IIII", group, loaded, CGROUP_DEVICE, F_ALLOW_MULTI))
        finally:
            os.close(group)
    finally:
        os.close(loaded)
