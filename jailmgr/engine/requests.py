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
from jailmgr.engine.background import Operation, Operations, Work
from jailmgr.engine.callers import OPERATIONS_EACH
from jailmgr.engine.door import Door
from jailmgr.errors import JailmgrError
from jailmgr.manager.access import Caller, tenants_of
from jailmgr.manager.host import Manager
from jailmgr.model import DEFAULT_TENANT

BODY_MAX = 1024 * 1024
"""Bytes of a request's body."""
BODY_SECONDS = 30.0
"""A client has so long to send it."""

P = ParamSpec("P")
T = TypeVar("T")


class Engine(NamedTuple):
    """What every handler works with. `threads` run the manager's functions, which block."""

    root: Root
    manager: Manager
    operations: Operations
    threads: ThreadPoolExecutor
    started_at: float
    door: Door


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all request bodies: a field nobody knows is a mistake, not a wish to be dropped silently."""


def engine_of(request: Request) -> Engine:
    engine = request.app.state.engine
    assert isinstance(engine, Engine)
    return engine


def caller_of(request: Request) -> Caller | None:
    """Who asks, where it isn't root."""
    return request.scope.get("jailmgr.caller")


async def known(request: Request) -> None:
    """Look up which tenants a caller who isn't root may use."""
    caller = caller_of(request)
    if caller is not None:
        request.scope["jailmgr.tenants"] = await call(request, tenants_of, caller)


def own(request: Request, tenant: str) -> str:
    """The tenant, where the caller may use it; JailmgrError `missing`, as if there were none, where not."""
    if caller_of(request) is None or tenant in request.scope["jailmgr.tenants"]:
        return tenant
    yours = ", ".join(request.scope["jailmgr.tenants"])
    hint = f"You may use: {yours} (--tenant, or JAILMGR_TENANT)." if yours else ""
    raise JailmgrError(f"tenant {tenant}", "there is none of that name", hint, "missing")


def own_all(request: Request) -> list[str] | None:
    """The tenants a caller may use; None for root, who may use all."""
    return None if caller_of(request) is None else list(request.scope["jailmgr.tenants"])


def tenant_of(request: Request) -> str:
    """LXD's `?project=`. JailmgrError as `own`."""
    return own(request, request.query_params.get("project") or DEFAULT_TENANT)


def listed(request: Request) -> list[str | None]:
    """The tenants that a list is of; None stands for all (`?all-projects=true`)."""
    if not flag(request, "all-projects"):
        return [tenant_of(request)]
    tenants = own_all(request)
    return [None] if tenants is None else [*tenants]


def begin(
    request: Request,
    tenant: str,
    title: str,
    work: Work,
    resources: dict[str, list[str]] | None = None,
    may_cancel: bool = False,
) -> Operation:
    """Begin an operation on a tenant's behalf, empty for none. JailmgrError `unavailable` where too many run."""
    operations, caller = engine_of(request).operations, caller_of(request)
    uid = 0 if caller is None else caller.uid
    if uid and sum(other.uid == uid for other in operations.running()) >= OPERATIONS_EACH:
        raise JailmgrError(title, f"{OPERATIONS_EACH} operations of yours are under way", "", "unavailable")
    return operations.begin(title, work, resources, may_cancel, tenant, uid)


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
    """The body as a `kind`: JailmgrError `invalid` for what is not one, status 413 where it is over BODY_MAX.

    Which tenants the caller may use is looked up anew: he may have been taken out of one while he held it back.
    """
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > BODY_MAX:
                    raise HTTPException(413, f"the body is over {BODY_MAX} bytes", {"connection": "close"})
        body = msgspec.json.decode(content, type=kind)
    except TimeoutError:
        raise HTTPException(
            408, f"the body did not come within {BODY_SECONDS:.0f} s", {"connection": "close"}
        ) from None
    except ClientDisconnect as error:
        raise JailmgrError("request body", "the client hung up in the middle of it", "", "invalid") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise JailmgrError("request body", str(error), "", "invalid") from error
    await known(request)
    return body


async def call(
    request: Request, function: Callable[Concatenate[Manager, P], T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Call one of the manager's functions in a thread, so that its waiting holds up no other request."""
    engine, caller = engine_of(request), caller_of(request)
    work = partial(function, engine.manager, *args, **kwargs)
    loop = asyncio.get_running_loop()
    if caller is None:
        return await loop.run_in_executor(engine.threads, work)
    async with engine.door.shares.request(caller.uid):
        return await loop.run_in_executor(engine.door.shares.threads, work)
