"""Threads for work beside an event loop that don't keep a process from ending."""

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

__all__ = ["Lane"]

T = TypeVar("T")


class Lane:
    """A queue of work and the threads that do it, first come first served.

    Unlike a ThreadPoolExecutor's, the threads are daemons: the interpreter ends though one of
    them is held up. Work whose caller has gone is passed over. Used from one event loop at a time.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self._name = name
        self._num_threads = num_threads
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    async def run(self, work: Callable[[], T]) -> T:
        """Return what the work returns, or raise what it raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def do() -> None:
            if future.cancelled():
                return
            result, error = None, None
            try:
                result = work()
            except BaseException as raised:  # the caller's to handle, in its own task
                error = raised
            with suppress(RuntimeError):  # the loop has closed, and nobody waits
                loop.call_soon_threadsafe(settle, result, error)

        self._start_threads()
        self._work.put(do)
        return await future

    def close(self) -> None:
        """Let the threads go once the work that they have is done."""
        for _ in self._threads:
            self._work.put(None)
        self._threads = []

    def _start_threads(self) -> None:
        while len(self._threads) < self._num_threads:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._do_work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _do_work(self) -> None:
        while (work := self._work.get()) is not None:
            work()
