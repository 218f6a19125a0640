"""JSON in and out: bodies read strictly, within bounds and without numbers that JSON lacks."""

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

__all__ = ["JsonRoute", "json_response"]


def json_response(data: object, status: int = 200) -> Response:
    """Return the struct, or plain data, as JSON."""
    return Response(msgspec.json.encode(data), status, media_type="application/json")


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON: {str(error)[:200]}") from None


class JsonRoute(APIRoute):
    """A route whose body is strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            if request.method == "POST" and not _is_json(request):
                raise HTTPException(415, "the body must be JSON: Content-Type: application/json")
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json"
