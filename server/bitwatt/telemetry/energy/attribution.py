"""Who a device's joules were spent for: measured energy split over steps, then over requests.

A counter gives joules between two moments. They are spread over the engines' steps by the time
each took of that interval, and within a step over its requests by their tokens, weighted as
token_weights learns. So a request's figure is its proportional share of what was measured, and

    requests + idle + unattributed = measured

holds for every interval. Pure arithmetic: no clock, no device.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bitwatt.telemetry.energy.token_weights import TokenWeights

__all__ = ["Attributor", "Interval", "Phase", "Split", "StepWork"]

Phase = Literal["prefill", "decode", "idle", "unattributed"]

_IDLE_POWER_MEMORY = 0.9  # of the running mean, an idle interval
_MAX_SILENCE_S = 5.0
_MAX_UNSETTLED_S = 120.0  # of steps: a counter that fell silent for good must not collect them


@dataclass(frozen=True, slots=True)
class Interval:
    """Joules a counter measured between two moments, in monotonic seconds."""

    start_s: float
    end_s: float
    joules: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What one engine step computed and when, in monotonic seconds.

    prefill   prompt tokens computed, by request
    decode    requests that got their next token, each once for every token computed to this end:
              drafts that were verified besides
    num_lost  tokens computed for requests that ended meanwhile
    """

    model: str
    start_s: float
    end_s: float
    prefill: Mapping[str, int]
    decode: Sequence[str]
    num_lost: int = 0


@dataclass(slots=True)
class Split:
    """Where an interval's joules went. The four parts add up to the interval's joules."""

    prefill: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by model
    decode: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by model
    idle: float = 0.0
    unattributed: float = 0.0
    by_request: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total(self) -> float:
        """Joules of the four parts; by_request is prefill and decode once more."""
        models = sum(self.prefill.values()) + sum(self.decode.values())
        return models + self.idle + self.unattributed

    def shares_of(self, model: str, *, num_sharing: int) -> dict[Phase, float]:
        """Return one model's joules by phase; what is no step's is shared evenly among so many."""
        return {
            "prefill": self.prefill.get(model, 0.0),
            "decode": self.decode.get(model, 0.0),
            "idle": self.idle / num_sharing,
            "unattributed": self.unattributed / num_sharing,
        }


class Attributor:
    """Splits one device's intervals over the steps of the engines that share it.

    Call order: add_step as steps end; split for one interval after another, each once no step
    that began in it can still be reported. Steps may overlap where engines share the device.
    """

    def __init__(self) -> None:
        self._steps: deque[StepWork] = deque()
        self._weights: dict[str, TokenWeights] = defaultdict(TokenWeights)
        self._settled_s = float("-inf")
        self.idle_watts: float | None = None
        self.busy_watts: float | None = None

    def add_step(self, step: StepWork) -> None:
        """Take in a step that has ended."""
        self._weights[step.model].observe(
            sum(step.prefill.values()), len(step.decode) + step.num_lost, step.end_s - step.start_s
        )
        self._steps.append(step)
        while self._steps[0].end_s < step.end_s - _MAX_UNSETTLED_S:
            self._steps.popleft()

    def split(self, interval: Interval, *, is_up: bool = True) -> Split:
        """Return where the interval's joules went; a step's part before its start is forgotten.

        is_up  False while an engine of the device is down: what isn't a step's then is not idle
               but unattributed
        """
        split = Split()
        length_s = interval.end_s - interval.start_s
        shares = [
            (step, overlap_s)
            for step in self._steps
            if (overlap_s := _overlap_s(step, interval.start_s, interval.end_s)) > 0
        ]
        self._settled_s = interval.end_s
        self._steps = deque(step for step in self._steps if step.end_s > interval.end_s)
        busy_s = _union_s([step for step, _ in shares], interval)
        waiting_s = max(0.0, length_s - busy_s)  # a sum's rounding may have it busy for longer
        waiting = self._waiting_joules(interval, waiting_s, learns=is_up and not shares)
        if is_up:
            split.idle = waiting
        else:
            split.unattributed = waiting
        active = interval.joules - waiting
        if not shares:
            return split
        self.busy_watts = active / busy_s
        per_second = active / sum(overlap_s for _, overlap_s in shares)
        for step, overlap_s in shares:
            self._split_step(step, overlap_s * per_second, split)
        return split

    def unsettled_joules(self, request_id: str) -> float | None:
        """Return what the request's steps not in any interval yet would take at the last power.

        None where there are such steps, and no busy interval was measured yet or the counter has
        been silent for so long that its last power says nothing of them.
        """
        joules = 0.0
        is_stale = bool(self._steps) and self._steps[-1].end_s - self._settled_s > _MAX_SILENCE_S
        for step in self._steps:
            if request_id in step.prefill or request_id in step.decode:
                if self.busy_watts is None or is_stale:
                    return None
                split = Split()
                seconds = step.end_s - max(step.start_s, self._settled_s)
                self._split_step(step, seconds * self.busy_watts, split)
                joules += split.by_request[request_id]
        return joules

    def _waiting_joules(self, interval: Interval, waiting_s: float, *, learns: bool) -> float:
        """Return the joules of the time no step ran, at the idle power where it is known."""
        length_s = interval.end_s - interval.start_s
        mean_watts = interval.joules / length_s
        if learns:
            before = mean_watts if self.idle_watts is None else self.idle_watts
            self.idle_watts = _IDLE_POWER_MEMORY * before + (1 - _IDLE_POWER_MEMORY) * mean_watts
        if waiting_s >= length_s:
            return interval.joules
        watts = mean_watts if self.idle_watts is None else min(self.idle_watts, mean_watts)
        return watts * waiting_s

    def _split_step(self, step: StepWork, joules: float, split: Split) -> None:
        weights = self._weights[step.model]
        num_prefill = sum(step.prefill.values())
        units = weights.prefill * num_prefill + weights.decode * (len(step.decode) + step.num_lost)
        if units <= 0:
            split.unattributed += joules
            return
        per_prefill = joules * weights.prefill / units
        per_decode = joules * weights.decode / units
        split.prefill[step.model] += per_prefill * num_prefill
        split.decode[step.model] += per_decode * len(step.decode)
        split.unattributed += per_decode * step.num_lost
        by_request = split.by_request
        for request_id, num_tokens in step.prefill.items():
            by_request[request_id] += per_prefill * num_tokens
        for request_id in step.decode:
            by_request[request_id] += per_decode


def _overlap_s(step: StepWork, start_s: float, end_s: float) -> float:
    return min(step.end_s, end_s) - max(step.start_s, start_s)


def _union_s(steps: Sequence[StepWork], interval: Interval) -> float:
    """Return the seconds of the interval in which at least one of the steps ran."""
    total_s, reached_s = 0.0, interval.start_s
    for step in sorted(steps, key=lambda step: step.start_s):
        start_s = max(step.start_s, reached_s)
        end_s = min(step.end_s, interval.end_s)
        if end_s > start_s:
            total_s += end_s - start_s
            reached_s = end_s
    return total_s
