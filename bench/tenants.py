"""`python -m bench tenants`: whether tenants' walls cost more the more there is behind them, and whether they hold.

Times of `list`, `tenant usage` and `launch` with 5 jails and with hundreds in 20 tenants; the parts of the CPU that two
tenants get; what the host loses to a tenant that fills its memory.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench import report
from bench.host import available, bounded, milliseconds, raised_limits
from bench.ours import Ours, ours
from bench.report import Row
from jailmgr.runtime import cgroups
from tests.system.netns import session_namespace

MIB = 1 << 20
BACKGROUND = "</dev/null >/dev/null 2>&1 &"
BURN = f"(while :; do :; done) {BACKGROUND}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="script/bench tenants", description="tenants: cost, fairness, walls")
    parser.add_argument("--rounds", type=int, default=15, help="of each measurement (default: %(default)s)")
    parser.add_argument("--tenants", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--stopped", type=int, default=500, help="jails (default: %(default)s)")
    parser.add_argument("--running", type=int, default=100, help="jails (default: %(default)s)")
    parser.add_argument("--minutes", type=int, default=20, help="after which all is given up (default: %(default)s)")
    parser.add_argument("--results", default="bench/results", help="folder for the JSON (default: %(default)s)")
    options = parser.parse_args(argv)
    with ExitStack() as undo:
        undo.enter_context(bounded(options.minutes * 60))
        undo.enter_context(session_namespace())
        undo.enter_context(raised_limits())
        mine = undo.enter_context(ours("busybox"))
        mine.build()
        fair = _fairness(mine)
        lost = _memory(mine)
        few, many = _growth(mine, options)
    rows = [
        Row(f"{what}, {options.stopped + options.running} jails against 5", "ms", many[what], few[what], 1.3)
        for what in few
    ]
    rows.append(Row("CPU of the busier of two tenants against half", "s", *fair, 1.05))
    rows.append(Row("host memory lost to a tenant of 256 MiB that fills it", "MiB", [lost], [], 256 * 1.1, "value"))
    print(report.table(rows))
    print(f"\nMedians of {options.rounds}. All samples: {report.write(rows, vars(options), options.results)}")
    return 0


def _say(text: str) -> None:
    print(f"-- {text}", file=sys.stderr, flush=True)


def _tenant(mine: Ours, name: str, **config: str) -> None:
    mine.command("tenant", "create", name, *(f"-c{key.replace('_', '.')}={value}" for key, value in config.items()))


def _delete(mine: Ours, tenant: str) -> None:
    mine.command("--tenant", tenant, "delete", "--force", "--all")
    mine.command("tenant", "delete", tenant)


def _fairness(mine: Ours) -> tuple[list[float], list[float]]:
    """Seconds of CPU that the tenant which got more of it had, and half of what both had, five times: of equal weight,
    three jails of many processes against one of a few.

    Begun anew each time: on which CPUs the processes come to lie, and stay, is what makes the difference.
    """
    _say("two tenants, all CPUs busy in both")
    more, half = [], []
    for _ in range(5):
        for tenant, jails in (("many", 3), ("few", 1)):
            _tenant(mine, tenant)
            for number in range(jails):
                mine.command("launch", "busybox", f"{tenant}/j{number}")
                burn = BURN * (os.cpu_count() or 1) * (4 if jails > 1 else 1)
                mine.exec(f"{tenant}/j{number}", "/bin/sh", "-c", burn)
        time.sleep(2)
        before = [_cpu_ns(mine, tenant) for tenant in ("many", "few")]
        time.sleep(10)
        used = [(_cpu_ns(mine, tenant) - was) / 1e9 for tenant, was in zip(("many", "few"), before, strict=True)]
        more.append(max(used))
        half.append(statistics.mean(used))
        for tenant in ("many", "few"):
            _delete(mine, tenant)
    _say(f"{min(more):.2f} to {max(more):.2f} s of {statistics.median(half):.2f}")
    return more, half


def _cpu_ns(mine: Ours, tenant: str) -> int:
    return cgroups.usage(cgroups.discover(), f"{mine.instance.root.cgroup}/{tenant}")[1] or 0


def _memory(mine: Ours) -> float:
    """MiB the host has less, at the worst of eight seconds, than before three jails filled their tenant's memory."""
    _say("a tenant that fills its memory")
    _tenant(mine, "greedy", limits_memory="256MiB", limits_memory_swap="false", limits_overcommit="true")
    names = [f"greedy/j{number}" for number in range(3)]
    for name in names:
        mine.command("launch", "busybox", name, "--memory", "256MiB", "-c", "restart=always")
    available()
    before, worst, until = _left(), 0, time.monotonic() + 8
    for name in names:
        mine.exec(name, "/bin/sh", "-c", f"(while :; do tail /dev/zero; done) {BACKGROUND}")
    while time.monotonic() < until:
        worst = max(worst, before - _left())
        time.sleep(0.05)
    _delete(mine, "greedy")
    return worst / MIB


def _left() -> int:
    """Bytes that anybody may have this moment: MemAvailable, and free pages on the lists that each CPU keeps of them.

    The kernel doesn't count those as free (proc_meminfo(5), zoneinfo: `count`), and they hold a hundred MiB and more
    after much has been given back at once.
    """
    available = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    counts = re.findall(r"^ +count: +(\d+)$", Path("/proc/zoneinfo").read_text(), re.MULTILINE)
    return available + sum(map(int, counts)) * os.sysconf("SC_PAGE_SIZE")


def _growth(mine: Ours, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    tenants = [f"t{number}" for number in range(options.tenants)]
    _tenant(mine, tenants[0], limits_instances="1000", limits_memory="64GiB")
    for number in range(5):
        mine.command("create" if number else "launch", "busybox", f"{tenants[0]}/f{number}", "--memory", "64MiB")
    few = _times(mine, tenants[0], options.rounds)
    for tenant in tenants[1:]:
        _tenant(mine, tenant, limits_instances="1000", limits_memory="64GiB")
    _say(f"{options.stopped} stopped and {options.running} running jails in {options.tenants} tenants")
    config = {"limits.memory": "64MiB"}
    for number in range(5, options.stopped + options.running):
        tenant = tenants[number % len(tenants)]
        start = number < options.running + 4
        mine.create_in(tenant, f"s{number}", "busybox", config, start=start)
    many = _times(mine, tenants[0], options.rounds)
    for tenant in tenants:
        _delete(mine, tenant)
    return few, many


def _times(mine: Ours, tenant: str, rounds: int) -> dict[str, list[float]]:
    def times(step: Callable[[], object], after: Callable[[], object] = lambda: None) -> list[float]:
        found = []
        for number in range(rounds + 1):
            took = milliseconds(step)
            after()
            if number:
                found.append(took)
        return found

    found = {
        "list --all-tenants": times(lambda: mine.command("list", "-A")),
        "list of a tenant": times(lambda: mine.command("--tenant", tenant, "list")),
        "tenant usage": times(lambda: mine.command("tenant", "usage")),
        "tenant usage NAME": times(lambda: mine.command("tenant", "usage", tenant)),
        "launch": times(
            lambda: mine.command("launch", "busybox", f"{tenant}/new", "--memory", "64MiB"),
            lambda: mine.command("delete", "--force", f"{tenant}/new"),
        ),
    }
    for what, values in found.items():
        _say(f"{what}: {statistics.median(values):.1f} ms")
    return found
