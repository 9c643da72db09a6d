"""What handlers take from a request: the engine behind it, its tenant, flags, and a strictly decoded body."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from jailmgr.config import Root
from jailmgr.engine.background import Operations
from jailmgr.errors import JailmgrError
from jailmgr.manager.host import DEFAULT_TENANT, Manager

BODY_MAX = 1024 * 1024
"""Bytes of a request's body."""

P = ParamSpec("P")
T = TypeVar("T")


class Engine(NamedTuple):
    """What every handler works with. `threads` run the manager's functions, which block."""

    root: Root
    manager: Manager
    operations: Operations
    threads: ThreadPoolExecutor
    started_at: float


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all request bodies: a field nobody knows is a mistake, not a wish to be dropped silently."""


def engine_of(request: Request) -> Engine:
    engine = request.app.state.engine
    assert isinstance(engine, Engine)
    return engine


def tenant_of(request: Request) -> str:
    """LXD's `?project=`."""
    return request.query_params.get("project") or DEFAULT_TENANT


def tenants_of(request: Request) -> str | None:
    """The tenant that a list is of; None for all (`?all-projects=true`)."""
    return None if flag(request, "all-projects") else tenant_of(request)


def flag(request: Request, name: str) -> bool:
    """A truth value of the query; JailmgrError `invalid` for anything but 1, true, 0, false or nothing."""
    match request.query_params.get(name, "").lower():
        case "1" | "true":
            return True
        case "0" | "false" | "":
            return False
        case other:
            raise JailmgrError(f"parameter {name}", f"{other!r} is neither true nor false", "", "invalid")


def number(request: Request, name: str, default: float) -> float:
    """A number of the query, seconds as a rule."""
    text = request.query_params.get(name, "")
    try:
        found = float(text) if text else default
    except ValueError:
        found = float("nan")
    if not -1 <= found < 2**31:
        raise JailmgrError(f"parameter {name}", f"{text!r} is not a number this takes", "", "invalid")
    return found


async def body_of(request: Request, kind: type[T]) -> T:
    """The body as a `kind`: JailmgrError `invalid` for what is not one, status 413 where it is over BODY_MAX."""
    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > BODY_MAX:
                raise HTTPException(413, f"the body is over {BODY_MAX} bytes", {"connection": "close"})
        return msgspec.json.decode(content, type=kind)
    except ClientDisconnect as error:
        raise JailmgrError("request body", "the client hung up in the middle of it", "", "invalid") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise JailmgrError("request body", str(error), "", "invalid") from error


async def call(
    request: Request, function: Callable[Concatenate[Manager, P], T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Call one of the manager's functions in a thread, so that its waiting holds up no other request."""
    engine = engine_of(request)
    work = partial(function, engine.manager, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(engine.threads, work)
