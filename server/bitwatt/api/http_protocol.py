"""HTTP/1.1 and 1.0 (RFC 9112) over a connection, within limits: httptools parses, uvicorn accepts.

What a connection waits for, and what ends the wait:

    a request           IDLE_S; HEAD_S on a new connection
    the rest of a head  HEAD_S, MAX_TARGET_BYTES, MAX_HEAD_BYTES, MAX_HEADERS
    the rest of a body  --body-timeout and --max-body-bytes (middleware), MAX_GAP_BYTES
    an answer           --request-timeout (routes)
    an answer read      UNREAD_S without room in its buffer
    the end of what is dropped after a refusal  LINGER_S, LINGER_BYTES; LAST_LINGER_S at the end

Where more than --max-connections are open, the one whose client has owed us bytes for longest ends.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import Any

import httptools
import uvicorn
from uvicorn.server import ServerState

from bitwatt.api.errors import STOPPING
from bitwatt.api.http_exchange import Exchange
from bitwatt.api.http_head import read_head
from bitwatt.api.middleware import HTTP_FAULT, HttpFault
from bitwatt.errors import EngineUnavailableError, InvalidRequestError

__all__ = ["HttpConnection"]

HEAD_S = 30.0
IDLE_S = 75.0
UNREAD_S = 60.0
LINGER_S = 30.0
LAST_LINGER_S = 1.0
LINGER_BYTES = 64 * 2**20
MAX_TARGET_BYTES = 16 * 2**10
MAX_HEAD_BYTES = 64 * 2**10
MAX_HEADERS = 256
MAX_GAP_BYTES = 64 * 2**10
MAX_PIPELINED = 16
_MAX_BODY_AHEAD_BYTES = 64 * 2**10

_UNKNOWN_METHOD = re.compile(rb"(?!GET |POST |HEAD )[\w!#$%&'*+.^`|~-]+ \S+ HTTP/1\.[01]\r\n")


class HttpConnection(asyncio.Protocol):
    """A client's connection: its requests go to the application one after the other.

    owing  connections whose clients owe bytes of a request, or must read a refusal, in the order
           in which they began to
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        max_connections: int,
        owing: "dict[HttpConnection, None]",
    ) -> None:
        self.writable = asyncio.Event()
        self.writable.set()
        self._server_state = server_state
        self._loop = _loop or asyncio.get_running_loop()
        self._app = config.loaded_app
        self._app_state = app_state
        self._connections: set[Any] = server_state.connections
        self._tasks = server_state.tasks
        self._max_connections = max_connections
        self._owing = owing
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._is_in_head = False
        self._num_head_bytes = 0  # of target and headers, since a head's beginning
        self._num_gap_bytes = 0  # since a head's beginning, its end, or a piece of body

        self._incoming: Exchange | None = None  # its body still comes
        self._current: Exchange | None = None  # it is being answered
        self._queue: deque[Exchange] = deque()  # they are answered after it
        self._is_reading_paused = False
        self._is_deaf = False  # what comes is dropped
        self._linger_s = LINGER_S
        self._num_dropped_bytes = 0

    # The event loop's side.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, where there is room for another connection, or can be made."""
        self._transport = transport
        self._connections.add(self)
        if len(self._connections) > self._max_connections and self._owing:
            oldest = next(iter(self._owing))
            self._connections.discard(oldest)
            oldest.abort()
        self._owing[self] = None
        self._arm(HEAD_S, self._close)
        if len(self._connections) > self._max_connections:
            limit = self._max_connections
            self._refuse(503, f"{limit} connections are open (--max-connections)")

    def connection_lost(self, _: Exception | None) -> None:
        """End whatever the connection's requests have begun."""
        self._connections.discard(self)
        self._owing.pop(self, None)
        self._disarm()
        if self._write_timer is not None:
            self._write_timer.cancel()
        self._parser = None  # it holds the connection
        if self._current is not None:
            self._current.disconnect()
        self._queue.clear()
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        """Read requests."""
        if self._is_deaf:
            self._drop(len(data))
            return
        self._num_gap_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            is_of_method = isinstance(error, httptools.HttpParserInvalidMethodError)
            if is_of_method and _UNKNOWN_METHOD.match(data):
                self._refuse(501, "no such method is known here")
            else:
                self._refuse(400, "this is not HTTP")
        if self._num_gap_bytes > MAX_GAP_BYTES:
            if self._is_in_head:
                self._refuse(431, f"the headers have more than {MAX_HEAD_BYTES} bytes")
            else:
                self._refuse(400, f"more than {MAX_GAP_BYTES} bytes are neither head nor body")

    def pause_writing(self) -> None:
        """Hold the answer back; give up where the client reads too little of it for too long."""
        self.writable.clear()
        self._write_timer = self._loop.call_later(UNREAD_S, self.abort)

    def resume_writing(self) -> None:
        """Let the answer go on."""
        self.writable.set()
        if self._write_timer is not None:
            self._write_timer.cancel()

    # The server's side.

    def shutdown(self) -> None:
        """Close, once the request being answered has been; the rest of one isn't waited for."""
        self._linger_s = LAST_LINGER_S
        exchange = self._current
        if exchange is None or exchange.is_answered:
            self._close()
        elif exchange.is_whole:
            exchange.keeps_alive = False
        else:
            self._is_deaf = True
            exchange.fail(EngineUnavailableError(STOPPING))

    def abort(self) -> None:
        """Close at once; what is not yet sent is lost."""
        self._owing.pop(self, None)
        self._transport.abort()

    # The exchange's side.

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """What every answer has: its date."""
        return self._server_state.default_headers

    def write(self, data: bytes) -> None:
        """Send the bytes."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def take_more(self) -> None:
        """Let more of the request's body come."""
        if self._is_reading_paused and not self._transport.is_closing():
            self._is_reading_paused = False
            self._transport.resume_reading()

    def on_answered(self, exchange: Exchange) -> None:
        """Go on to the next request, once this one has come whole; or close."""
        if not exchange.keeps_alive:
            self._end(lingers=not exchange.is_whole or self._num_dropped_bytes > 0)
        elif exchange.is_whole:
            self._go_on()
        else:
            self.take_more()
            self._arm(LINGER_S, self.abort)

    def hang_up(self) -> None:
        """Close: the answer broke off."""
        self._end(lingers=False)

    # The parser's side. Its callbacks come in the order of the bytes, within data_received.

    def on_message_begin(self) -> None:
        """Begin a head."""
        if self._is_deaf:
            return
        self._url = b""
        self._headers = []
        self._is_in_head = True
        self._num_gap_bytes = self._num_head_bytes = 0
        if self._current is None:
            self._arm(HEAD_S, self._close)

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request's target."""
        if self._is_deaf:
            return
        self._url += url
        self._num_head_bytes = len(self._url)
        if self._num_head_bytes > MAX_TARGET_BYTES:
            self._refuse(414, f"the request's target has more than {MAX_TARGET_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; after a body there is none that we take."""
        if self._is_deaf:
            return
        if not self._is_in_head:
            self._refuse(400, "fields after a chunked body (trailers) are not taken")
            return
        self._num_head_bytes += len(name) + len(value)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the headers have more than {MAX_HEAD_BYTES} bytes")
        elif len(self._headers) == MAX_HEADERS:
            self._refuse(431, f"there are more than {MAX_HEADERS} headers")
        else:
            self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """Hand the request to the application, or put it behind those before it."""
        parser = self._parser
        if self._is_deaf or parser is None:
            return
        if parser.should_upgrade() and parser.get_method() != b"CONNECT":
            return  # _parse has this head read again
        self._is_in_head = False
        self._num_gap_bytes = 0
        method, version = parser.get_method().decode("ascii"), parser.get_http_version()
        head = read_head(method, self._url, version, self._headers)
        if isinstance(head, HttpFault):
            self._refuse(*head)
            return
        scope = self._new_scope(method, path=head.path) | {
            "http_version": version,
            "raw_path": head.raw_path,
            "query_string": head.query,
            "headers": head.headers,
        }
        self._incoming = Exchange(
            scope,
            self,
            keeps_alive=version == "1.1" and parser.should_keep_alive(),
            wants_continue=version == "1.1" and head.values_of(b"expect") == [b"100-continue"],
        )
        self._queue_up(self._incoming)

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body on, no faster than it is taken."""
        exchange = self._incoming
        if exchange is None:
            return
        self._num_gap_bytes = 0
        if exchange.is_answered:
            self._drop(len(body))
        elif exchange.add_body(body) > _MAX_BODY_AHEAD_BYTES:
            if exchange is self._current:
                self._is_reading_paused = True
                self._transport.pause_reading()
            else:  # paused for the request before it, we would not see the client leave
                self._queue.remove(exchange)
                self._incoming = None
                self._is_deaf = True

    def on_message_complete(self) -> None:
        """End the request; the last one that a connection serves makes it deaf to more."""
        exchange, self._incoming = self._incoming, None
        if exchange is None:
            return
        self._num_gap_bytes = 0
        self._owing.pop(self, None)
        self._is_deaf = self._is_deaf or not exchange.keeps_alive
        exchange.end_body()
        if exchange.is_answered:
            self._go_on()

    # Our own side.

    def _parse(self, data: bytes) -> None:
        """Parse; a wish to upgrade is ignored, which RFC 9110, 7.8, lets a server do.

        The parser takes such a head for the last of the connection and skips its body, so
        another parser reads the head without the wish, and what follows.
        """
        while self._parser is not None:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self._is_deaf:
                    return
                head = self._head_without_upgrade(self._parser)
                data = data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
                self._parser.feed_data(head)
            else:
                return

    def _head_without_upgrade(self, parser: httptools.HttpRequestParser) -> bytes:
        version = parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (parser.get_method(), self._url, version)]
        lines += [b"%b: %b" % header for header in self._headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _new_scope(self, method: str, *, path: str) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self._transport.get_extra_info("sockname"),
            "client": self._transport.get_extra_info("peername"),
            "scheme": "http",
            "root_path": "",
            "method": method,
            "path": path,
            "raw_path": b"",
            "query_string": b"",
            "headers": [],
            "state": self._app_state.copy(),
        }

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        """Read no further, and have the application say why, after the answers before."""
        if self._is_deaf:
            return
        self._is_deaf = True
        broken, self._incoming = self._incoming, None
        if broken is None:
            scope = self._new_scope("", path="") | {HTTP_FAULT: HttpFault(status, message, headers)}
            self._queue_up(Exchange(scope, self, keeps_alive=False))
        elif broken.is_answered:
            self._end(lingers=True)
        else:
            broken.fail(InvalidRequestError(message))

    def _queue_up(self, exchange: Exchange) -> None:
        if self._current is None:
            self._start(exchange)
        elif len(self._queue) < MAX_PIPELINED:
            self._queue.append(exchange)
        else:
            self._incoming = None
            self._is_deaf = True

    def _start(self, exchange: Exchange) -> None:
        self._current = exchange
        self._disarm()
        if not exchange.is_whole:
            self._owing[self] = None
        task = self._loop.create_task(exchange.run(self._app))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _go_on(self) -> None:
        """Start the request that waits, or wait for one."""
        self._current = None
        if self._queue:
            self._start(self._queue.popleft())
        elif self._is_deaf:
            self._end(lingers=True)
        else:
            self._owing[self] = None
            self._arm(HEAD_S if self._is_in_head else IDLE_S, self._close)

    def _drop(self, num_bytes: int) -> None:
        self._num_dropped_bytes += num_bytes
        if self._num_dropped_bytes > LINGER_BYTES:
            self.abort()

    def _end(self, *, lingers: bool) -> None:
        """Close behind what is written.

        Closed while the client still writes, the connection would be reset, and the answer lost
        with it (RFC 9112, 9.6); so one that lingers reads on for a while, and drops what comes.
        """
        if self._transport.is_closing():
            return
        self._is_deaf = True
        self._incoming = self._current = None
        self._queue.clear()
        self.take_more()
        if lingers:
            self._owing[self] = None
            self._transport.write_eof()
            self._arm(self._linger_s, self.abort)
        else:
            self._close()

    def _close(self) -> None:
        self._transport.close()
        self._arm(LINGER_S, self.abort)  # nobody may read what is written

    def _arm(self, seconds: float, action: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self._loop.call_later(seconds, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
