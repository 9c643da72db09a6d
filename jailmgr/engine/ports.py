"""/1.0/ports: published ports. Not LXD's: there they are devices of an instance, as they are here underneath."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from jailmgr.engine.answers import done
from jailmgr.engine.requests import Body, body_of, call, listed, own, tenant_of
from jailmgr.manager import publishing

Number = Annotated[int, Meta(ge=1, le=65535)]
Protocol = Literal["tcp", "udp"]


class NewPort(Body, frozen=True):
    """`host_address`: empty for every address of the host."""

    jail: str
    host_port: Number
    port: Number
    host_address: str = ""
    protocol: Protocol = "tcp"
    tenant: str | None = None


class OldPort(Body, frozen=True):
    """What is left out fits all: both protocols, every address."""

    jail: str
    host_port: Number
    host_address: str | None = None
    protocol: Protocol | None = None
    tenant: str | None = None


async def list_all(request: Request) -> Response:
    """GET /1.0/ports"""
    return done([port for tenant in listed(request) for port in await call(request, publishing.list_ports, tenant)])


async def add(request: Request) -> Response:
    """POST /1.0/ports: published when answered."""
    body = await body_of(request, NewPort)
    where = (_tenant(request, body), body.jail, body.host_address, body.host_port, body.port, body.protocol)
    return done(await call(request, publishing.publish, *where))


async def remove(request: Request) -> Response:
    """DELETE /1.0/ports"""
    body = await body_of(request, OldPort)
    where = (_tenant(request, body), body.jail, body.host_port, body.protocol, body.host_address)
    await call(request, publishing.unpublish, *where)
    return done({})


def _tenant(request: Request, body: NewPort | OldPort) -> str:
    return own(request, body.tenant) if body.tenant else tenant_of(request)
