"""The HTTP server under the application."""

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bitwatt.settings import ServeSettings

__all__ = ["new_server"]

MAX_HEAD_BYTES = 64 * 1024
_IDLE_CONNECTION_S = 75


class _BoundedHeadProtocol(HttpToolsProtocol):
    """HTTP whose request line and headers together stay within MAX_HEAD_BYTES or so.

    The parser alone would collect a header of any length.
    """

    _head_bytes = 0
    _in_head = True

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

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()


def new_server(app: FastAPI, settings: ServeSettings) -> uvicorn.Server:
    """Return the server, to be run. On SIGTERM it lets open requests end, within a limit."""
    return uvicorn.Server(
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
