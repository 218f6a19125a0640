"""A device's counter, split over the steps of the engines that share the device."""

import time
from collections import deque
from collections.abc import Callable

from bitwatt.telemetry.energy.attribution import Attributor, Interval, Split, StepWork
from bitwatt.telemetry.energy.counter import EnergyCounter, SourceName

__all__ = ["DeviceMeter"]

_MAX_LAG_S = 60.0


class DeviceMeter:
    """Returns where a device's joules went, one interval of its counter after another.

    Call order: add_model, then add_step and add_interval as they come; settle after either. Used
    from one event loop; reads no counter itself, and knows of models only their names.
    """

    def __init__(
        self, counter: EnergyCounter, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.source: SourceName = counter.source
        self._clock = clock
        self._attributor = Attributor()
        self._intervals: deque[Interval] = deque()  # not split yet
        self._known_until_s: dict[str, float] = {}

    @property
    def num_models(self) -> int:
        """Models whose engines run on the device."""
        return len(self._known_until_s)

    @property
    def idle_watts(self) -> float | None:
        """Power while nothing ran; None before such a moment was measured."""
        return self._attributor.idle_watts

    def add_model(self, model: str) -> None:
        """Wait for this model's steps before an interval is split."""
        self._known_until_s[model] = float("-inf")

    def remove_model(self, model: str) -> None:
        """Wait for no more steps of this model."""
        self._known_until_s.pop(model, None)

    def add_step(self, model: str, step: StepWork | None, known_until_s: float) -> None:
        """Take in a step that has ended, or the word that there was none.

        known_until_s  every step of the model that began before this moment has been reported
        """
        if step is not None:
            self._attributor.add_step(step)
        self._known_until_s[model] = known_until_s

    def add_interval(self, interval: Interval) -> None:
        """Take in what the counter measured between two of its edges."""
        self._intervals.append(interval)

    def settle(self) -> list[Split]:
        """Return the splits of the intervals whose steps are all known now, in order.

        An engine that is silent for a minute holds nothing up: what is not a known step's then is
        unattributed.
        """
        splits = []
        while self._intervals:
            interval = self._intervals[0]
            is_known = all(s >= interval.end_s for s in self._known_until_s.values())
            if not is_known and self._clock() - interval.end_s < _MAX_LAG_S:
                break
            self._intervals.popleft()
            splits.append(self._attributor.split(interval, is_up=is_known))
        return splits

    def unsettled_joules(self, request_id: str) -> float | None:
        """Return what the request's steps would take that no interval covers yet.

        None where that can't be told: see Attributor.unsettled_joules.
        """
        return self._attributor.unsettled_joules(request_id)
