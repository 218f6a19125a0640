"""Every error a caller can meet.

BitwattError
├── InvalidRequestError      a request that can't be served as asked
├── CheckpointError          a model folder that can't be loaded
└── EngineError
    ├── EngineUnavailableError   loading, restarting or dead: try again
    ├── QueueFullError           more requests wait than --max-queue
    └── RequestFailedError       the engine died or failed while the request ran
"""

__all__ = [
    "BitwattError",
    "CheckpointError",
    "EngineError",
    "EngineUnavailableError",
    "InvalidRequestError",
    "QueueFullError",
    "RequestFailedError",
    "shorten",
]


class BitwattError(Exception):
    """The base of all."""


class InvalidRequestError(BitwattError, ValueError):
    """A request that can't be served as asked.

    param  the field at fault, or None
    code   OpenAI's string code, or None
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class CheckpointError(BitwattError):
    """A model folder that can't be loaded; the message names the file and the reason."""


class EngineError(BitwattError):
    """The engine's side of a failure."""


class EngineUnavailableError(EngineError):
    """The engine takes no requests now: it loads, restarts or is dead."""


class QueueFullError(EngineError):
    """More requests wait than --max-queue allows."""


class RequestFailedError(EngineError):
    """The engine died or failed while the request ran."""


def shorten(value: object, limit: int = 80) -> str:
    """Return the value for an error message, never more than a line of it."""
    text = repr(value[:limit] if isinstance(value, str | list) else value)
    return text if len(text) <= limit else text[:limit] + "…"
