"""The HTTP server under the application."""

import asyncio
import ipaddress
import logging
import resource
import socket
from functools import partial

import uvicorn
from fastapi import FastAPI

from bitwatt.api.http_protocol import HttpConnection
from bitwatt.settings import ServeSettings

__all__ = ["Server", "listen", "new_server"]

_OTHER_FILES = 256  # engines, sockets to them, checkpoints, the log

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
    limit = num_files - min(_OTHER_FILES, num_files // 4)
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
