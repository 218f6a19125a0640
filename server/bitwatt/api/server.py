"""The HTTP server under the application."""

import asyncio
import ipaddress
import logging
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bitwatt.settings import ServeSettings

__all__ = ["Server", "new_server"]

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0
_IDLE_CONNECTION_S = 75

logger = logging.getLogger(__name__)


class _BoundedHeadProtocol(HttpToolsProtocol):
    """HTTP whose request line and headers stay within MAX_HEAD_BYTES or so, and HEAD_TIMEOUT_S.

    The parser alone would collect a header of any length, and wait for it for ever.
    """

    _head_bytes = 0
    _in_head = True
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The headers exceed {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._in_head = True
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class Server(uvicorn.Server):
    """A server that knows its address once it listens. On SIGTERM it lets open requests end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listens.set()

    @property
    def url(self) -> str:
        """Where the page opens, from this machine; to be asked once it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # every address of the machine, its own among them
            address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
        return f"http://{address if address.version == 4 else f'[{address}]'}:{port}/"

    async def announce(self) -> None:
        """Log the address to open, as soon as it listens."""
        await self._listens.wait()
        logger.info("all models are ready: open %s", self.url)


def new_server(app: FastAPI, settings: ServeSettings) -> Server:
    """Return the server, to be run."""
    return Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            loop="uvloop",
            http=_BoundedHeadProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_IDLE_CONNECTION_S,
            timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
        )
    )
