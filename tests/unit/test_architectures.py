"""Numbers that differ between machines stand in tables, and the tables are right: libseccomp knows both machines'."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from jailmgr.runtime import seccomp, syscalls
from jailmgr.template.debootstrap import ARCHITECTURES

MACHINES = ("x86_64", "aarch64")
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_arch_resolve_name.restype = ctypes.c_uint32
library.seccomp_syscall_resolve_name_arch.argtypes = (ctypes.c_uint32, ctypes.c_char_p)
SOURCES = Path(syscalls.__file__).parents[1]


def number(machine: str, name: str) -> int:
    token = library.seccomp_arch_resolve_name(machine.encode())
    return int(library.seccomp_syscall_resolve_name_arch(token, name.encode()))


@pytest.mark.parametrize("machine", MACHINES)
def test_old_system_calls_by_machine(machine: str) -> None:
    table = syscalls._OLD[machine]
    assert table == {name: number(machine, name) for name in table}


def test_every_machine_has_all_of_them() -> None:
    assert set(syscalls._OLD) == set(MACHINES)
    assert len({frozenset(table) for table in syscalls._OLD.values()}) == 1


@pytest.mark.parametrize("machine", MACHINES)
def test_new_system_calls_are_alike_everywhere(machine: str) -> None:
    # Not in the table of libseccomp 2.5.4 (Debian 12) where it gives a negative number.
    known = {name: number(machine, name) for name in syscalls.NEEDED if number(machine, name) >= 0}
    assert len(known) > 6
    assert known == {name: syscalls.NEEDED[name] for name in known}
    assert all(nr >= 424 for nr in syscalls.NEEDED.values())


def test_system_calls_are_made_by_number_in_one_module() -> None:
    calls = re.compile(r"""\.syscall\(|["']syscall["']""")
    files = {str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.py") if calls.search(path.read_text())}
    assert files == {"runtime/syscalls.py"}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filters_architectures(machine: str) -> None:
    section = seccomp.default_section(machine)
    names = section["architectures"]
    assert len(names) == 2
    for name in names:
        word = name.removeprefix("SCMP_ARCH_").lower()
        assert seccomp._ARCH_TOKENS[name] == library.seccomp_arch_resolve_name(word.encode()), name
    assert len(seccomp.compile(section)) % 8 == 0


def test_a_machine_that_is_in_no_table_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.uname", lambda: type("Uname", (), {"machine": "riscv64"}))
    with pytest.raises(OSError, match="riscv64"):
        syscalls.number("bpf")


@pytest.mark.parametrize("machine", MACHINES)
def test_debians_word_for_it(machine: str) -> None:
    assert ARCHITECTURES[machine] == {"x86_64": "amd64", "aarch64": "arm64"}[machine]


def test_nothing_else_names_a_machine() -> None:
    """What is for one machine alone stands beside its like for the others."""
    words = re.compile(r"\b(x86_64|amd64|aarch64|arm64)\b")
    files = {str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.py") if words.search(path.read_text())}
    assert files == {
        "model.py",
        "runtime/syscalls.py",
        "runtime/seccomp.py",
        "storage/btrfs.py",
        "template/debootstrap.py",
    }
