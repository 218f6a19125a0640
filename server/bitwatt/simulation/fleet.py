"""Many replicas in simulated time: a day's traffic, routers, and machines that fail.

Each replica is a simulation.replica.Replica, so the engine's own scheduler and prefix cache. All
times are in seconds.
"""

import gc
import heapq
import math
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from multiprocessing import get_context

from bitwatt.errors import BitwattError
from bitwatt.simulation.capacity import percentile
from bitwatt.simulation.replica import Engine, Replica, Served
from bitwatt.simulation.routers import Router, new_routers
from bitwatt.simulation.step_times import StepTimes
from bitwatt.simulation.traffic import Arrival, Lengths

__all__ = [
    "NUM_HOURS",
    "DayTraffic",
    "Failures",
    "FleetError",
    "FleetRun",
    "Hour",
    "simulate_day",
    "simulate_fleet",
]

NUM_HOURS = 24
_ALONE = 20_000  # requests that take less than a process's start is worth


class FleetError(BitwattError):
    """There is nothing to simulate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DayTraffic:
    """One day's requests, whose rate follows a sine from night to noon and back.

    requests_per_s  mean over the day
    day_s           how long the day is
    swing           of the rate about its mean, 0 to 1: 0.6 has 1.6 times the mean at noon
    num_prefixes    beginnings that prompts share, the i-th in proportion to 1 / i (Zipf's law)
    prefix_tokens   of each beginning; a prompt's own tokens come behind it
    """

    requests_per_s: float
    day_s: float
    swing: float
    prompt_tokens: Lengths
    answer_tokens: Lengths
    num_prefixes: int = 1000
    prefix_tokens: int = 0

    def rate_at(self, time_s: float) -> float:
        """Return requests a second at a time; the day begins at night."""
        return self.requests_per_s * (1 - self.swing * math.cos(2 * math.pi * time_s / self.day_s))

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """Yield the day's requests in order: a Poisson process of that rate, by thinning."""
        chance = random.Random(seed)
        highest = self.requests_per_s * (1 + self.swing)
        prefixes = range(1, self.num_prefixes + 1)
        weights = list(accumulate(1 / rank for rank in prefixes))
        time_s = 0.0
        while (time_s := time_s + chance.expovariate(highest)) < self.day_s:
            if chance.random() * highest >= self.rate_at(time_s):
                continue
            [prefix] = chance.choices(prefixes, cum_weights=weights)
            own = self.prompt_tokens.draw(chance)
            num_tokens = self.answer_tokens.draw(chance)
            yield Arrival(time_s, self.prefix_tokens + own, num_tokens, prefix, self.prefix_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Replicas that crash: each by a Poisson process of its own.

    mean_time_between_s  of one replica; None for none
    repair_s             until it serves again, with an empty cache
    """

    mean_time_between_s: float | None = None
    repair_s: float = 60.0

    def times(self, num_replicas: int, day_s: float, seed: int) -> list[tuple[float, int]]:
        """Return when which replica crashes, in order."""
        if self.mean_time_between_s is None:
            return []
        chance = random.Random(f"failures {seed}")
        found: list[tuple[float, int]] = []
        time_s = 0.0
        while (
            time_s := time_s + chance.expovariate(num_replicas / self.mean_time_between_s)
        ) < day_s:
            found.append((time_s, chance.randrange(num_replicas)))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Hour:
    """A 24th of the day, by when requests came.

    ttft_s, tpot_s  at the percentile asked for; None where nothing was answered
    cached_share    of the prompts' tokens
    """

    num_requests: int
    num_lost: int
    ttft_s: float | None
    tpot_s: float | None
    cached_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRun:
    """What a router made of the day.

    router       its name
    day          all hours as one
    num_crashes  of replicas that were up
    num_unrouted requests for which no replica was up; they are among the lost
    utilization  share of the replicas' time in which a step ran; more than 1 where steps ran on
                 after the day's end
    busy_s       of all replicas
    num_tokens   answered
    """

    router: str
    hours: tuple[Hour, ...]
    day: Hour
    num_crashes: int
    num_unrouted: int
    utilization: float
    busy_s: float
    num_tokens: int


@dataclass(slots=True)
class _Fleet:
    replicas: list[Replica]
    up_from_s: list[float]
    crashes: list[tuple[float, int]]
    repair_s: float
    num_crashes: int = 0
    served: list[Served] = field(default_factory=list)

    def crash_until(self, time_s: float) -> None:
        """Have replicas crash whose time has come."""
        while self.crashes and self.crashes[0][0] <= time_s:
            at_s, index = heapq.heappop(self.crashes)
            if self.up_from_s[index] > at_s:
                continue  # it is down
            replica = self.replicas[index]
            replica.run_until(at_s)
            until_s = at_s + self.repair_s
            replica.lose_all("its replica crashed", until_s)
            self.up_from_s[index] = until_s
            self.num_crashes += 1


def simulate_fleet(
    num_replicas: int,
    engine: Engine,
    step_times: StepTimes,
    traffic: DayTraffic,
    router: Router,
    *,
    failures: Failures | None = None,
    share: float = 95.0,
    seed: int = 0,
) -> FleetRun:
    """Return what becomes of the day. One seed gives every router the same requests and crashes.

    share  the percentile of what is told of times
    """
    failures = failures or Failures()
    fleet = _Fleet(
        [Replica(engine, step_times) for _ in range(num_replicas)],
        [0.0] * num_replicas,
        failures.times(num_replicas, traffic.day_s, seed),
        failures.repair_s,
    )
    num_unrouted = 0
    for arrival in traffic.arrivals(seed):
        time_s = arrival.time_s
        fleet.crash_until(time_s)

        def look(index: int, time_s: float = time_s) -> int | None:
            if fleet.up_from_s[index] > time_s:
                return None
            fleet.replicas[index].run_until(time_s)
            return fleet.replicas[index].num_open

        chosen = router.choose(arrival, look)
        if chosen is None:
            num_unrouted += 1
            fleet.served.append(Served(arrival, error="no replica was up"))
        else:
            fleet.replicas[chosen].run_until(time_s)
            fleet.served.append(fleet.replicas[chosen].submit(arrival))
    _refuse_impossible(fleet.served)
    fleet.crash_until(traffic.day_s)
    for replica in fleet.replicas:
        replica.run_to_end()
    busy_s = sum(replica.busy_s for replica in fleet.replicas)
    bounds = [traffic.day_s * hour / NUM_HOURS for hour in range(NUM_HOURS + 1)]
    return FleetRun(
        router=router.name,
        hours=tuple(
            _hour([s for s in fleet.served if low <= s.arrival.time_s < high], share)
            for low, high in pairwise(bounds)
        ),
        day=_hour(fleet.served, share),
        num_crashes=fleet.num_crashes,
        num_unrouted=num_unrouted,
        utilization=busy_s / (num_replicas * traffic.day_s),
        busy_s=busy_s,
        num_tokens=sum(s.num_tokens for s in fleet.served if s.error is None),
    )


def simulate_day(
    num_replicas: int,
    engine: Engine,
    step_times: StepTimes,
    traffic: DayTraffic,
    *,
    max_open: int,
    failures: Failures | None = None,
    share: float = 95.0,
    seed: int = 0,
) -> list[FleetRun]:
    """Return what each router makes of the same day; long ones side by side, in processes.

    max_open  open requests at which prefix-affine routing goes elsewhere
    """
    routers = new_routers(num_replicas, max_open=max_open, seed=seed)
    simulate = partial(
        simulate_fleet,
        *(num_replicas, engine, step_times, traffic),
        failures=failures,
        share=share,
        seed=seed,
    )
    num_processes = min(len(routers), len(os.sched_getaffinity(0)))
    if num_processes == 1 or traffic.requests_per_s * traffic.day_s < _ALONE:
        return [simulate(router) for router in routers]
    with ProcessPoolExecutor(
        num_processes, mp_context=get_context("spawn"), initializer=gc.disable
    ) as processes:
        return list(processes.map(simulate, routers))


def _refuse_impossible(served: Sequence[Served]) -> None:
    never = [one for one in served if one.is_impossible]
    if never:
        raise FleetError(
            f"{len(never)} of {len(served)} requests could never run: {never[0].error} "
            "(--prefix-tokens, --prompt-tokens, --answer-tokens, --max-model-len, --num-blocks)"
        )


def _hour(served: Sequence[Served], share: float) -> Hour:
    answered = [one for one in served if one.error is None]
    num_prompt_tokens = sum(one.arrival.num_prompt_tokens for one in answered)
    return Hour(
        num_requests=len(served),
        num_lost=len(served) - len(answered),
        ttft_s=percentile([one.ttft_s for one in answered], share),
        tpot_s=percentile([t for one in answered if (t := one.tpot_s) is not None], share),
        cached_share=sum(one.num_cached_tokens for one in answered) / num_prompt_tokens
        if num_prompt_tokens
        else None,
    )
