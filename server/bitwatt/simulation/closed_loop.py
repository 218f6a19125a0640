"""Callers who each ask again once they are answered: what requests cost each other under load.

A lone caller shows how long a request waits outside the engine. Closed loops show how much longer
it waits where steps run, and how much of a step's time it takes: both are found by simulating the
loops that were measured.
"""

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bitwatt.simulation.callers import Callers, Stream, prompt_of
from bitwatt.simulation.replica import Engine, Replica, Served
from bitwatt.simulation.step_times import StepTimes
from bitwatt.simulation.traffic import Arrival

__all__ = [
    "ClosedLoop",
    "fitting_lengths",
    "measure_loop",
    "pace_of",
    "saturation",
    "simulate_loop",
    "with_loads",
]

_HALVINGS = 6
_FIRST_STEP_S = 8e-3
# Of some hundred requests a median time to the first token has about three times the relative
# standard error of their number a second.
_TTFT_WEIGHT = 0.1
_SATURATING_REQUESTS = 10  # a caller
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """What so many callers saw.

    lengths     tokens of prompt and answer of each request, in the order in which they were sent
    seconds     from the first request to the last token
    ttft_p50_s  median time to the first token
    """

    num_callers: int
    lengths: tuple[tuple[int, int], ...]
    seconds: float
    ttft_p50_s: float

    @property
    def requests_per_s(self) -> float:
        return len(self.lengths) / self.seconds


async def measure_loop(
    callers: Callers,
    num_callers: int,
    lengths: Sequence[tuple[int, int]],
    *,
    seconds: float,
) -> ClosedLoop:
    """Return what the callers see who take the lengths in turn for so long.

    Each has one request at least, and ends it. No prompt was ever sent before.

    Raises  ClientError, OSError
    """
    started = time.perf_counter()
    first_number = next(_numbers) << 32
    taken: list[tuple[int, int]] = []

    async def call() -> list[Stream]:
        streams: list[Stream] = []
        while not streams or time.perf_counter() < started + seconds:
            number = len(taken)
            taken.append(lengths[number % len(lengths)])
            prompt, answer = taken[-1]
            unique = first_number + number
            ids = prompt_of(prompt, unique)
            streams.append(await callers.stream(ids, answer, f"loop {unique}"))
        return streams

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call()) for _ in range(num_callers)]
    streams = list(itertools.chain.from_iterable(task.result() for task in tasks))
    return ClosedLoop(
        num_callers=num_callers,
        lengths=tuple(taken),
        seconds=max(one.times_s[-1] for one in streams) - started,
        ttft_p50_s=statistics.median(one.ttft_s for one in streams),
    )


def simulate_loop(
    engine: Engine,
    step_times: StepTimes,
    num_callers: int,
    lengths: Sequence[tuple[int, int]],
) -> ClosedLoop:
    """Return what a simulated server makes of it."""
    replica = Replica(engine, step_times)
    waiting = iter(lengths)
    served = [replica.submit(Arrival(0.0, *one)) for one in itertools.islice(waiting, num_callers)]
    running = list(served)
    while replica.advance():
        still: list[Served] = []
        for one in running:
            if one.ended_s is None:
                still.append(one)
            elif (lengths_ := next(waiting, None)) is not None:
                still.append(replica.submit(Arrival(one.ended_s, *lengths_)))
                served.append(still[-1])
        running = still
    return ClosedLoop(
        num_callers=num_callers,
        lengths=tuple(lengths),
        seconds=max(one.ended_s or 0.0 for one in served),
        ttft_p50_s=statistics.median(one.ttft_s for one in served),
    )


def with_loads(engine: Engine, step_times: StepTimes, loops: Sequence[ClosedLoop]) -> StepTimes:
    """Return step times with the wait and the work by which simulated loops are nearest to these.

    Nearest in the squares of the logarithms of duration and median time to the first token, the
    latter counting less, as it is known less well; neither is below 0.
    """
    if not loops:
        return step_times

    def distance(at: tuple[float, ...]) -> float:
        times = step_times.at_load(*at)
        found = [simulate_loop(engine, times, loop.num_callers, loop.lengths) for loop in loops]
        return sum(
            math.log(one.seconds / loop.seconds) ** 2
            + _TTFT_WEIGHT * math.log(one.ttft_p50_s / loop.ttft_p50_s) ** 2
            for one, loop in zip(found, loops, strict=True)
        )

    return step_times.at_load(*_least(distance, (0.0, 0.0), _FIRST_STEP_S))


def fitting_lengths(engine: Engine, arrivals: Iterable[Arrival]) -> list[tuple[int, int]]:
    """Return tokens of prompt and answer of the requests that fit into the context."""
    lengths = [(one.num_prompt_tokens, one.num_tokens) for one in arrivals]
    return [one for one in lengths if sum(one) <= engine.max_model_len]


def pace_of(engine: Engine, step_times: StepTimes, loop: ClosedLoop) -> float:
    """Return how many times as long the loop took as a simulated one."""
    return loop.seconds / simulate_loop(engine, step_times, loop.num_callers, loop.lengths).seconds


def saturation(engine: Engine, step_times: StepTimes, lengths: Sequence[tuple[int, int]]) -> float:
    """Return the requests a second of a simulated server that always has as many as can run."""
    repeated = itertools.cycle(lengths)
    many = list(itertools.islice(repeated, _SATURATING_REQUESTS * engine.max_num_seqs))
    return simulate_loop(engine, step_times, engine.max_num_seqs, many).requests_per_s


def _least(
    distance: Callable[[tuple[float, ...]], float], here: tuple[float, ...], step: float
) -> tuple[float, ...]:
    """Return where, at or above 0, the distance is least, found along each axis by halved steps."""
    best = distance(here)
    for _ in range(_HALVINGS):
        has_moved = True
        while has_moved:
            has_moved = False
            for axis, sign in itertools.product(range(len(here)), (1, -1)):
                moved = max(0.0, here[axis] + sign * step)
                there = (*here[:axis], moved, *here[axis + 1 :])
                if there != here and (found := distance(there)) < best:
                    here, best, has_moved = there, found, True
        step /= 2
    return here
