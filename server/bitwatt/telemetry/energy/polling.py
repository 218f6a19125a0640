"""Reads a counter in a thread of its own, and tells of the intervals between its edges."""

import threading
import time
from collections.abc import Callable

from bitwatt.telemetry.energy.attribution import Interval
from bitwatt.telemetry.energy.counter import DeviceState, EnergyCounter

__all__ = ["CounterPoller", "EdgeDetector"]

_MIN_INTERVAL_S = 0.1
_STATE_PERIOD_S = 1.0


class EdgeDetector:
    """Turns readings of a counter that moves now and then into intervals between its moves.

    Between two moves the counter stands still and says nothing: a window that ends there would
    read too little, and the next too much.
    """

    def __init__(self, *, min_interval_s: float = _MIN_INTERVAL_S) -> None:
        self._min_interval_s = min_interval_s
        self._edge: tuple[float, float] | None = None  # moment and joules
        self._last_joules: float | None = None

    def observe(self, moment_s: float, joules: float | None) -> Interval | None:
        """Return the interval that ended with this reading, if the counter moved.

        joules  None where the count was lost: what was spent meanwhile is not known
        """
        moved = None not in (joules, self._last_joules) and joules != self._last_joules
        self._last_joules = joules
        if joules is None:
            self._edge = None
            return None
        if not moved:
            return None
        edge = self._edge
        if edge is None:
            self._edge = moment_s, joules
            return None
        start_s, start_joules = edge
        if moment_s - start_s < self._min_interval_s:
            return None
        self._edge = moment_s, joules
        return Interval(start_s, moment_s, joules - start_joules)


class CounterPoller:
    """A thread that polls the counter: a read may take milliseconds, and an event loop has none.

    on_interval and on_state are called in that thread.
    """

    def __init__(
        self,
        counter: EnergyCounter,
        on_interval: Callable[[Interval], object],
        on_state: Callable[[DeviceState], object],
    ) -> None:
        self._counter = counter
        self._on_interval = on_interval
        self._on_state = on_state
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="energy-poller", daemon=True)

    def start(self) -> None:
        """Begin to poll."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the read that is under way, and let the counter go."""
        self._stopped.set()
        self._thread.join()
        self._counter.close()

    def _run(self) -> None:
        edges = EdgeDetector()
        state_due_s = 0.0
        while not self._stopped.wait(self._counter.poll_s):
            joules = self._counter.read_joules()
            now_s = time.monotonic()
            interval = edges.observe(now_s, joules)
            if interval is not None:
                self._on_interval(interval)
            if now_s >= state_due_s:
                state_due_s = now_s + _STATE_PERIOD_S
                state = self._counter.state()
                if state is not None:
                    self._on_state(state)
