"""engine run, status, stop; autostart and shutdown, for the host's own boot and end."""

from __future__ import annotations

import os
import select
import signal
from typing import Any

import typer

from jailmgr.cli.actions import Failures
from jailmgr.cli.client import connect, ensure_engine
from jailmgr.cli.command import command
from jailmgr.cli.layout import local_time
from jailmgr.cli.output import fields, remark, show
from jailmgr.cli.settings import Settings
from jailmgr.errors import JailmgrError
from jailmgr.runtime.state import engine_runs

STOP_WITHIN = 60.0
"""Seconds an engine has to end what it is doing."""
AUTOSTART_WITHIN = 3600.0
"""Seconds that all jails together have to start."""


def add(app: typer.Typer) -> None:
    """Add the commands to the noun's app."""
    command(app, example="jailmgr engine run", who="root")(run)
    command(app, example="jailmgr engine status --format json", who="root")(status)
    command(app, example="jailmgr engine stop", who="root")(stop)
    command(app, example="jailmgr engine autostart", who="root")(autostart)
    command(app, example="jailmgr engine shutdown", who="root")(shutdown)


def run(settings: Settings) -> int:
    """Run the engine in the foreground, for systemd(1) and the like. Refused where one runs already."""
    from jailmgr.cli.engine_start import engine_argv, engine_environment

    environment = engine_environment(settings.root)
    os.execve(engine_argv()[0], engine_argv(), environment)


def status(settings: Settings) -> int:
    """Show whether the engine runs. This doesn't start it."""
    about = {
        "running": False,
        "pid": None,
        "version": None,
        "root": settings.root.at or "/",
        "socket": settings.root.socket,
        "started_at": None,
    } | _look(settings)
    show(settings, about, lambda: _page(about))
    return 0


def _look(settings: Settings) -> dict[str, Any]:
    # A socket of systemd's takes connections without an engine, and starts one.
    connection = connect(settings.root) if engine_runs(settings.root) else None
    if connection is None:
        return {}
    server = connection.call("GET", "/1.0", within=10.0)
    return {
        "running": True,
        "pid": server["environment"]["server_pid"],
        "version": server["environment"]["server_version"],
        "started_at": server.get("started_at"),
    }


def _page(about: dict[str, Any]) -> str:
    pairs = [("Running", "yes" if about["running"] else "no")]
    if about["running"]:
        pairs += [
            ("Process", str(about["pid"])),
            ("Version", str(about["version"])),
            ("Started", local_time(about["started_at"])),
        ]
    return fields([*pairs, ("Root", about["root"]), ("Socket", about["socket"])])


def stop(settings: Settings) -> int:
    """Stop the engine. Running jails run on; the next command starts it again."""
    about = _look(settings)
    if not about:
        remark(settings, "The engine does not run.")
    else:
        _end(int(about["pid"]), settings)
    show(settings, {"running": False}, lambda: "")
    return 0


def autostart(settings: Settings) -> int:
    """Start the jails that start with the host and don't run; done by itself when the engine first starts after a boot.

    They are those with boot.autostart, and where that isn't set those that ran when the host went down.
    """
    ensure_engine(settings.root).call("POST", "/internal/autostart", within=AUTOSTART_WITHIN)
    show(settings, {}, lambda: "")
    return 0


def shutdown(settings: Settings) -> int:
    """Stop all jails of all tenants in the order of boot.stop.priority, before the host goes down. Needs no engine.

    They run again after its next boot, as do those that a power cut ends.
    """
    from jailmgr.manager.boot import shut_down

    if failed := shut_down(settings.root):
        raise Failures(failed, len(failed))
    show(settings, {}, lambda: "")
    return 0


def _end(pid: int, settings: Settings) -> None:
    """SIGTERM, and wait for the process to be gone (pidfd_open(2))."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if not select.select([pidfd], [], [], STOP_WITHIN)[0]:
            raise JailmgrError(
                "engine stop",
                f"process {pid} has not ended within {STOP_WITHIN:.0f} s",
                f"See {settings.root.run}/engine.log. kill -9 {pid} is safe: the next start mends what it was doing.",
            )
    finally:
        os.close(pidfd)
