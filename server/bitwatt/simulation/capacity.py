"""What one machine bears: the highest rate of requests at which a service level still holds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitwatt.simulation.replica import Engine, Replica, Served
from bitwatt.simulation.step_times import StepTimes
from bitwatt.simulation.traffic import Traffic

__all__ = ["Load", "ServiceLevel", "capacity", "percentile", "simulate"]

_WARM_UP = 0.1  # of the requests, not counted: the machine fills up
_PRECISION = 0.01
_LOWEST_RATE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevel:
    """What callers are promised: this share of the requests is at least as fast.

    ttft_s, tpot_s  None where nothing is promised
    percentile      above 0, below 100
    """

    ttft_s: float | None
    tpot_s: float | None
    percentile: float = 95.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a machine did at a rate.

    ttft_s, tpot_s  at the percentile; None without a request that has one
    tokens_per_s    generated, while requests came
    utilization     share of the time in which a step ran, while requests came
    num_refused     requests that could never run
    refusal         why one of them couldn't
    is_stable       whether requests ended as fast as they came
    """

    requests_per_s: float
    ttft_s: float | None
    tpot_s: float | None
    tokens_per_s: float
    utilization: float
    num_refused: int = 0
    refusal: str | None = None
    is_stable: bool = True

    def meets(self, level: ServiceLevel) -> bool:
        """Return whether it is what was promised."""
        return (
            self.is_stable
            and _is_within(self.ttft_s, level.ttft_s)
            and _is_within(self.tpot_s, level.tpot_s)
        )


def _is_within(value: float | None, limit: float | None) -> bool:
    return value is None or limit is None or value <= limit


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the least value that so many percent don't exceed (nearest rank); None of none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * share / 100) - 1)]


def simulate(
    engine: Engine,
    step_times: StepTimes,
    traffic: Traffic,
    requests_per_s: float,
    *,
    num_requests: int = 2000,
    share: float = 95.0,
    seed: int = 0,
) -> Load:
    """Return what one machine does with so many requests of the traffic."""
    replica = Replica(engine, step_times)
    arrivals = traffic.arrivals(requests_per_s, num_requests, seed)
    served: list[Served] = []
    num_open: list[int] = []
    busy_s = tokens = 0.0
    start = arrivals[0].time_s
    for arrival in arrivals:
        replica.run_until(arrival.time_s)
        served.append(replica.submit(arrival))
        num_open.append(replica.num_waiting)
    span = arrivals[-1].time_s - start or 1 / requests_per_s
    busy_s = replica.busy_s
    tokens = sum(one.num_tokens for one in served)
    replica.run_to_end()
    refused = [one for one in served if one.error is not None]
    counted = [one for one in served[int(len(served) * _WARM_UP) :] if one.error is None]
    return Load(
        requests_per_s=requests_per_s,
        ttft_s=percentile([one.ttft_s for one in counted], share),
        tpot_s=percentile([t for one in counted if (t := one.tpot_s) is not None], share),
        tokens_per_s=tokens / span,
        utilization=min(1.0, busy_s / span),
        num_refused=len(refused),
        refusal=refused[0].error if refused else None,
        is_stable=_is_stable(num_open, engine.max_num_seqs),
    )


def _is_stable(num_waiting: Sequence[int], max_num_seqs: int) -> bool:
    """Return whether the queue of the second half is about that of the first.

    A queue that grows with every request is one that never ends, however short it is yet.
    """
    half = len(num_waiting) // 2
    first = sum(num_waiting[:half]) / max(1, half)
    second = sum(num_waiting[half:]) / max(1, len(num_waiting) - half)
    return second <= 2 * first + max_num_seqs / 4


def capacity(level: ServiceLevel, load_at: Callable[[float], Load]) -> Load | None:
    """Return the load at the highest rate that meets the level, within 1%.

    load_at  simulates a rate, in requests a second
    Returns  None where a lone request misses it already
    """
    lowest = load_at(_LOWEST_RATE)
    if not lowest.meets(level):
        return None
    best, low, high = lowest, _LOWEST_RATE, 1.0
    while (load := load_at(high)).meets(level):
        best, low, high = load, high, high * 4
    while high / low > 4:  # from nothing up, by orders of magnitude first
        middle = math.sqrt(low * high)
        if (load := load_at(middle)).meets(level):
            best, low = load, middle
        else:
            high = middle
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        if (load := load_at(middle)).meets(level):
            best, low = load, middle
        else:
            high = middle
    return best
