"""/1.0/images: built root file systems, named by fingerprint, a prefix of it, or an alias."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jailmgr.engine.answers import accepted, done
from jailmgr.engine.instances import Source
from jailmgr.engine.requests import Body, begin, body_of, call, engine_of, own_all
from jailmgr.manager import images
from jailmgr.progress import Cancelled, Progress


class NewImage(Body, frozen=True):
    source: Source
    refresh: bool = False


async def list_all(request: Request) -> Response:
    """GET /1.0/images"""
    return done(await call(request, images.list_images, own_all(request)))


async def add(request: Request) -> Response:
    """POST /1.0/images: build an image of a template, unless there is one of the same recipe."""
    engine, body = engine_of(request), await body_of(request, NewImage)

    def work(progress: Progress, cancelled: Cancelled) -> dict[str, str]:
        image = images.ensure_image(engine.manager, body.source.alias, progress, cancelled, body.refresh)
        return {"fingerprint": image.fingerprint}

    return accepted(begin(request, "", f"building {body.source.alias}", work, may_cancel=True))


async def show(request: Request) -> Response:
    """GET /1.0/images/REFERENCE"""
    return done(await call(request, images.get_image, request.path_params["reference"], own_all(request)))


async def remove(request: Request) -> Response:
    """DELETE /1.0/images/REFERENCE"""
    await call(request, images.delete_image, request.path_params["reference"])
    return done({})
