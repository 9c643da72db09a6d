"""/1.0/projects: tenants, under LXD's word."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from jailmgr.engine.answers import done
from jailmgr.engine.requests import Body, body_of, call, engine_of, number, own, own_all
from jailmgr.manager import access, tenant_view, tenants


class NewProject(Body, frozen=True):
    name: str
    config: dict[str, str] = {}


class Changes(Body, frozen=True):
    """null unsets a key."""

    config: dict[str, str | None]


async def list_all(request: Request) -> Response:
    """GET /1.0/projects: paths, with `recursion=1` the tenants themselves."""
    tenants = own_all(request)
    found = [each for each in await call(request, tenant_view.list_tenants) if tenants is None or each.name in tenants]
    if number(request, "recursion", 0) > 0:
        return done(found)
    return done([f"/1.0/projects/{tenant.name}" for tenant in found])


async def add(request: Request) -> Response:
    """POST /1.0/projects"""
    body = await body_of(request, NewProject)
    await call(request, tenants.create_tenant, body.name, body.config)
    await _settle(request)
    return done(await call(request, tenant_view.get_tenant, body.name))


async def show(request: Request) -> Response:
    """GET /1.0/projects/NAME"""
    return done(await call(request, tenant_view.get_tenant, own(request, request.path_params["name"])))


async def change(request: Request) -> Response:
    """PATCH /1.0/projects/NAME: all of it holds when answered."""
    body, name = await body_of(request, Changes), request.path_params["name"]
    await call(request, tenants.set_tenant, name, body.config)
    await _settle(request)
    return done(await call(request, tenant_view.get_tenant, name))


async def bill(request: Request) -> Response:
    """GET /internal/usage?since=S&until=S[&project=NAME]: what was used between two times since the epoch."""
    since, until = number(request, "since", 0), number(request, "until", time.time())
    name = request.query_params.get("project")
    tenants = [own(request, name)] if name else own_all(request)
    return done(await call(request, tenant_view.billed, tenants, since, until))


async def remove(request: Request) -> Response:
    """DELETE /1.0/projects/NAME: an empty one."""
    await call(request, tenants.delete_tenant, request.path_params["name"])
    await _settle(request)
    return done({})


async def _settle(request: Request) -> None:
    """The door for users is there while a tenant names any."""
    await engine_of(request).door.settle(await call(request, access.is_shared))
