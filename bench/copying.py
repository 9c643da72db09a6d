"""`python -m bench cp`: `cp` against a pipe through `exec tar`, in one run: a large file, and many small ones."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack

from bench import report
from bench.host import milliseconds
from bench.ours import Ours, ours
from bench.report import Row
from tests.system.instance import COMMAND
from tests.system.netns import session_namespace

LARGE = 300 << 20
GOAL = 1.3


def main(argv: list[str]) -> int:
    """Measure, and print medians."""
    options = _options(argv)
    if os.geteuid() != 0:
        print("Error: bench: it starts containers, so it must run as root\nHint: sudo script/bench", file=sys.stderr)
        return 1
    with ExitStack() as undo:
        undo.enter_context(session_namespace())
        side = undo.enter_context(ours("busybox"))
        folder = tempfile.mkdtemp(prefix="jb-cp-", dir="/tmp")
        undo.callback(shutil.rmtree, folder)
        _make(folder, options.files)
        side.create("c")
        side.start("c")
        times: dict[str, list[float]] = defaultdict(list)
        for number in range(options.rounds + 1):
            for what in ("large", "many"):
                for way, took in _round(side, folder, what).items():
                    if number:
                        times[f"{what} {way}"].append(took)
        rows = [
            Row(f"{name} (a pipe in lxc's place)", "ms", times[f"{what} {way}"], times[f"{what} {way} tar"], GOAL)
            for what, label in (("large", f"{LARGE >> 20} MiB"), ("many", f"{options.files} small files"))
            for way, name in (("in", f"{label} into a jail"), ("out", f"{label} out of a jail"))
        ]
        print(report.table(rows))
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script/bench cp", description="cp against a pipe through exec tar")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--files", type=int, default=5000, help="small files (default: %(default)s)")
    return parser.parse_args(argv)


def _make(folder: str, files: int) -> None:
    for name in ("large", "many"):
        os.mkdir(f"{folder}/{name}")
    with open(f"{folder}/large/file", "wb") as file:
        for _ in range(LARGE >> 20):
            file.write(os.urandom(1 << 20))
    for number in range(files):
        with open(f"{folder}/many/{number}", "wb") as file:
            file.write(os.urandom(2000))


def _round(side: Ours, folder: str, what: str) -> dict[str, float]:
    """Milliseconds of each way; both start from nothing at the target."""
    tool, source, back = shlex.quote(COMMAND), f"{folder}/{what}", f"{folder}/back"
    ways = {
        "in tar": f"tar -C {folder} -cf - {what} | {tool} exec c -- tar -xf - -C /root",
        "out tar": f"mkdir {back} && {tool} exec c -- tar -cf - -C /root {what} | tar -C {back} -xf -",
        "in": f"{tool} cp {source} c:/root/",
        "out": f"mkdir {back} && {tool} cp c:/root/{what} {back}",
    }
    found = {}
    for way, line in ways.items():
        shutil.rmtree(back, ignore_errors=True)
        if way.startswith("in"):
            side.exec("c", "/bin/rm", "-rf", f"/root/{what}")
        found[way] = milliseconds(lambda line=line: side.shell(line))  # type: ignore[misc]
    shutil.rmtree(back, ignore_errors=True)
    return found
