"""Gives every request a span; in place only where traces are sent somewhere."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitwatt.telemetry.tracing import Tracing

__all__ = ["TraceRequests"]

_NO_RESPONSE_STATUS = 499


class TraceRequests:
    """Outermost, so that what all others do lies within the span."""

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _NO_RESPONSE_STATUS

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        with self._tracing.request(scope["path"], headers) as span:
            try:
                await self._app(scope, receive, send_and_see)
            finally:
                span.set_outcome(
                    method=scope["method"],
                    route=getattr(scope.get("route"), "path", "unmatched"),
                    status=status,
                    request_id=scope.get("state", {}).get("request_id"),
                )
