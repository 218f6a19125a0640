"""Errors as clients know them: one body, and a status they map.

OpenAI's have four fields; below /v1/messages they are Anthropic's.
"""

import asyncio
import logging
from typing import Any, Literal

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from bitwatt.errors import (
    BitwattError,
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
    shorten,
)

__all__ = [
    "CLIENT_CLOSED_REQUEST",
    "RETRY_AFTER_S",
    "STOPPING",
    "AnthropicErrorBody",
    "ApiError",
    "ClientDisconnectedError",
    "RequestTimeoutError",
    "describe",
    "error_response",
    "example_error",
    "install_error_handlers",
    "is_anthropic",
]

MAX_MESSAGE_CHARS = 1000
RETRY_AFTER_S = 1
CLIENT_CLOSED_REQUEST = 499  # nginx's: the client went away, and nobody reads an answer

STOPPING = "the server is stopping; try again"

ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}

logger = logging.getLogger(__name__)


class ClientDisconnectedError(BitwattError):
    """The client went away; nobody reads an answer."""


class RequestTimeoutError(BitwattError):
    """The request took longer than --request-timeout."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every error, and the event that ends a stream that failed."""

    error: ErrorDetail


class AnthropicErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong, as Anthropic says it."""

    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every error below /v1/messages, and the event that ends a stream that failed."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetail
    request_id: str


class ApiError(msgspec.Struct, frozen=True):
    """An error, ready to be sent."""

    status: int
    body: ErrorBody
    headers: dict[str, str] = {}

    def encode(self) -> bytes:
        """Return the body as JSON."""
        return msgspec.json.encode(self.body)

    def for_anthropic(self, request_id: str) -> tuple[int, AnthropicErrorBody]:
        """Return the status and body that Anthropic's clients know.

        Whatever is to be tried again is 529 there, overloaded.
        """
        status = 529 if self.status == 503 else self.status
        by_class = "invalid_request_error" if status < 500 else "api_error"
        detail = AnthropicErrorDetail(
            _ANTHROPIC_TYPES.get(status, by_class), self.body.error.message
        )
        return status, AnthropicErrorBody(error=detail, request_id=request_id)

    def response(self) -> Response:
        """Return the whole response, in the shape of the API that was called."""
        return _ErrorResponse(self)


class _ErrorResponse(Response):
    """An error, whose shape the path decides."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.encode(), error.status, error.headers, "application/json")
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_anthropic(scope["path"]):
            await super().__call__(scope, receive, send)
            return
        status, body = self._error.for_anthropic(scope["state"]["request_id"])
        content = msgspec.json.encode(body)
        response = Response(content, status, self._error.headers, "application/json")
        await response(scope, receive, send)


def is_anthropic(path: str) -> bool:
    """Return whether the path is one of Anthropic's API."""
    return path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")


def _error(
    status: int,
    message: str,
    code: str | None,
    *,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> ApiError:
    if status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
    detail = ErrorDetail(message[:MAX_MESSAGE_CHARS], kind, param, code)
    return ApiError(status, ErrorBody(detail), headers or {})


def describe(error: BaseException) -> ApiError:
    """Return the error a caller sees; of one we did not foresee, nothing but that it happened.

    A cancelled request is one that the server no longer waits for as it stops.
    """
    retry = {"Retry-After": str(RETRY_AFTER_S)}
    match error:
        case InvalidRequestError():
            status = 404 if error.code == "model_not_found" else 400
            return _error(status, str(error), error.code, param=error.param)
        case QueueFullError():
            return _error(503, str(error), "queue_full", headers=retry)
        case asyncio.CancelledError():
            return _error(503, STOPPING, "engine_unavailable", headers=retry)
        case EngineUnavailableError():
            return _error(503, str(error), "engine_unavailable", headers=retry)
        case RequestFailedError():
            return _error(500, str(error), "request_failed")
        case RequestTimeoutError():
            return _error(504, str(error), "request_timeout")
        case _:
            return _error(
                500, "the server failed; its log tells more under the request id", "internal_error"
            )


def error_response(
    status: int, message: str, code: str | None, *, headers: dict[str, str] | None = None
) -> Response:
    """Return an error response."""
    return _error(status, message, code, headers=headers).response()


def example_error(status: int, message: str, code: str | None, param: str | None) -> ApiError:
    """Return an error as it would be sent, for the API's description."""
    return _error(status, message, code, param=param)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of ours, of validation and of routing with the one body."""

    async def on_error(_: Request, error: Exception) -> Response:
        return describe(error).response()

    async def on_disconnect(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(BitwattError, on_error)
    app.add_exception_handler(ClientDisconnectedError, on_disconnect)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    loc = first["loc"]
    if first["type"] == "refused" and first["ctx"]["param"] is not None:
        loc = (*loc, first["ctx"]["param"])
    param = _param(loc)
    message = str(first["msg"])
    match first["type"]:
        case "refused":
            pass
        case "missing":
            message = f"{param} is required" if param else "a JSON body is required"
        case _:
            message = f"{param}: {message}, not {shorten(first['input'])}"
    if param is not None and len(param) > 100:
        param = param[:100] + "…"
    return _error(400, message, None, param=param).response()


def _param(loc: tuple[str | int, ...]) -> str | None:
    """Return the field's path as clients write it: messages[0].content."""
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else str(part)
    return path or None


def _is_route(request: Request, path: str) -> bool:
    scope = {**request.scope, "path": path}
    return any(route.matches(scope)[0] is not Match.NONE for route in request.app.routes)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    code: str | None
    match error.status_code:
        case 404:
            code = "not_found"
            message = f"no route {request.method} {shorten(request.url.path)}"
            if _is_route(request, request.url.path.rstrip("/")):
                message += "; there is one without the slash at its end"
            elif request.method == "POST":
                message += (
                    "; models answer at /v1/chat/completions, /v1/responses, /v1/messages, "
                    "/v1/completions"
                )
        case 405:
            message = f"{shorten(request.url.path)} does not take {request.method[:20]}"
            code = "method_not_allowed"
            if headers.get("Allow") == "GET":
                headers["Allow"] = "GET, HEAD"  # middleware.HeadAsGet
        case _:
            code, message = None, str(error.detail)
    return error_response(error.status_code, message, code, headers=headers)
