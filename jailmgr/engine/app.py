"""The API's routes. Each handler reads its request, calls one function of the manager, and answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jailmgr.engine import images, instances, networks, operations, ports, projects, server, templates
from jailmgr.engine.answers import as_jailmgr_error, on_http_error, refused
from jailmgr.engine.requests import Engine

Handler = Callable[[Request], Awaitable[Response]]


def resource(path: str, **handlers: Handler) -> Route:
    """A path and its handler for each method; others get 405 with a complete Allow (RFC 9110, 15.5.6)."""

    async def dispatch(request: Request) -> Response:
        try:
            return await handlers["GET" if request.method == "HEAD" else request.method](request)
        except HTTPException:
            raise
        except Exception as error:  # noqa: BLE001  the last one who can tell the client
            return refused(as_jailmgr_error(error, f"{request.method} {request.url.path}"))

    return Route(path, dispatch, methods=list(handlers))


ROUTES = [
    resource("/", GET=server.versions),
    resource("/1.0", GET=server.show),
    resource("/1.0/instances", GET=instances.list_all, POST=instances.add),
    resource(
        "/1.0/instances/{name}",
        GET=instances.show,
        PATCH=instances.change,
        POST=instances.rename,
        DELETE=instances.remove,
    ),
    resource("/1.0/instances/{name}/state", GET=instances.show_state, PUT=instances.change_state),
    resource("/1.0/images", GET=images.list_all, POST=images.add),
    resource("/1.0/images/{reference:path}", GET=images.show, DELETE=images.remove),
    resource("/1.0/templates", GET=templates.list_all),
    resource("/1.0/templates/{name}", GET=templates.show),
    resource("/1.0/networks", GET=networks.list_all),
    resource("/1.0/ports", GET=ports.list_all, POST=ports.add, DELETE=ports.remove),
    resource("/1.0/projects", GET=projects.list_all, POST=projects.add),
    resource("/1.0/projects/{name}", GET=projects.show, PATCH=projects.change, DELETE=projects.remove),
    resource("/internal/autostart", POST=server.autostart),
    resource("/1.0/operations", GET=operations.list_all),
    resource("/1.0/operations/{id}", GET=operations.show, DELETE=operations.cancel),
    resource("/1.0/operations/{id}/wait", GET=operations.wait_for),
]


def make_app(engine: Engine) -> Starlette:
    """The ASGI application that serves `engine`."""
    app = Starlette(routes=ROUTES, exception_handlers={HTTPException: on_http_error})
    app.router.redirect_slashes = False
    app.state.engine = engine
    return app
