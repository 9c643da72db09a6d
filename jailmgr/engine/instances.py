"""/1.0/instances: jails, their configuration and their state."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from jailmgr.engine.answers import accepted, done
from jailmgr.engine.requests import Body, begin, body_of, call, caller_of, engine_of, flag, listed, number, tenant_of
from jailmgr.errors import full_name
from jailmgr.keys import check_name
from jailmgr.manager import configure, create, delete, restart, start, stop, view
from jailmgr.manager.host import Manager
from jailmgr.model import JailInfo
from jailmgr.progress import Cancelled, Progress
from jailmgr.runtime.logs import shown

STATUS_CODE = {"Running": 103, "Stopped": 102, "Frozen": 110, "Error": 112}
"""LXD's codes of an instance's state."""


class Source(Body, frozen=True):
    """`alias`: a template, or an image's alias, fingerprint or prefix of one, as on the command line."""

    type: Literal["template", "image"]
    alias: str


class NewInstance(Body, frozen=True):
    source: Source
    name: str | None = None
    config: dict[str, str] = {}
    devices: dict[str, dict[str, str]] = {}
    start: bool = False
    wait: bool = False
    """With `start`: the operation ends when init has reported that the system is up."""


class Changes(Body, frozen=True):
    """null unsets a key, or takes a device away."""

    config: dict[str, str | None] = {}
    devices: dict[str, dict[str, str | None] | None] = {}


class Rename(Body, frozen=True):
    name: str


class StateChange(Body, frozen=True):
    action: Literal["start", "stop", "restart", "freeze", "unfreeze"]
    timeout: Annotated[int, Meta(ge=-1, le=86400)] | None = None
    """Seconds until init is killed; -1 as None: what the image says."""
    force: bool = False
    wait: bool = False


async def list_all(request: Request) -> Response:
    """GET /1.0/instances: paths, with `recursion=1` or 2 the jails themselves."""
    found = [jail for tenant in listed(request) for jail in await call(request, view.list_jails, tenant)]
    if number(request, "recursion", 0) > 0:
        return done(found)
    return done([_path(jail.tenant, jail.name) for jail in found])


async def add(request: Request) -> Response:
    """POST /1.0/instances: what can be refused is refused at once, the rest is an operation that can be cancelled."""
    engine, body, tenant = engine_of(request), await body_of(request, NewInstance), tenant_of(request)
    wanted = (tenant, body.name, body.source.alias, body.config, body.devices)
    root = caller_of(request) is None
    await call(request, create.check_new, *wanted, root=root)
    make = partial(create.launch, wait=body.wait) if body.start else create.create

    def work(progress: Progress, cancelled: Cancelled) -> dict[str, str]:
        jail = make(engine.manager, *wanted, root=root, progress=progress, cancelled=cancelled)
        return {"name": jail.name, "tenant": jail.tenant}

    title = f"{'launching' if body.start else 'creating'} {body.name or body.source.alias}"
    resources = {"instances": [_path(tenant, body.name)]} if body.name else {}
    return accepted(begin(request, tenant, title, work, resources, may_cancel=True))


async def show(request: Request) -> Response:
    """GET /1.0/instances/NAME"""
    return done(await _info(request))


async def show_console(request: Request) -> Response:
    """GET /1.0/instances/NAME/console: what the console has shown, as it is."""
    tenant, name = _jail(request)
    return Response(await call(request, _console_log, tenant, name), media_type="application/octet-stream")


async def show_state(request: Request) -> Response:
    """GET /1.0/instances/NAME/state: usage under LXD's names."""
    jail = await _info(request)
    return done(
        {
            "status": jail.status,
            "status_code": STATUS_CODE.get(jail.status, STATUS_CODE["Error"]),
            "pid": jail.init_pid or 0,
            "processes": jail.usage.processes,
            "cpu": {"usage": jail.usage.cpu_ns},
            "memory": {"usage": jail.usage.memory_bytes},
            "disk": {"root": {"usage": jail.usage.disk_bytes}},
            "started_at": jail.started_at,
        }
    )


async def change(request: Request) -> Response:
    """PATCH /1.0/instances/NAME: done when answered; tells which keys need a restart to take effect."""
    body, (tenant, name) = await body_of(request, Changes), _jail(request)
    root = caller_of(request) is None
    restart_needed = await call(request, configure.configure, tenant, name, body.config, body.devices, root=root)
    return done({"restart_needed": restart_needed})


async def rename(request: Request) -> Response:
    """POST /1.0/instances/NAME"""
    body, (tenant, name) = await body_of(request, Rename), _jail(request)
    check_name(body.name)
    return await _begin(request, f"renaming {full_name(tenant, name)} to {body.name}", configure.rename, body.name)


async def remove(request: Request) -> Response:
    """DELETE /1.0/instances/NAME?force=1"""
    tenant, name = _jail(request)
    return await _begin(request, f"deleting {full_name(tenant, name)}", delete.delete, force=flag(request, "force"))


async def change_state(request: Request) -> Response:
    """PUT /1.0/instances/NAME/state"""
    body, (tenant, name) = await body_of(request, StateChange), _jail(request)
    timeout = None if body.timeout == -1 else body.timeout
    match body.action:
        case "start":
            return await _begin(request, f"starting {full_name(tenant, name)}", start.start, wait=body.wait)
        case "stop":
            return await _begin(
                request, f"stopping {full_name(tenant, name)}", stop.stop, force=body.force, timeout=timeout
            )
        case "restart":
            return await _begin(
                request,
                f"restarting {full_name(tenant, name)}",
                restart.restart,
                force=body.force,
                timeout=timeout,
                wait=body.wait,
            )
        case "freeze":
            return await _begin(request, f"freezing {full_name(tenant, name)}", stop.freeze)
        case "unfreeze":
            return await _begin(request, f"unfreezing {full_name(tenant, name)}", stop.unfreeze)


async def _info(request: Request) -> JailInfo:
    return await call(request, view.info, *_jail(request))


async def _begin(request: Request, title: str, use_case: Any, *args: Any, **kwargs: Any) -> Response:
    """An operation on the jail of the path; 404 at once where there is none."""
    engine, (tenant, name) = engine_of(request), _jail(request)
    await call(request, _check_known, tenant, name)

    def work(_progress: Progress, _cancelled: Cancelled) -> Any:
        return use_case(engine.manager, tenant, name, *args, **kwargs)

    return accepted(begin(request, tenant, title, work, {"instances": [_path(tenant, name)]}))


def _check_known(m: Manager, tenant: str, name: str) -> None:
    """JailmgrError `missing`. Whether one that is being made or deleted is in the way, the use case says."""
    if m.store.find_row(tenant, name) is None:
        m.store.jail(tenant, name)


def _console_log(m: Manager, tenant: str, name: str) -> bytes:
    _check_known(m, tenant, name)
    return shown(m.root, tenant, name)


def _jail(request: Request) -> tuple[str, str]:
    return tenant_of(request), request.path_params["name"]


def _path(tenant: str, name: str) -> str:
    return f"/1.0/instances/{name}?project={tenant}"
