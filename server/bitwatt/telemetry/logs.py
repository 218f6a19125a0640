"""The server's log: one line an event, on standard error, as text or as JSON.

Prompts and answers are in no line. Every line of a request's has its id.
"""

import json
import logging
import os
import threading
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from queue import Full, Queue
from typing import Any, Literal

__all__ = [
    "JsonFormatter",
    "LogFormat",
    "TextFormatter",
    "configure_logging",
    "current_request_id",
]

LogFormat = Literal["text", "json"]

current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)
"""The id of the request that the running task serves."""

_STANDARD_ERROR = 2
_FLUSH_S = 1.0
_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",  # uvicorn's message once more
}


class TextFormatter(logging.Formatter):
    """A line for people: time, level, logger, the request's id, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(request)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback follows it."""
        request_id = current_request_id.get()
        record.request = "" if request_id is None else f"[{request_id}] "
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, and what `extra` gave."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without a newline in it."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = current_request_id.get()
        if request_id is not None:
            line["request_id"] = request_id
        line |= {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:  # of another process, where the exception stayed
            line["exception"] = record.exc_text
        return json.dumps(line, ensure_ascii=False, default=str)


class BackgroundHandler(logging.Handler):
    """Writes lines from a thread of its own, so that who doesn't read them holds nobody up.

    Lines beyond max_lines that wait are dropped, and their number is told in the next line.
    """

    def __init__(self, file: int, *, max_lines: int = 10_000) -> None:
        super().__init__()
        self._file = file
        self._lines: Queue[bytes] = Queue(max_lines)
        self._num_dropped = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Have the line written, soon."""
        try:
            lines = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self._num_dropped:
            lines = f"{self.format(self._notice())}\n{lines}"
        try:
            self._lines.put_nowait(f"{lines}\n".encode("utf-8", "backslashreplace"))
            self._num_dropped = 0
        except Full:
            self._num_dropped += 1

    def _notice(self) -> logging.LogRecord:
        told = f"{self._num_dropped} lines before this were not read in time"
        return logging.LogRecord(__name__, logging.WARNING, "", 0, told, None, None)

    def flush(self) -> None:
        """Wait until all is written, for _FLUSH_S at most."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(
                lambda: not self._lines.unfinished_tasks, timeout=_FLUSH_S
            )

    def _write(self) -> None:
        while True:
            rest = self._lines.get()
            with suppress(OSError):  # closed; there is nobody to tell
                while rest:
                    rest = rest[os.write(self._file, rest) :]
            self._lines.task_done()


def configure_logging(level: str, style: LogFormat = "text") -> None:
    """Log from this level on."""
    handler = BackgroundHandler(_STANDARD_ERROR)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("httpx", "httpx2"):  # a line a request: twenty for a model of the hub
        logging.getLogger(name).setLevel(logging.WARNING)
