"""/1.0/projects: tenants, under LXD's word."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jailmgr.engine.answers import done
from jailmgr.engine.requests import Body, body_of, call, number
from jailmgr.manager import tenant_view, tenants


class NewProject(Body, frozen=True):
    name: str
    config: dict[str, str] = {}


class Changes(Body, frozen=True):
    """null unsets a key."""

    config: dict[str, str | None]


async def list_all(request: Request) -> Response:
    """GET /1.0/projects: paths, with `recursion=1` the tenants themselves."""
    found = await call(request, tenant_view.list_tenants)
    if number(request, "recursion", 0) > 0:
        return done(found)
    return done([f"/1.0/projects/{tenant.name}" for tenant in found])


async def add(request: Request) -> Response:
    """POST /1.0/projects"""
    body = await body_of(request, NewProject)
    await call(request, tenants.create_tenant, body.name, body.config)
    return done(await call(request, tenant_view.get_tenant, body.name))


async def show(request: Request) -> Response:
    """GET /1.0/projects/NAME"""
    return done(await call(request, tenant_view.get_tenant, request.path_params["name"]))


async def change(request: Request) -> Response:
    """PATCH /1.0/projects/NAME: all of it holds when answered."""
    body, name = await body_of(request, Changes), request.path_params["name"]
    await call(request, tenants.set_tenant, name, body.config)
    return done(await call(request, tenant_view.get_tenant, name))


async def remove(request: Request) -> Response:
    """DELETE /1.0/projects/NAME: an empty one."""
    await call(request, tenants.delete_tenant, request.path_params["name"])
    return done({})
