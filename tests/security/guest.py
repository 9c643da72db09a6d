"""A guest's root that attacks: static C programs, and single system calls with the errno that each gets.

`python -m tests.security.guest FOLDER` compiles the programs, for a machine without a compiler (the lab VM).
"""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from jailmgr.runtime.syscalls import number
from tests.system.instance import Instance

HERE = Path(__file__).parent
PREBUILT = Path("dist/guest")
"""Programs that `script/test vm` compiled and carried along."""
OK = "ok"

_library = ctypes.CDLL("libseccomp.so.2")


class Buffer(NamedTuple):
    """An empty buffer of that many bytes."""

    size: int


class Result(NamedTuple):
    """The result of an earlier call, by its position in the list."""

    of: int


Argument = int | str | bytes | Buffer | Result


def compile_to(name: str, folder: Path) -> Path:
    """The program NAME.c of this directory, linked statically."""
    program = folder / name
    argv = ["cc", "-static", "-O1", "-Wall", "-Werror", "-o", str(program), str(HERE / f"{name}.c")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return program


class Guest(NamedTuple):
    """A running jail, and the compiled programs that its root may run."""

    jm: Instance
    jail: str
    programs: Path

    def install(self, name: str) -> str:
        """Copy a program into the jail; its path there."""
        path = f"/root/{name}"
        if self.jm.sh(self.jail, f"test -e {path}", status=None).status:
            there = PREBUILT / name
            if not there.exists():
                there = self.programs / name
            if not there.exists():
                compile_to(name, self.programs)
            self.jm("cp", str(there), f"{self.jail}:{path}")
        return path

    def run(self, name: str, *argv: str, stdin: str = "", status: int | None = 0) -> str:
        """Run one of the programs as the jail's root; its stdout."""
        done = self.jm.exec(self.jail, self.install(name), *argv, stdin=stdin.encode(), status=status)
        return done.out

    def sh(self, script: str, status: int | None = 0) -> str:
        return self.jm.sh(self.jail, script, status=status).out

    def ask(self, *calls: tuple[str | int, *tuple[Argument, ...]], old: bool = False) -> list[str]:
        """Make system calls in one process of the jail's root: `OK` or the errno's name for each.

        A call is its name, or its number for x86's 32-bit calls (`old`), and its arguments.
        """
        return [errno.errorcode[number] if number else OK for _, number in self._ask(*calls, old=old)]

    def results(self, *calls: tuple[str | int, *tuple[Argument, ...]]) -> list[int]:
        """Make system calls as `ask` does; what each returned, -1 for an error."""
        return [result for result, _ in self._ask(*calls)]

    def _ask(self, *calls: tuple[str | int, *tuple[Argument, ...]], old: bool = False) -> list[tuple[int, int]]:
        words = [" ".join([str(call_number(call[0])), *map(_word, call[1:])]) for call in calls]
        text = self.run("ask", *(["-3"] if old else []), stdin="\n".join(words) + "\n")
        lines = [line.split() for line in text.splitlines()]
        assert len(lines) == len(calls), text
        return [(int(result), int(number)) for result, number in lines]

    def verdicts(self, *calls: tuple[str | int, *tuple[Argument, ...]]) -> dict[str, str]:
        """`ask`, by the name of each call."""
        return dict(zip([str(call[0]) for call in calls], self.ask(*calls), strict=True))


def call_number(call: str | int) -> int:
    """The number of a system call on this machine."""
    if isinstance(call, int):
        return call
    found = int(_library.seccomp_syscall_resolve_name(call.encode()))
    return found if found >= 0 else number(call)


def exists(call: str) -> bool:
    """Whether this machine has a system call of that name."""
    return int(_library.seccomp_syscall_resolve_name(call.encode())) >= 0


def _word(argument: Argument) -> str:
    match argument:
        case Buffer(size):
            return f"b:{size}"
        case Result(of):
            return f"@{of}"
        case bytes():
            return f"x:{argument.hex()}"
        case str():
            assert " " not in argument
            return f"s:{argument}"
        case _:
            return str(argument)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for source in sorted(HERE.glob("*.c")):
        compile_to(source.stem, target)
