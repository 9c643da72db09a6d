"""/1.0/operations: what runs in the background, and what has ended a short while ago."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jailmgr.engine.answers import done
from jailmgr.engine.background import Operation, no_such, wait
from jailmgr.engine.requests import engine_of, number, own_all


async def list_all(request: Request) -> Response:
    """GET /1.0/operations: by lower-case status, as LXD has it; paths, or whole with `recursion=1`."""
    whole = number(request, "recursion", 0) > 0
    found: dict[str, list[Any]] = {}
    for operation in engine_of(request).operations.all():
        if not _may_see(request, operation):
            continue
        found.setdefault(operation.status.lower(), []).append(operation.view() if whole else operation.path)
    return done(found)


async def show(request: Request) -> Response:
    """GET /1.0/operations/ID"""
    return done(_operation(request).view())


async def wait_for(request: Request) -> Response:
    """GET /1.0/operations/ID/wait?timeout=S: when it has ended, or after S seconds (-1, the default: without end)."""
    operation = _operation(request)
    await wait(operation.ended, number(request, "timeout", -1))
    return done(operation.view())


async def cancel(request: Request) -> Response:
    """DELETE /1.0/operations/ID"""
    engine_of(request).operations.cancel(_operation(request))
    return done({})


def _operation(request: Request) -> Operation:
    operation = engine_of(request).operations.get(request.path_params["id"])
    if not _may_see(request, operation):
        raise no_such(request.path_params["id"])
    return operation


def _may_see(request: Request, operation: Operation) -> bool:
    tenants = own_all(request)
    return tenants is None or operation.tenant in tenants
