"""A request and its answer, between the connection that carries them and the application."""

import asyncio
import logging
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Literal, Protocol

from starlette.types import ASGIApp, Message

from bitwatt.errors import BitwattError

__all__ = ["Exchange", "Line"]

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_WITHOUT_BODY = (204, 304)
_NOTHING_MORE = b"content-length: 0\r\nconnection: close\r\n\r\n"

logger = logging.getLogger(__name__)


class Line(Protocol):
    """What an exchange needs of its connection.

    writable  set while what is written finds room
    """

    writable: asyncio.Event

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """What every answer has."""

    def write(self, data: bytes) -> None:
        """Send the bytes."""

    def take_more(self) -> None:
        """Let more of the request's body come."""

    def on_answered(self, exchange: "Exchange") -> None:
        """Go on: the whole answer is written."""

    def hang_up(self) -> None:
        """Close: the answer broke off, and only the connection's end tells so."""


class Exchange:
    """One request, and its answer as the application sends it (ASGI 3.0).

    keeps_alive  the connection may serve another request after it
    is_whole     all of the request has come
    is_answered  all of the answer is written
    """

    __slots__ = (
        "_body",
        "_changed",
        "_fault",
        "_framing",
        "_is_begun",
        "_is_gone",
        "_is_head",
        "_is_taken",
        "_line",
        "_num_left",
        "_scope",
        "_wants_continue",
        "is_answered",
        "is_whole",
        "keeps_alive",
    )

    def __init__(
        self, scope: dict[str, Any], line: Line, *, keeps_alive: bool, wants_continue: bool = False
    ) -> None:
        self._scope = scope
        self._line = line
        self._wants_continue = wants_continue
        self._body = bytearray()
        self._changed = asyncio.Event()
        self._fault: BitwattError | None = None
        self._is_taken = False  # the application has the whole body
        self._is_gone = False  # nobody is there to be answered
        self._is_begun = False  # the answer's head is written
        self._is_head = scope["method"] == "HEAD"
        self._framing: Literal["length", "chunks", "close", "none"] = "none"
        self._num_left = 0  # bytes of the answer's body to come, by its Content-Length
        self.keeps_alive = keeps_alive
        self.is_whole = False
        self.is_answered = False

    # The connection's side.

    def add_body(self, data: bytes) -> int:
        """Keep this piece of the body; return how many bytes wait to be taken."""
        self._body += data
        self._changed.set()
        return len(self._body)

    def end_body(self) -> None:
        """Note that the request has come whole."""
        self.is_whole = True
        self._changed.set()

    def fail(self, error: BitwattError) -> None:
        """Note why the rest of the request isn't read, for the application to say so."""
        self._fault = error
        self.keeps_alive = False
        self._changed.set()

    def disconnect(self) -> None:
        """Note that the client is gone."""
        self._is_gone = True
        self._changed.set()

    async def run(self, app: ASGIApp) -> None:
        """Have the application answer."""
        try:
            await app(self._scope, self.receive, self.send)
            if not self.is_answered and not self._is_gone:
                raise RuntimeError("the application left its answer unfinished")
        except BaseException as error:  # whatever it is, one request's end is not the server's
            if not isinstance(error, asyncio.CancelledError):  # cancelled as the server stops
                logger.exception("a request failed beyond the application")
            if not self._is_begun and not self._is_gone:
                self._line.write(_STATUS_LINES[500] + _NOTHING_MORE)
            if not self.is_answered and not self._is_gone:
                self._line.hang_up()

    # The application's side.

    async def receive(self) -> Message:
        """Return more of the body, or that the client is gone.

        Raises  what fail() was told, where the rest of the body isn't read
        """
        if self._wants_continue:
            self._wants_continue = False
            self._line.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self._is_gone and not self.is_answered:
            if self._fault is not None:
                raise self._fault
            if self._body or (self.is_whole and not self._is_taken):
                body, self._body = bytes(self._body), bytearray()
                self._is_taken = self.is_whole
                self._line.take_more()
                return {"type": "http.request", "body": body, "more_body": not self.is_whole}
            self._line.take_more()
            self._changed.clear()
            await self._changed.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Write more of the answer, once what was written before has found room."""
        if not self._line.writable.is_set():
            await self._line.writable.wait()
        if self._is_gone:
            return
        kind = "http.response.body" if self._is_begun else "http.response.start"
        if message["type"] != kind or self.is_answered:
            raise RuntimeError(f"{message['type']} comes out of turn")
        if not self._is_begun:
            self._begin(message["status"], message.get("headers", ()))
        else:
            self._go_on(message.get("body", b""), is_last=not message.get("more_body", False))

    def _begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Write the head, and choose how the body's end will be known."""
        lines = [_STATUS_LINES[status]]
        length = None
        for name, value in (*self._line.default_headers, *headers):
            if b"\r" in value or b"\n" in value:
                raise RuntimeError(f"the header {name!r} has more than a line")
            if name == b"connection":
                self.keeps_alive = self.keeps_alive and value.lower() != b"close"
                continue
            if name == b"content-length":
                length = int(value)
            lines += name, b": ", value, b"\r\n"
        if self._is_head or status in _WITHOUT_BODY:
            self._framing = "none"
        elif length is not None:
            self._framing, self._num_left = "length", length
        elif self._scope["http_version"] == "1.1":
            self._framing = "chunks"
            lines.append(b"transfer-encoding: chunked\r\n")
        else:
            self._framing = "close"
            self.keeps_alive = False
        if self._wants_continue and not self.is_whole:
            self.keeps_alive = False  # a body that was not asked for comes or doesn't
        if not self.keeps_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self._is_begun = True
        self._line.write(b"".join(lines))

    def _go_on(self, body: bytes, *, is_last: bool) -> None:
        """Write this piece of the body."""
        if self._framing == "chunks":
            piece = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            self._line.write(piece + b"0\r\n\r\n" if is_last else piece)
        elif self._framing != "none":
            self._line.write(body)
        if self._framing == "length":
            self._num_left -= len(body)
            if self._num_left < 0 or (is_last and self._num_left):
                raise RuntimeError("the answer's body and its Content-Length differ")
        if is_last:
            self.is_answered = True
            self._changed.set()
            self._line.on_answered(self)
