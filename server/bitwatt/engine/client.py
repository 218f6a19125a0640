"""The API process's handle on one engine process: start, submit, abort, watch, restart."""

from collections.abc import AsyncIterator, Callable

from bitwatt.engine.messages import EngineConfig, EngineInfo, EngineStats, Submit, TokenOutput

__all__ = ["EngineClient"]


class EngineClient:
    """One engine behind one served model name.

    Used from one event loop. submit's iterator must be closed (`aclosing`, or run to its end):
    closing it early aborts the request at once.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_queue: int = 256,
        on_stats: Callable[[EngineStats], None] | None = None,
    ) -> None:
        """Prepare the handle; nothing starts before start().

        on_stats  called in the event loop after every step and heartbeat
        """
        raise NotImplementedError

    @property
    def info(self) -> EngineInfo | None:
        """What the engine says of itself; None until it was ready once."""
        raise NotImplementedError

    @property
    def is_ready(self) -> bool:
        """Whether a request submitted now would be taken."""
        raise NotImplementedError

    async def start(self) -> None:
        """Start the engine process and its supervision; is_ready turns True later."""
        raise NotImplementedError

    async def wait_ready(self) -> EngineInfo:
        """Return the info once ready; raises EngineUnavailableError if it can't start."""
        raise NotImplementedError

    def submit(self, request: Submit) -> AsyncIterator[TokenOutput]:
        """Yield the request's outputs; the last has a finish_reason.

        Raises  QueueFullError, EngineUnavailableError when first advanced;
                RequestFailedError if the engine dies before the last output
        """
        raise NotImplementedError

    async def stop(self) -> None:
        """End the engine process; open requests raise RequestFailedError."""
        raise NotImplementedError
