"""BPF programs by hand: instructions as bytes, loaded by bpf(2) (linux/bpf.h). Standard library only."""

from __future__ import annotations

import ctypes
import struct

from jailmgr.runtime import syscalls

PROG_LOAD = 5
LDX_W, STX_W, MOV_REG, MOV_IMM, AND_IMM, RSH_IMM = 0x61, 0x63, 0xBF, 0xB7, 0x57, 0x77
JNE_IMM, JNE_REG, JEQ_IMM, EXIT = 0x55, 0x5D, 0x15, 0x95


def instruction(code: int, destination: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    """struct bpf_insn; registers share a byte, low half first on the machines jailmgr runs on."""
    return struct.pack("=BBhi", code, source << 4 | destination, offset, immediate)


def load(kind: int, program: bytes, name: str) -> int:
    """An fd of the program, of type `kind`; it is freed with its last user. Raises OSError."""
    code, license_ = ctypes.create_string_buffer(program, len(program)), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQIIQII16s", kind, len(program) // 8, ctypes.addressof(code), ctypes.addressof(license_),
        0, 0, 0, 0, 0, name.encode(),
    )  # fmt: skip
    return syscalls.bpf(PROG_LOAD, attributes)
