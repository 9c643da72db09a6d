"""/1.0: what serves, where, and since when."""

from __future__ import annotations

import os

from starlette.requests import Request
from starlette.responses import Response

from jailmgr import __version__
from jailmgr.engine.answers import done
from jailmgr.engine.requests import call, engine_of
from jailmgr.manager.boot import start_wanted
from jailmgr.times import rfc3339


async def versions(_request: Request) -> Response:
    """GET /"""
    return done(["/1.0"])


async def show(request: Request) -> Response:
    """GET /1.0"""
    engine, kernel = engine_of(request), os.uname()
    return done(
        {
            "api_version": "1.0",
            "api_status": "stable",
            "api_extensions": [],
            "auth": "trusted",
            "public": False,
            "config": {},
            "environment": {
                "server": "jailmgr",
                "server_version": __version__,
                "server_pid": os.getpid(),
                "server_name": kernel.nodename,
                "kernel": kernel.sysname,
                "kernel_version": kernel.release,
                "kernel_architecture": kernel.machine,
            },
            "started_at": rfc3339(engine.started_at),
            "root": engine.root.at,
            "socket": engine.root.socket,
        }
    )


async def autostart(request: Request) -> Response:
    """POST /internal/autostart: answered when all jails that start with the host have been started."""
    await call(request, start_wanted)
    return done(None)
