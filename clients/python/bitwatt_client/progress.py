"""How far a comparison or a benchmark is: a bar on a terminal, a line a window anywhere."""

import time
from collections.abc import Callable
from typing import Self, TextIO

from bitwatt_client.load import Window
from bitwatt_client.terminal import duration, printable

__all__ = ["Progress", "RequestProgress"]

_WIDTH = 24


class Progress:
    """Tells of windows as they end, and on a terminal of requests and the time left.

    As a context it takes the bar away at the end, whatever ends it.
    """

    def __init__(
        self,
        num_windows: int,
        num_requests: int,
        out: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin.

        num_windows   of both models, warm-ups among them
        num_requests  of each window
        """
        self._num_windows = num_windows
        self._num_requests = num_requests
        self._num_windows_done = 0
        self._num_requests_done = 0
        self._out = out
        self._has_bar = out.isatty()
        self._clock = clock
        self._started_s = clock()
        self._show()

    def add_request(self) -> None:
        """Tell of a request that ended."""
        self._num_requests_done += 1
        self._show()

    def add(self, name: str, number: int, window: Window) -> None:
        """Tell of a window.

        name    the model's
        number  of the window among those that count, negative for a warm-up
        """
        kind = "warm-up" if number < 0 else f"window {number + 1}"
        rate = f"{window.tokens_per_s:.1f} tok/s" if window.answers else "no answer"
        failed = f", {len(window.failures)} failed" if window.failures else ""
        self._clear()
        self._out.write(printable(f"{name}, {kind}: {rate}{failed}") + "\n")
        self._num_windows_done += 1
        self._num_requests_done = 0
        self._show()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    def _show(self) -> None:
        if not self._has_bar:
            return
        done = self._num_windows_done + self._num_requests_done / self._num_requests
        share = min(1.0, done / self._num_windows)
        bar = f"{_bar(share)} {self._num_windows_done} of "
        # One model may be many times slower: the pace is known after a window of each.
        left = ""
        if self._num_windows_done > 1:
            elapsed_s = self._clock() - self._started_s
            left = f", {duration(elapsed_s * (1 - share) / share)} left"
        self._out.write(f"\r\x1b[K{bar}{self._num_windows} windows{left}")
        self._out.flush()

    def _clear(self) -> None:
        if self._has_bar:
            self._out.write("\r\x1b[K")
            self._out.flush()


class RequestProgress:
    """A bar of requests that have ended, with the time left; nothing where there is no terminal.

    As a context it takes the bar away at the end, whatever ends it.
    """

    def __init__(
        self, num_requests: int, out: TextIO, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_requests = num_requests
        self._num_done = 0
        self._out = out
        self._has_bar = out.isatty()
        self._clock = clock
        self._started_s = clock()
        self._show()

    def add(self) -> None:
        """Tell of a request that ended."""
        self._num_done += 1
        self._show()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._has_bar:
            self._out.write("\r\x1b[K")
            self._out.flush()

    def _show(self) -> None:
        if not self._has_bar:
            return
        share = self._num_done / self._num_requests
        left = ""
        if self._num_done:
            left_s = (self._clock() - self._started_s) * (1 - share) / share
            left = f", {duration(left_s)} left"
        told = f"{self._num_done} of {self._num_requests} requests{left}"
        self._out.write(f"\r\x1b[K{_bar(share)} {told}")
        self._out.flush()


def _bar(share: float) -> str:
    filled = round(share * _WIDTH)
    return "█" * filled + "·" * (_WIDTH - filled)
