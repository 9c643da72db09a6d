"""/1.0/templates: the recipes that images are built from."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jailmgr.engine.answers import done
from jailmgr.engine.requests import call
from jailmgr.manager import images


async def list_all(request: Request) -> Response:
    """GET /1.0/templates"""
    return done(await call(request, images.list_templates))


async def show(request: Request) -> Response:
    """GET /1.0/templates/NAME[/RELEASE[/VARIANT]]"""
    return done(await call(request, images.show_template, request.path_params["name"]))


async def plan(request: Request) -> Response:
    """GET /1.0/build-plans/SOURCE: what a build does."""
    return done(await call(request, images.plan_image, request.path_params["name"]))
