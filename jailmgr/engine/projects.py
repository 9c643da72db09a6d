"""/1.0/projects: tenants, under LXD's word."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jailmgr.engine.answers import done
from jailmgr.engine.requests import Body, body_of, call
from jailmgr.manager import tenants


class NewProject(Body, frozen=True):
    name: str
    config: dict[str, str] = {}


async def list_all(request: Request) -> Response:
    """GET /1.0/projects"""
    return done(await call(request, tenants.list_tenants))


async def add(request: Request) -> Response:
    """POST /1.0/projects"""
    body = await body_of(request, NewProject)
    return done(await call(request, tenants.create_tenant, body.name, body.config))


async def show(request: Request) -> Response:
    """GET /1.0/projects/NAME"""
    return done(await call(request, tenants.get_tenant, request.path_params["name"]))


async def remove(request: Request) -> Response:
    """DELETE /1.0/projects/NAME: an empty one."""
    await call(request, tenants.delete_tenant, request.path_params["name"])
    return done({})
