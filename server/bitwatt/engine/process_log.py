"""An engine process's log: its standard error, which becomes lines of the API process's own log.

So all that an engine says has the API's format, whoever writes it: records of its loggers arrive
whole, with their tracebacks; what libraries or the interpreter print, line by line.
"""

import asyncio
import faulthandler
import json
import logging
import os
import sys
from contextlib import suppress
from types import TracebackType

import msgspec

__all__ = ["EngineLog", "log_to_parent"]

_READ_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 20  # a traceback of a deep recursion is some 100 KiB


class _Record(msgspec.Struct, frozen=True, tag="log record"):
    """A record of one of the engine's loggers."""

    logger: str
    level: int
    message: str
    exception: str | None


class _LineFormatter(logging.Formatter):
    """Puts a record on one line, for EngineLog to read."""

    def format(self, record: logging.LogRecord) -> str:
        exception = self.formatException(record.exc_info) if record.exc_info else None
        message = _encodable(record.getMessage())
        line = _Record(record.name, record.levelno, message, exception and _encodable(exception))
        return json.dumps(msgspec.to_builtins(line))  # ASCII, whatever the locale


def _encodable(text: str) -> str:
    """Return the text with lone surrogates spelled out: no log takes them."""
    return text.encode("utf-8", "backslashreplace").decode()


def log_to_parent() -> None:
    """Have this engine process's warnings, errors and last traceback reach its parent whole."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(True)
    faulthandler.enable()

    def log_last(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        logging.getLogger(__name__).critical(
            "the engine process ends: %s", error, exc_info=(kind, error, traceback)
        )

    sys.excepthook = log_last


class EngineLog:
    """A pipe for an engine process's standard error, read in the event loop it is made in.

    writable  the end for the process, closed here by close_writable once the process has it
    """

    def __init__(self, name: str) -> None:
        """Open the pipe; raises OSError.

        name  the model's, for each line
        """
        self._name = name
        self._rest = b""
        self._readable, self.writable = os.pipe()
        os.set_blocking(self._readable, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._readable, self._read)

    def __enter__(self) -> "EngineLog":
        return self

    def __exit__(self, *_: object) -> None:
        """Log what is left and close the pipe."""
        self.close_writable()
        while self._read():
            pass
        self._log_line(self._rest)
        self._loop.remove_reader(self._readable)
        os.close(self._readable)

    def close_writable(self) -> None:
        """Close this process's writable end, if it is open."""
        if self.writable >= 0:
            os.close(self.writable)
            self.writable = -1

    def _read(self) -> bool:
        """Log the lines that have come; return whether more may have."""
        data = b""
        with suppress(BlockingIOError):
            data = os.read(self._readable, _READ_BYTES)
            if not data:
                self._loop.remove_reader(self._readable)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._log_line(line)
        return bool(data)

    def _log_line(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            said = msgspec.convert(json.loads(line), _Record)
        except (ValueError, RecursionError, msgspec.ValidationError):
            said = _Record(__name__, logging.WARNING, line.decode("utf-8", "replace"), None)
        logger = logging.getLogger(said.logger)
        if logger.isEnabledFor(said.level):
            message = f"the engine of {self._name}: {said.message}"
            record = logging.LogRecord(said.logger, said.level, "", 0, message, None, None)
            record.exc_text = said.exception
            logger.handle(record)
