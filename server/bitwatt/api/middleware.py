"""What every request passes on its way in.

TraceRequests, where traces are sent somewhere, then Gateway, RequireKey, LimitOpen and LimitBody.

All are plain ASGI: they hand `receive` and `send` through, so a client's going away is seen at
once by whoever serves it.
"""

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Collection
from hashlib import sha256

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitwatt.api.errors import CLIENT_CLOSED_REQUEST, describe, error_response
from bitwatt.errors import QueueFullError
from bitwatt.telemetry.declarations import HTTP_REQUESTS
from bitwatt.telemetry.logs import current_request_id
from bitwatt.telemetry.metrics import Metrics
from bitwatt.telemetry.tracing import Tracing

__all__ = ["KEY_DIGEST", "Gateway", "LimitBody", "LimitOpen", "RequireKey", "TraceRequests"]

KEY_DIGEST = "bitwatt.key_digest"

_CALLERS_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})
_POLLED = frozenset({"/health", "/ready", "/metrics"})

logger = logging.getLogger(__name__)


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _log_access(method: str, route: str, status: int, duration_s: float) -> None:
    is_quiet = method == "GET" and (status < 400 or route in _POLLED)
    level = logging.DEBUG if is_quiet else logging.INFO
    if logger.isEnabledFor(level):
        logger.log(
            level,
            "%s %s %d in %.3f s",
            method,
            route,
            status,
            duration_s,
            extra={"method": method, "route": route, "status": status, "duration_s": duration_s},
        )


class TraceRequests:
    """Gives the request a span. Outermost, so that what all others do lies within it.

    In place only where traces are sent somewhere.
    """

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_CLOSED_REQUEST

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


class Gateway:
    """Gives the request an id, answers what nothing else has caught, and counts.

    The id is the caller's X-Request-Id where it is a sane one, and comes back as X-Request-Id.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        callers = _header(scope, b"x-request-id")
        if callers is not None and _CALLERS_REQUEST_ID.fullmatch(callers):
            request_id = callers
        else:
            request_id = secrets.token_hex(12).encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        current_request_id.set(request_id.decode())
        began_s = time.perf_counter()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed", request_id.decode())
            if status is not None:
                raise
            await describe(error).response()(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            status = status or CLIENT_CLOSED_REQUEST
            self._metrics[HTTP_REQUESTS].labels(route, method, str(status)).inc()
            _log_access(method, route, status, time.perf_counter() - began_s)


class RequireKey:
    """Lets a request pass with one of the keys, or to an open path.

    Leaves the digest of the key a request came with in its scope, under KEY_DIGEST.

    key_digests  SHA-256 of each key; empty lets everyone pass
    """

    def __init__(
        self, app: ASGIApp, *, key_digests: Collection[bytes], open_paths: Collection[str]
    ) -> None:
        self._app = app
        self._key_digests = tuple(key_digests)
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._key_digests:
            await self._app(scope, receive, send)
            return
        digest = self._known_digest(scope)
        if digest is not None or scope["path"] in self._open_paths:
            scope[KEY_DIGEST] = digest
            await self._app(scope, receive, send)
            return
        response = error_response(
            401,
            "a valid API key is needed: Authorization: Bearer KEY",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)

    def _known_digest(self, scope: Scope) -> bytes | None:
        scheme, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        digest = sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._key_digests]
        return digest if any(matches) else None


class LimitOpen:
    """Turns requests with a body away while max_open of them are open.

    What waits in an engine's queue has been read and encoded; this bounds what comes before.
    """

    def __init__(self, app: ASGIApp, *, max_open: int) -> None:
        self._app = app
        self._max_open = max_open
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._num_open >= self._max_open:
            full = QueueFullError(f"{self._max_open} requests are open (--max-open-requests)")
            await describe(full).response()(scope, receive, send)
            return
        self._num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_open -= 1


class LimitBody:
    """Refuses a body of more than max_bytes, by its declared length or as it comes.

    A body that takes longer than timeout_s is given up, and its connection with it.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = _header(scope, b"content-length") or b"0"
        if not declared.isdigit() or len(declared) > 15 or int(declared) > self._max_bytes:
            # The connection stays open: closed while the body still comes, the answer is lost.
            response = error_response(413, self._message, "request_too_large")
            await response(scope, receive, send)
            return
        num_bytes = 0
        is_complete = False
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s

        async def counted() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408,
                    f"the body took longer than {self._timeout_s:g} s (--body-timeout)",
                    {"Connection": "close"},
                ) from None
            num_bytes += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if num_bytes > self._max_bytes:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, counted, send)

    @property
    def _message(self) -> str:
        return f"the body has more than {self._max_bytes} bytes (--max-body-bytes)"
