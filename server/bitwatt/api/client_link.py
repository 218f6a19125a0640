"""Ties work to the client that asked for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from bitwatt.api.errors import STOPPING, ClientDisconnectedError, RequestTimeoutError
from bitwatt.errors import EngineUnavailableError

__all__ = ["tied_to_client"]


@asynccontextmanager
async def tied_to_client(receive: Receive, *, timeout_s: float) -> AsyncIterator[None]:
    """Cancel the block at once when the client goes away, or after timeout_s.

    To be entered when the request's body has been read: whatever `receive` brings after is
    dropped.

    Raises  ClientDisconnectedError or RequestTimeoutError in place of the cancellation;
            EngineUnavailableError where the server cancels the request because it stops
    """
    task = asyncio.current_task()
    assert task is not None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except asyncio.CancelledError:
        # Turned into an error of ours, for the client to be told what it can still be told.
        task.uncancel()
        if watcher.done():
            raise ClientDisconnectedError("the client went away") from None
        raise EngineUnavailableError(STOPPING) from None
    except TimeoutError:
        raise RequestTimeoutError(
            f"the request took longer than {timeout_s:g} s (--request-timeout)"
        ) from None
    finally:
        watcher.cancel()
