"""What every request passes on its way in.

TraceRequests, where traces are sent somewhere, then Gateway, CheckHost and CORS
where they are asked for, RequireKey, LimitBody, key_limits.LimitKeys, LimitOpen and HeadAsGet.

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
from typing import NamedTuple

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitwatt.api.errors import CLIENT_CLOSED_REQUEST, describe, error_response, is_anthropic
from bitwatt.errors import BitwattError, QueueFullError, shorten
from bitwatt.telemetry.declarations import HTTP_DURATION, HTTP_REQUESTS, PROBE_REQUESTS
from bitwatt.telemetry.logs import current_request_id
from bitwatt.telemetry.metrics import Metrics
from bitwatt.telemetry.request_metrics import head_arrived_s
from bitwatt.telemetry.tracing import Tracing

__all__ = [
    "HTTP_FAULT",
    "KEY_DIGEST",
    "CheckHost",
    "Gateway",
    "HeadAsGet",
    "HttpFault",
    "LimitBody",
    "LimitOpen",
    "RequireKey",
    "TraceRequests",
]

KEY_DIGEST = "bitwatt.key_digest"
HTTP_FAULT = "bitwatt.http_fault"

_PORT = re.compile(rb":\d*$")
_CALLERS_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})
_POLLED = frozenset({"/health", "/ready", "/metrics"})
_WATCHING = _POLLED | {"/version", "/bitwatt/v1/comparison", "/", "/page/{name:path}"}

logger = logging.getLogger(__name__)


class HttpFault(NamedTuple):
    """Why there is no request to serve. The protocol leaves it in the scope, under HTTP_FAULT."""

    status: int
    message: str
    headers: dict[str, str] | None = None


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


def _watches(path: str) -> bool:
    """Return whether a request for the path only watches the server."""
    return path in _WATCHING or path.startswith("/page/")


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
        if scope["type"] != "http" or _watches(scope["path"]):
            await self._app(scope, receive, send)
            return
        method = scope["method"]
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
                    method=method,
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
        method = scope["method"] if scope["method"] in _METHODS else "other"
        began_s = time.perf_counter()
        head_arrived_s.set(began_s)
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id),
                    *([(b"request-id", request_id)] if is_anthropic(scope["path"]) else []),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        fault: HttpFault | None = scope.get(HTTP_FAULT)
        app = (
            self._app
            if fault is None
            else error_response(fault.status, fault.message, None, headers=fault.headers)
        )
        try:
            await app(scope, receive, send_with_id)
        except BaseException as error:  # a panic of Rust's is no Exception
            if not isinstance(error, asyncio.CancelledError):
                logger.exception("request %s failed", request_id.decode())
            if status is not None:
                raise
            await describe(error).response()(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            status = status or CLIENT_CLOSED_REQUEST
            duration_s = time.perf_counter() - began_s
            self._count(route, method, status, duration_s)
            _log_access(method, route, status, duration_s)

    def _count(self, route: str, method: str, status: int, duration_s: float) -> None:
        """Count an answer; what only watches the server is in no rate of callers' requests."""
        if route in _WATCHING:
            self._metrics[PROBE_REQUESTS].labels(route, str(status)).inc()
        else:
            labels = route, method, f"{status // 100}xx", str(status)
            self._metrics[HTTP_REQUESTS].labels(*labels).inc()
            self._metrics[HTTP_DURATION].labels(route, method).observe(duration_s)


class CheckHost:
    """Refuses a request that is meant for another host.

    A page of another site can have its own name lead to a loopback address (DNS rebinding), and
    call a server there as its own; the Host header then still has that name.

    hosts  those that are ours, in lower case, without ports; IPv6 in brackets
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.encode("latin-1") for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = _header(scope, b"host") if scope["type"] == "http" else None
        if host is None or _PORT.sub(b"", host.lower()) in self._hosts:
            await self._app(scope, receive, send)
            return
        name = shorten(host.decode("latin-1"))
        message = f"the host {name} is not this server's (--allowed-hosts)"
        await error_response(421, message, "unknown_host")(scope, receive, send)


class HeadAsGet:
    """Has HEAD answered as GET is; the connection leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope["method"] = "GET"
        await self._app(scope, receive, send)


class RequireKey:
    """Lets a request pass with one of the keys, or to an open path.

    A key comes as OpenAI's clients send it, `Authorization: Bearer KEY`, or as Anthropic's do,
    `x-api-key: KEY`.

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
            "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)

    def _known_digest(self, scope: Scope) -> bytes | None:
        scheme, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
        given = [key if scheme.lower() == b"bearer" else None, _header(scope, b"x-api-key")]
        for digest in [sha256(key.strip()).digest() for key in given if key is not None]:
            matches = [hmac.compare_digest(digest, known) for known in self._key_digests]
            if any(matches):
                return digest
        return None


class LimitBody:
    """Reads the body, for the application to have at once.

    One of more than max_bytes is refused, by its declared length or as it comes; one that takes
    longer than timeout_s is given up, and its connection with it.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(scope, receive)
        except TimeoutError:
            message = f"the body took longer than {self._timeout_s:g} s (--body-timeout)"
            body = error_response(408, message, None, headers={"Connection": "close"})
        except BitwattError as error:
            body = describe(error).response()
        if isinstance(body, Response):
            await body(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_whole() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, receive_whole, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | Response:
        """Return the body, or the answer to one that isn't taken."""
        declared = _header(scope, b"content-length") or b"0"
        if not declared.isdigit() or len(declared) > 15 or int(declared) > self._max_bytes:
            return self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> Response:
        message = f"the body has more than {self._max_bytes} bytes (--max-body-bytes)"
        return error_response(413, message, "request_too_large")


class LimitOpen:
    """Turns requests with a body away while max_open of them are open.

    What waits in an engine's queue has been encoded; this bounds what comes before. It lies behind
    LimitBody, so that a body that never ends takes no place.
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
