"""`python -m bench`: measure, print a table of medians, write bench/results/TIME.json, put everything back.

`python -m bench tenants`, `python -m bench accounting` and `python -m bench cp` measure something else, and nothing of
lxc's: bench/tenants.py, bench/accounting.py, bench/copying.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from contextlib import ExitStack

from bench import accounting, copying, report, tenants
from bench.host import available, bounded, milliseconds, raised_limits
from bench.lxc import Lxc, lxc
from bench.ours import Ours, ours
from bench.report import Row
from tests.system.netns import session_namespace

MIB = 1 << 20
BOOT_WITHIN = 60.0
SETTLE = 0.5
"""Seconds between a stop and the next start: the kernel takes a network namespace away when its last process has long
ended, and either side's start would wait for the lock over all interfaces."""
Side = Ours | Lxc
Samples = dict[str, list[float]]


def main() -> int:
    if sys.argv[1:2] == ["tenants"]:
        return tenants.main(sys.argv[2:])
    if sys.argv[1:2] == ["accounting"]:
        return accounting.main(sys.argv[2:])
    if sys.argv[1:2] == ["cp"]:
        return copying.main(sys.argv[2:])
    options = _options()
    if os.geteuid() != 0:
        print("Error: bench: it starts containers, so it must run as root\nHint: sudo script/bench", file=sys.stderr)
        return 1
    with ExitStack() as undo:
        undo.enter_context(bounded(options.minutes * 60))
        undo.enter_context(session_namespace())
        undo.enter_context(raised_limits())
        mine = undo.enter_context(ours(options.source))
        _say(f"building {options.source}")
        rootfs = mine.build()
        theirs = undo.enter_context(lxc(rootfs))
        samples: dict[str, Samples] = {mine.name: defaultdict(list), theirs.name: defaultdict(list)}
        for number in range(options.rounds + 1):
            _say(f"round {number} of {options.rounds}" + (" (to warm up)" if number == 0 else ""))
            for side in (mine, theirs):
                measured = _round(side, f"r{number}")
                if number > 0:
                    for what, values in measured.items():
                        samples[side.name][what] += values
        for side in (mine, theirs):
            _say(f"{options.jails} running by {side.name}")
            for what, values in _density(side, options.jails).items():
                samples[side.name][what] += values
        _say(f"a list of {options.stopped} stopped")
        few, many = _lists(mine, options.stopped, options.rounds)
        rows = _rows(samples[mine.name], samples[theirs.name], few, many, options)
        print(report.table(rows))
        about = {"source": options.source, "rounds": options.rounds, "jails": options.jails, "stopped": options.stopped}
        print(f"\nMedians of {options.rounds}. All samples: {report.write(rows, about, options.results)}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script/bench", description="jailmgr and lxc side by side")
    parser.add_argument("--source", default="debian/bookworm", help="template (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of each measurement (default: %(default)s)")
    parser.add_argument("--jails", type=int, default=40, help="running at once (default: %(default)s)")
    parser.add_argument("--stopped", type=int, default=200, help="for the time of list (default: %(default)s)")
    parser.add_argument("--minutes", type=int, default=25, help="after which all is given up (default: %(default)s)")
    parser.add_argument("--results", default="bench/results", help="folder for the JSON (default: %(default)s)")
    return parser.parse_args()


def _say(text: str) -> None:
    print(f"-- {text}", file=sys.stderr, flush=True)


def _round(side: Side, name: str) -> Samples:
    """One container from create to delete, started three times: the first start differs, it fills what was empty."""
    found: Samples = defaultdict(list)
    found["create"].append(milliseconds(lambda: side.create(name)))
    if isinstance(side, Lxc):
        side.connect(name)
    found["first start"].append(milliseconds(lambda: side.start(name)))
    _booted(side, name, time.time())
    found["stop"].append(milliseconds(lambda: side.stop(name)))
    time.sleep(SETTLE)
    at = time.time()
    found["start by command"].append(milliseconds(lambda: side.start(name)))
    found["running by command"].append(_booted(side, name, at))
    found["exec"] += [milliseconds(lambda: side.exec(name, "/bin/true")) for _ in range(5)]
    found["stop"].append(milliseconds(lambda: side.stop(name)))
    time.sleep(SETTLE)
    at = time.time()
    start = side.start_by_engine if isinstance(side, Ours) else side.start
    found["start by engine"].append(milliseconds(lambda: start(name)))
    found["running by engine"].append(_booted(side, name, at))
    found["stop"].append(milliseconds(lambda: side.stop(name)))
    found["delete"].append(milliseconds(lambda: side.delete(name)))
    return found


def _booted(side: Side, name: str, at: float) -> float:
    """Milliseconds from `at` until systemd had done all it starts at boot, by systemd's own note of the time.

    Asked only after a while: asking costs CPU that the boot would want, and of both sides not the same.
    """
    time.sleep(1.5)
    deadline = time.monotonic() + BOOT_WITHIN
    while True:
        try:
            said = side.exec(
                name, "/usr/bin/busctl", "get-property", "org.freedesktop.systemd1", "/org/freedesktop/systemd1",
                "org.freedesktop.systemd1.Manager", "FinishTimestamp",
            )  # fmt: skip
            finished = int(said.split()[1])
        except RuntimeError:
            finished = 0
        if finished:
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"{side.name}: {name} did not come up in {BOOT_WITHIN:.0f} s")
        time.sleep(0.2)
    state = side.exec(name, "/bin/sh", "-c", "/usr/bin/systemctl is-system-running || true").strip()
    if state != "running":
        raise RuntimeError(f"{side.name}: systemd in {name} is {state}")
    return finished / 1000 - at * 1000


def _density(side: Side, count: int) -> Samples:
    """Memory with `count` running."""
    names = [f"d{number}" for number in range(count)]
    for name in names:
        side.create(name)
        if isinstance(side, Lxc):
            side.connect(name)
    before = available()
    at = time.time()
    side.start_all(names)
    for name in names:
        _wait_running(side, name)
    after = available()
    found = {"memory": [(before - after) / count / MIB], "all running": [time.time() - at]}
    parts = side.pss_outside()
    found |= {f"pss {part}": [value / MIB] for part, value in parts.items()}
    found["pss"] = [sum(parts.values()) / MIB]
    for name in names:
        side.stop(name)
        side.delete(name)
    return found


def _wait_running(side: Side, name: str) -> None:
    deadline = time.monotonic() + BOOT_WITHIN
    # Without --wait, which starts the bus in each of them: a process more than was to be measured.
    while side.exec(name, "/bin/sh", "-c", "/usr/bin/systemctl is-system-running || true").strip() != "running":
        if time.monotonic() > deadline:
            failed = side.exec(name, "/bin/sh", "-c", "/usr/bin/systemctl --failed --no-legend || true").strip()
            raise RuntimeError(f"{side.name}: {name} did not come up in {BOOT_WITHIN:.0f} s: {failed}")
        time.sleep(0.2)


def _lists(side: Ours, count: int, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of `list` with 2 stopped jails and with `count`."""
    side.create_stopped(["s0", "s1"], "busybox")
    few = [milliseconds(lambda: side.command("list")) for _ in range(rounds)]
    side.create_stopped([f"s{number}" for number in range(2, count)], "busybox")
    many = [milliseconds(lambda: side.command("list")) for _ in range(rounds)]
    return few, many


def _rows(
    mine: Samples, theirs: Samples, few: list[float], many: list[float], options: argparse.Namespace
) -> list[Row]:
    n = options.jails
    return [
        Row("create", "ms", mine["create"], theirs["create"]),
        Row("first start, by the command", "ms", mine["first start"], theirs["first start"]),
        Row("start to init exec'd, by the engine", "ms", mine["start by engine"], theirs["start by engine"], 1.0),
        Row("start to init exec'd, by the command", "ms", mine["start by command"], theirs["start by command"], 4.0),
        Row(
            "start to systemd running, by the engine", "ms", mine["running by engine"], theirs["running by engine"], 1.0
        ),
        Row("start to systemd running, by the command", "ms", mine["running by command"], theirs["running by command"]),
        Row("exec of true", "ms", mine["exec"], theirs["exec"], 4.0),
        Row("stop by force", "ms", mine["stop"], theirs["stop"]),
        Row("delete", "ms", mine["delete"], theirs["delete"]),
        Row(f"host memory per jail, {n} running", "MiB", mine["memory"], theirs["memory"], 5.0, "value"),
        Row(f"supervisor's PSS, {n} running", "MiB", mine["pss supervisor"], [], 15 + 0.1 * n, "value"),
        Row(f"PSS of all outside of jails, {n} running", "MiB", mine["pss"], theirs["pss"], 120, "value"),
        Row(f"list, {options.stopped} stopped against 2 (in lxc's place)", "ms", many, few, 1.3),
    ]


if __name__ == "__main__":
    sys.exit(main())
