"""Every error a caller of this package can meet; api/errors.py gives each its HTTP status.

BitwattError
├── InvalidRequestError      (ValueError) a request that can't be served as asked
├── ConfigurationError       (ValueError) a setting of an engine that is unknown or beyond its limit
├── CheckpointError          a model folder that can't be loaded
├── HubError                 a model of Hugging Face's hub that can't be had
└── EngineError
    ├── EngineStartError         the engine can't start: a kernel, a device or memory is missing
    ├── EngineUnavailableError   loading, restarting or dead: try again
    ├── QueueFullError           more requests wait than --max-queue
    └── RequestFailedError       the engine died or failed while the request ran
"""

__all__ = [
    "BitwattError",
    "CheckpointError",
    "ConfigurationError",
    "EngineError",
    "EngineStartError",
    "EngineUnavailableError",
    "HubError",
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


class ConfigurationError(BitwattError, ValueError):
    """A setting of an engine that is unknown or beyond its limit; the message names the knob."""


class CheckpointError(BitwattError):
    """A model folder that can't be loaded; the message names the file and the reason."""


class HubError(BitwattError):
    """A model of Hugging Face's hub that can't be had; the message has URL, reason and knob."""


class EngineError(BitwattError):
    """The engine's side of a failure."""


class EngineStartError(EngineError):
    """The engine can't start on this machine; the message names the reason and the knob.

    Errors of the kernels come as this one, with the kernel's own as its cause.
    """


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
