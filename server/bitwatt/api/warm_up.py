"""Has FastAPI build, before the first caller, what it builds for each route's first request."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import APIRoute
from starlette.types import Message

__all__ = ["warm_up"]


async def warm_up(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Ask every route of these routers that takes a body for nothing, which each refuses.

    It goes past the middleware: no metric, log, trace or limit tells of it.
    """
    inner = AsyncExitStackMiddleware(app.router)
    routes = [route for router in routers for route in router.routes]
    for path in [r.path for r in routes if isinstance(r, APIRoute) and r.body_field]:
        scope: dict[str, Any] = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "app": app,
            "state": {},
        }
        with suppress(RequestValidationError):  # the body lacks everything
            await inner(scope, _empty_body, _nowhere)


async def _empty_body() -> Message:
    return {"type": "http.request", "body": b"{}", "more_body": False}


async def _nowhere(message: Message) -> None:
    """Send nobody the answer."""
