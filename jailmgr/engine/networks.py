"""/1.0/networks: the bridges of tenants."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jailmgr.engine.answers import done
from jailmgr.engine.requests import call, listed
from jailmgr.manager import networks


async def list_all(request: Request) -> Response:
    """GET /1.0/networks"""
    return done([each for tenant in listed(request) for each in await call(request, networks.list_networks, tenant)])
