"""The three envelopes of LXD's REST API: sync, async and error, and how exceptions become the last.

No answer ever holds a traceback: what isn't a JailmgrError is logged and told as an internal error.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jailmgr.errors import STATUS, JailmgrError, from_os

if TYPE_CHECKING:
    from jailmgr.engine.background import Operation

log = logging.getLogger(__name__)

_ENCODER = msgspec.json.Encoder()
_CODE = {404: "missing", 403: "denied", 503: "unavailable"}


def done(metadata: Any = None) -> Response:
    """200 with the result; `metadata` is anything msgspec encodes."""
    return answer(200, {"type": "sync", "status": "Success", "status_code": 200, "metadata": metadata})


def accepted(operation: Operation) -> Response:
    """202 with the operation that has begun; Location is its path."""
    content = {
        "type": "async",
        "status": "Operation created",
        "status_code": 100,
        "operation": operation.path,
        "metadata": operation.view(),
    }
    return answer(202, content, {"location": operation.path})


def refused(error: JailmgrError, status: int | None = None) -> Response:
    """The error with its HTTP status (errors.STATUS), or another one that says it better."""
    return answer(status or STATUS[error.code], error_content(error, status))


def error_content(error: JailmgrError, status: int | None = None) -> dict[str, Any]:
    return {
        "type": "error",
        "error": str(error),
        "error_code": status or STATUS[error.code],
        "metadata": error.as_dict(),
    }


def answer(status: int, content: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(_ENCODER.encode(content), status, headers, "application/json")


def as_jailmgr_error(error: Exception, what: str) -> JailmgrError:
    """What a user is told of any exception met while doing `what`. Those that nobody foresaw are logged whole."""
    if isinstance(error, JailmgrError):
        return error
    log.error("%s", what, exc_info=error)
    if isinstance(error, OSError):
        return from_os(what, error, "The engine's log (engine.log) has the details.")
    hint = "This is a fault of jailmgr; the engine's log (engine.log) has the details."
    return JailmgrError(what, f"internal error ({type(error).__name__})", hint)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, method not allowed, body too large."""
    assert isinstance(error, HTTPException)
    told = JailmgrError(
        f"{request.method} {request.url.path}", error.detail, "", _CODE.get(error.status_code, "invalid")
    )
    return answer(error.status_code, error_content(told, error.status_code), dict(error.headers or {}))
