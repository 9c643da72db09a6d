"""top: what jails use, with the CPU they are at right now, again and again."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from jailmgr.cli.client import Connection, existing_engine
from jailmgr.cli.command import command
from jailmgr.cli.layout import beside, cpus
from jailmgr.cli.output import show, table, write
from jailmgr.cli.settings import Settings
from jailmgr.units import format_size

HOME_AND_CLEAR = "\x1b[H\x1b[J"
"""Cursor to the corner, and nothing below it (ECMA-48: CUP, ED)."""


def add(app: typer.Typer) -> None:
    """Add the command to the app."""
    command(app, example="jailmgr top --all-tenants")(top)


def top(
    settings: Settings,
    all_tenants: Annotated[bool, typer.Option("--all-tenants", "-A", help="Jails of every tenant.")] = False,
    delay: Annotated[float, typer.Option("-d", "--delay", metavar="S", min=0.1, help="Seconds between looks.")] = 2.0,
    times: Annotated[int | None, typer.Option("-n", "--times", metavar="N", min=1, help="Looks, then it ends.")] = None,
) -> int:
    """Show running jails, those that use the most CPU first. On a terminal until ctrl-c or q, else once.

    With --format json, yaml or csv the last look alone is shown.
    """
    whose = "all-projects=true" if all_tenants else f"project={settings.tenant}"
    live = settings.format == "table" and sys.stdout.isatty()
    left = times if times is not None else (None if live else 1)
    for views in _looks(existing_engine(settings.root), whose, delay):
        if live:
            write(HOME_AND_CLEAR + _page(views, all_tenants))
        elif settings.format == "table" or left == 1:
            show(settings, views, lambda views=views: _page(views, all_tenants))  # type: ignore[misc]
        left = None if left is None else left - 1
        if left == 0 or (live and _quit()):
            break
    return 0


def _looks(connection: Connection, whose: str, delay: float) -> Iterator[list[dict[str, Any]]]:
    """Running jails, each with `cpus`: how many it kept busy since the look before."""
    before: dict[tuple[str, str], int] = {}
    began = 0.0
    while True:
        views = connection.call("GET", f"/1.0/instances?recursion=2&{whose}")
        now, used = time.monotonic(), {}
        running = [view for view in views if view["status"] in ("Running", "Frozen")]
        for view in running:
            key, spent = (view["tenant"], view["name"]), view["usage"].get("cpu_ns") or 0
            used[key] = spent
            view["cpus"] = round(max(0, spent - before.get(key, spent)) / 1e9 / (now - began), 2)
        if began:
            yield sorted(running, key=lambda view: (-view["cpus"], view["tenant"], view["name"]))
        before, began = used, now
        _pause(delay)


def _pause(seconds: float) -> None:
    """So long, or until something has been typed."""
    select.select([sys.stdin] if sys.stdin.isatty() else [], [], [], seconds)


def _quit() -> bool:
    typed = sys.stdin.isatty() and select.select([sys.stdin], [], [], 0)[0]
    return bool(typed) and sys.stdin.readline()[:1] == "q"


def _page(views: list[dict[str, Any]], with_tenant: bool) -> str:
    header = ["NAME", "CPUS", "MEMORY", "PROCS", "DISK"]
    rows = [_row(view) for view in views]
    if with_tenant:
        header.insert(0, "TENANT")
        rows = [[view["tenant"], *row] for view, row in zip(views, rows, strict=True)]
    return table(header, rows)


def _row(view: dict[str, Any]) -> list[str]:
    usage, limits = view["usage"], view["limits"]
    return [
        view["name"],
        beside(f"{view['cpus']:g}", limits["cpu"], cpus),
        beside(format_size(usage["memory_bytes"]), limits["memory_bytes"], format_size),
        beside(str(usage["processes"]), limits["processes"], str),
        beside(format_size(usage["disk_bytes"]), limits["disk_bytes"], format_size),
    ]
