"""What the commands that call a server have in common."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from bitwatt_client.server import Server
from bitwatt_client.terminal import printable

__all__ = ["INTERRUPTED", "interruptible", "say", "wait_while_it_loads"]

T = TypeVar("T")

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended: 128 and SIGINT's number, as shells have it."""

_POLL_S = 0.5


def say(text: str) -> None:
    """Write a line for the person; what a server says of itself can't command the terminal."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


async def wait_while_it_loads(server: Server) -> None:
    """Return once the server says of its model no longer that it loads."""
    is_told = False
    while await server.is_loading():
        if not is_told:
            say(f"{server.model} loads at {server.url}: waiting")
            is_told = True
        await asyncio.sleep(_POLL_S)


async def interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Return what the work brings; Ctrl-C cancels it, and the second leaves at once.

    asyncio's own handler raises at the second, into whatever is being ended then: a traceback.
    """
    task = asyncio.ensure_future(work)
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        return await task
    loop = asyncio.get_running_loop()
    is_interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal is_interrupted
        if is_interrupted:
            os._exit(INTERRUPTED)
        is_interrupted = True
        loop.call_soon_threadsafe(task.cancel)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        return await task
    finally:
        if not is_interrupted:  # else a second may come until the process has ended
            signal.signal(signal.SIGINT, before)
