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
from jailmgr.engine.callers import denied
from jailmgr.engine.requests import Engine, caller_of, known

Handler = Callable[[Request], Awaitable[Response]]


def resource(path: str, users: tuple[str, ...] = (), **handlers: Handler) -> Route:
    """A path and its handler for each method; others get 405 with a complete Allow (RFC 9110, 15.5.6).

    `users`: the methods that callers who are not root may use too, within the tenants that name them.
    """

    async def dispatch(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        try:
            if caller_of(request) is not None and method not in users:
                raise denied(f"{request.method} {request.url.path}")
            await known(request)
            return await handlers[method](request)
        except HTTPException:
            raise
        except Exception as error:  # noqa: BLE001  the last one who can tell the client
            return refused(as_jailmgr_error(error, f"{request.method} {request.url.path}"))

    return Route(path, dispatch, methods=list(handlers))


READ = ("GET",)

ROUTES = [
    resource("/", READ, GET=server.versions),
    resource("/1.0", READ, GET=server.show),
    resource("/1.0/instances", ("GET", "POST"), GET=instances.list_all, POST=instances.add),
    resource(
        "/1.0/instances/{name}",
        ("GET", "PATCH", "POST", "DELETE"),
        GET=instances.show,
        PATCH=instances.change,
        POST=instances.rename,
        DELETE=instances.remove,
    ),
    resource("/1.0/instances/{name}/console", READ, GET=instances.show_console),
    resource("/1.0/instances/{name}/state", ("GET", "PUT"), GET=instances.show_state, PUT=instances.change_state),
    resource("/1.0/images", READ, GET=images.list_all, POST=images.add),
    resource("/1.0/images/{reference:path}", READ, GET=images.show, DELETE=images.remove),
    resource("/1.0/templates", READ, GET=templates.list_all),
    resource("/1.0/build-plans/{name:path}", READ, GET=templates.plan),
    resource("/1.0/templates/{name:path}", READ, GET=templates.show),
    resource("/1.0/networks", READ, GET=networks.list_all),
    resource("/1.0/ports", ("GET", "POST", "DELETE"), GET=ports.list_all, POST=ports.add, DELETE=ports.remove),
    resource("/1.0/projects", READ, GET=projects.list_all, POST=projects.add),
    resource("/1.0/projects/{name}", READ, GET=projects.show, PATCH=projects.change, DELETE=projects.remove),
    resource("/internal/autostart", POST=server.autostart),
    resource("/internal/usage", READ, GET=projects.bill),
    resource("/1.0/operations", READ, GET=operations.list_all),
    resource("/1.0/operations/{id}", ("GET", "DELETE"), GET=operations.show, DELETE=operations.cancel),
    resource("/1.0/operations/{id}/wait", READ, GET=operations.wait_for),
]


def make_app(engine: Engine) -> Starlette:
    """The ASGI application that serves `engine`."""
    app = Starlette(routes=ROUTES, exception_handlers={HTTPException: on_http_error})
    app.router.redirect_slashes = False
    app.state.engine = engine
    return app
