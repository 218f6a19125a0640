"""Server-sent events: one `data:` line an event, and what ends a stream."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress

import msgspec
from msgspec import structs
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bitwatt.api.client_link import tied_to_client
from bitwatt.api.errors import ClientDisconnectedError, describe
from bitwatt.errors import BitwattError

__all__ = ["DONE", "EventStream", "error_event", "event", "named_event", "padded_event"]

DONE = b"data: [DONE]\n\n"
_PADDED_BYTES = 128  # padded events have a multiple of it
_KEEP_ALIVE = b": keep-alive\n"  # no empty line after it: some clients parse what it ends as JSON
_LAST_EVENT_TIMEOUT_S = 1.0  # a client that reads nothing more doesn't hold up a failed stream

_encode = msgspec.json.encode
logger = logging.getLogger(__name__)


def event(data: msgspec.Struct) -> bytes:
    """Return the event as it goes over the wire."""
    return b"data: " + _encode(data) + b"\n\n"


def named_event(data: msgspec.Struct, kind: str) -> bytes:
    """Return the event with its type in a line of its own too."""
    return b"event: " + kind.encode() + b"\n" + event(data)


def error_event(error: BaseException) -> bytes:
    """Return the event that ends a stream that failed."""
    return b"data: " + describe(error).encode() + b"\n\n"


def padded_event(data: msgspec.Struct) -> bytes:
    """Return the event with random letters in its `obfuscation`, for sizes that tell little."""
    size = len(_encode(structs.replace(data, obfuscation="")))
    padding = secrets.token_hex(_PADDED_BYTES // 2)[: -size % _PADDED_BYTES]
    return event(structs.replace(data, obfuscation=padding))


class EventStream(Response):
    """Sends events as they come.

    The response starts with the first event, so an error before it has a status of its own; one
    after it becomes the stream's last event. A comment goes out after every keep_alive_s of
    silence. When the client goes away, or after timeout_s, the events are closed at once.

    ending   returns what ends a stream whose events have come
    failure  returns what ends one that failed

    A slow client stops the events from being taken, not from being made: what waits is bounded
    by the request's max_tokens.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        keep_alive_s: float,
        timeout_s: float,
        headers: Mapping[str, str],
        ending: Callable[[], bytes],
        failure: Callable[[BaseException], bytes],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
                **headers,
            }
        )
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._timeout_s = timeout_s
        self._started = False
        self._ending = ending
        self._failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        last_sent_s = loop.time()

        writing = asyncio.Lock()  # between the events and the keep-alive

        async def write(data: bytes, *, more: bool = True) -> None:
            nonlocal last_sent_s
            last_sent_s = loop.time()
            async with writing:
                if not self._started:
                    await send(
                        {
                            "type": "http.response.start",
                            "status": self.status_code,
                            "headers": self.raw_headers,
                        }
                    )
                    self._started = True
                await send({"type": "http.response.body", "body": data, "more_body": more})

        async def keep_alive() -> None:
            while True:
                silence_s = loop.time() - last_sent_s
                if silence_s >= self._keep_alive_s:
                    await write(_KEEP_ALIVE)
                    silence_s = 0.0
                await asyncio.sleep(self._keep_alive_s - silence_s)

        keeper = asyncio.create_task(keep_alive())
        try:
            async with (
                aclosing(self._events) as events,
                tied_to_client(receive, timeout_s=self._timeout_s),
            ):
                async for data in events:
                    await write(data)
                keeper.cancel()
                await write(self._ending(), more=False)
        except ClientDisconnectedError:
            if not self._started:
                raise
        except Exception as error:
            keeper.cancel()
            if not self._started:
                raise
            if not isinstance(error, BitwattError):
                logger.exception("request %s failed midway", scope["state"]["request_id"])
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_EVENT_TIMEOUT_S):
                    await write(self._failure(error), more=False)
        finally:
            keeper.cancel()
