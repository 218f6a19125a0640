"""The HTTP server under the application."""

import asyncio
import ipaddress
import logging
import resource
import socket
from collections.abc import Iterable
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from bitwatt.api.http_protocol import HttpConnection
from bitwatt.settings import ServeSettings

__all__ = ["Server", "listen", "new_server"]

# Engines, sockets to them, checkpoints, the log: of a pair's server some 30 are open, and the start
# of an engine wants 32 free.
_OTHER_FILES = 256
_LEAST_OTHER_FILES = 96

logger = logging.getLogger(__name__)


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on every address of the host.

    Raises  OSError where the port is taken, or the host is none of this machine's
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, address in sorted({(family, address) for family, *_, address in found}):
            sockets.append(socket.create_server(address, family=family))
    except OSError:
        for listening in sockets:
            listening.close()
        raise
    return sockets


def _max_connections(settings: ServeSettings) -> int:
    """Return the limit of connections, which leaves files to the rest of the process.

    Without one left, an engine that died could not be started again.
    """
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_files == resource.RLIM_INFINITY:
        return settings.max_connections
    num_others = min(_OTHER_FILES, max(_LEAST_OTHER_FILES, num_files // 4))
    limit = max(1, num_files - num_others)
    if limit < settings.max_connections:
        logger.info("at most %d connections: the process may open %d files", limit, num_files)
    return min(limit, settings.max_connections)


class Server(uvicorn.Server):
    """A server that knows its address once it listens. On SIGTERM it lets open requests end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listens.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, or at the second signal give up what drains."""
        super().handle_exit(sig, frame)
        # Each is raised again at the end: the second would break into the first one's handling.
        del self._captured_signals[1:]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, or not, and stop the engines."""
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it out then, and its cancellation is a traceback
            await self.lifespan.shutdown()
        for connection in list(self.server_state.connections):
            assert isinstance(connection, HttpConnection)
            if not connection.writable.is_set():  # its client reads nothing
                connection.abort()

    @property
    def url(self) -> str:
        """Where the page opens, from this machine; to be asked once it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # every address of the machine, its own among them
            address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
        return f"http://{address if address.version == 4 else f'[{address}]'}:{port}/"

    async def announce(self, names: Iterable[str]) -> None:
        """Log the address to open and the models' names, as soon as it listens."""
        await self._listens.wait()
        logger.info("all models are ready (%s): open %s", ", ".join(names), self.url)


def new_server(app: FastAPI, settings: ServeSettings) -> Server:
    """Return the server, to be run."""
    http = partial(HttpConnection, max_connections=_max_connections(settings), owing={})
    return Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            loop="uvloop",
            http=http,  # type: ignore[arg-type]  # called as the class would be
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
        )
    )
