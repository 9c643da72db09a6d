"""`python -m labvm`: run a shell command as root in a lab VM that is booted for it, in a copy of the working tree."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from labvm.errors import FAILED, LabError
from labvm.image import PYTHONS, host_entries, image, recipe, requirements, tree_packages, wheelhouse
from labvm.tree import pack
from labvm.vm import Machine, Talk, accelerator, command_line, converse, running

CACHE = "/var/cache/jailmgr-lab"
UNITS = {"M": 1 << 20, "G": 1 << 30}


class _Parser(argparse.ArgumentParser):
    """2 may be the command's own status, so wrong usage has that of all failures of ours."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(FAILED, f"Error: lab-vm: {message}\n")


def parse(argv: list[str]) -> argparse.Namespace:
    """`commands` (the first and those of --then), `release`, `timeout` (seconds), `disk` (bytes)."""
    parser = _Parser(
        prog="script/lab-vm",
        description="Boot a Debian VM and run a shell command in it, as root, in a copy of the working tree.",
        epilog="example: script/lab-vm --timeout 600 'script/venv && .venv/bin/jailmgr doctor'",
        allow_abbrev=False,
    )
    parser.add_argument("command", metavar="'SHELL COMMAND'")
    parser.add_argument("--release", choices=list(PYTHONS), default="bookworm", help="of Debian (%(default)s)")
    parser.add_argument("--timeout", type=_seconds, default=900.0, metavar="SECONDS", help="from power on (900)")
    parser.add_argument("--disk", type=_size, default=_size("16G"), metavar="SIZE", help="of the root disk (16G)")
    parser.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="'SHELL COMMAND'",
        help="reboot and run this as well, whatever became of the one before; may be repeated",
    )
    parser.add_argument(
        "--carry",
        action="append",
        default=[],
        metavar="PATH",
        help="of the working tree, that comes along although git ignores it; may be repeated",
    )
    options = parser.parse_args(argv)
    options.commands = [options.command, *options.then]
    return options


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,6})([MG])(?:i?B)?", text)
    if match is None or int(match[1]) * UNITS[match[2]] < 4 << 30:
        raise argparse.ArgumentTypeError(f"{text} is no size of 4G or more, as 16G")
    return int(match[1]) * UNITS[match[2]]


def run(options: argparse.Namespace, cache: Path) -> int:
    """The first status of a command that isn't 0. LabError, with the path of the console's log where there is one."""
    wanted = recipe(options.release, host_entries(), tree_packages(), options.disk)
    wheels = wheelhouse(cache, options.release, requirements())
    booted = image(cache, wanted, wheels)
    accel = accelerator(cache, booted)
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryFile(dir=cache) as tree, tempfile.TemporaryFile(dir=cache) as console:
        pack(tree, options.commands, options.carry)
        inherited = (theirs.fileno(), tree.fileno(), console.fileno())
        channel, tree_fd, console_fd = inherited
        machine = Machine(booted, str(wheels.file), f"/dev/fd/{tree_fd}", f"/dev/fd/{console_fd}", channel, accel)
        talk = Talk(len(options.commands), sys.stdout.fileno())
        try:
            with running(command_line(machine), inherited, cache):
                theirs.close()
                converse(ours, talk, options.timeout)
        except LabError as error:
            error.hint += f"{' ' if error.hint else ''}The console said: {_keep(console, cache)}"
            raise
    return talk.status


def _keep(console: IO[bytes], cache: Path) -> Path:
    log = cache / "console.log"
    console.seek(0)
    with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
        shutil.copyfileobj(console, file)
    os.rename(file.name, log)
    return log


def main() -> int:
    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    options = parse(sys.argv[1:])
    try:
        return run(options, Path(os.environ.get("JAILMGR_LAB_CACHE") or CACHE))
    except LabError as error:
        print(f"Error: lab-vm: {error}", file=sys.stderr)
        if error.hint:
            print(f"Hint: {error.hint}", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
