"""POST /bitwatt/v1/twin/v1/…: what the page asks the twin that another server has."""

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from bitwatt.api.client_link import tied_to_client
from bitwatt.api.dependencies import SettingsOf, TwinOf
from bitwatt.api.errors import ClientDisconnectedError
from bitwatt.serving.remote_twin import RemoteTwin
from bitwatt.serving.twins import Posted

__all__ = ["router"]

_PREFIX = "/bitwatt/v1/twin"

router = APIRouter(prefix=_PREFIX, include_in_schema=False)


class _Relay(Response):
    """Sends what the twin answers as it comes. When the client goes, the twin is told so."""

    def __init__(self, twin: RemoteTwin, posted: Posted, *, timeout_s: float) -> None:
        self.background = None
        self._twin = twin
        self._posted = posted
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        has_started = False
        try:
            async with (
                tied_to_client(receive, timeout_s=self._timeout_s),
                self._twin.post(self._posted) as answer,
            ):
                self.status_code = answer.status_code
                self.init_headers(
                    {
                        "content-type": answer.headers.get("content-type", "text/plain"),
                        "cache-control": "no-cache",
                        "x-accel-buffering": "no",
                    }
                )
                headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": headers,
                    }
                )
                has_started = True
                async for data in answer.aiter_bytes():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientDisconnectedError:
            if not has_started:
                raise


@router.post("/v1/completions")
@router.post("/v1/chat/completions")
async def ask_twin(request: Request, twin: TwinOf, settings: SettingsOf) -> Response:
    """Ask the twin the same, with the key that this server has for it."""
    if twin is None:
        raise HTTPException(404)
    path = request.scope["path"].removeprefix(_PREFIX)
    posted = Posted(path, await request.body())
    return _Relay(twin, posted, timeout_s=settings.request_timeout)
