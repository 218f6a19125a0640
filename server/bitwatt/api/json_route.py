"""JSON in and out: bodies read strictly, within bounds and without numbers that JSON lacks."""

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from bitwatt.errors import shorten

__all__ = ["JsonRoute", "LargeBodyTurns", "json_response"]

MAX_PARTS = 2**14
_LARGE_BYTES = 64 * 2**10
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # to the end, where it has none


def json_response(
    data: object, status: int = 200, *, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the struct, or plain data, as JSON."""
    return Response(msgspec.json.encode(data), status, headers, "application/json")


class LargeBodyTurns:
    """Has large bodies, which hold the event loop while they are read and checked, take turns.

    Between two of them the rest of the server has as long as the first of them took.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._free_from_s = 0.0

    async def take(self) -> None:
        """Wait for a turn. It lasts until the task that took it next waits for something."""
        await self._lock.acquire()
        try:
            await asyncio.sleep(self._free_from_s - time.monotonic())
        except BaseException:
            self._lock.release()
            raise
        asyncio.get_running_loop().call_soon(self._end, time.monotonic())

    def _end(self, began_s: float) -> None:
        now_s = time.monotonic()
        self._free_from_s = now_s + (now_s - began_s)
        self._lock.release()


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        if len(body) < _LARGE_BYTES:
            return _parse(body)
        turns: LargeBodyTurns = self.app.state.large_body_turns
        await turns.take()
        if _count_parts(body) > MAX_PARTS and _count_parts(_STRING.sub(b"", body)) > MAX_PARTS:
            raise HTTPException(
                400, f"the body has more than {MAX_PARTS} objects, arrays and fields"
            )
        return _parse(body)


def _parse(body: bytes) -> Any:
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {str(error)[:200]}") from None


def _count_parts(text: bytes) -> int:
    return sum(map(text.count, (b"{", b"[", b":")))


class JsonRoute(APIRoute):
    """A route whose body is strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            if request.method == "POST" and not _is_json(request):
                raise HTTPException(415, "the body must be JSON: Content-Type: application/json")
            encoding = ", ".join(request.headers.getlist("content-encoding"))
            codings = {coding.strip().lower() for coding in encoding.split(",")}
            if not codings <= {"identity", ""}:
                raise HTTPException(
                    415,
                    f"a body in Content-Encoding {shorten(encoding)} is not read; send it as it is",
                    {"Accept-Encoding": "identity"},
                )
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json"
