"""Callers who each ask again once they are answered: what requests cost each other under load.

A lone caller shows how long a request waits outside the engine. Closed loops show how much longer
it waits where steps run, and how much of a step's time it takes: both are found by simulating the
loops that were measured.
"""

import asyncio
import heapq
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bitwatt.simulation.callers import Callers, Stream, prompt_of
from bitwatt.simulation.pace import STEADY, Pace, Paces, steady
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
_GOLDEN = 0.618034
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """What so many callers saw.

    lengths          tokens of each request's prompt and answer, in the order in which they came
    longest_pause_s  of a caller before it asks again
    started_s        by time.perf_counter; 0 of a simulated one
    seconds          from the first request to the last token
    ttft_p50_s       median time to the first token
    """

    num_callers: int
    lengths: tuple[tuple[int, int], ...]
    longest_pause_s: float = 0.0
    started_s: float = 0.0
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
    longest_pause_s: float = 0.0,
) -> ClosedLoop:
    """Return what the callers see who take the lengths in turn for so long.

    Each pauses before it asks again, so long at most: without it requests come at the ends of steps
    alone. Each has one request at least, and ends it. No prompt was ever sent before.

    Raises  ClientError, OSError
    """
    started = time.perf_counter()
    first_number = next(_numbers) << 32
    taken: list[tuple[int, int]] = []
    pauses = _shares()

    async def call() -> list[Stream]:
        streams: list[Stream] = []
        while not streams or time.perf_counter() < started + seconds:
            if streams:
                await asyncio.sleep(longest_pause_s * next(pauses))
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
        longest_pause_s=longest_pause_s,
        started_s=started,
        seconds=max(one.times_s[-1] for one in streams) - started,
        ttft_p50_s=statistics.median(one.ttft_s for one in streams),
    )


def simulate_loop(
    engine: Engine,
    step_times: StepTimes,
    num_callers: int,
    lengths: Sequence[tuple[int, int]],
    pace: Pace = steady,
    longest_pause_s: float = 0.0,
) -> ClosedLoop:
    """Return what a simulated server makes of it."""
    replica = Replica(engine, step_times, pace)
    waiting = deque(lengths)
    pauses = _shares()
    asks_s = [0.0] * min(num_callers, len(lengths))  # a heap
    served: list[Served] = []
    running: list[Served] = []
    while running or (asks_s and waiting):
        ask_s = asks_s[0] if asks_s and waiting else math.inf
        if replica.now_s < ask_s and replica.advance(ask_s):
            ended = [one for one in running if one.ended_s is not None]
            for one in ended:
                assert one.ended_s is not None
                running.remove(one)
                heapq.heappush(asks_s, one.ended_s + longest_pause_s * next(pauses))
        else:
            running.append(replica.submit(Arrival(heapq.heappop(asks_s), *waiting.popleft())))
            served.append(running[-1])
    return ClosedLoop(
        num_callers=num_callers,
        lengths=tuple(lengths),
        longest_pause_s=longest_pause_s,
        seconds=max(one.ended_s or 0.0 for one in served),
        ttft_p50_s=statistics.median(one.ttft_s for one in served),
    )


def _shares() -> Iterator[float]:
    """Return the shares of the longest pause that callers take: evenly spread, always the same."""
    return (_GOLDEN * number % 1 for number in itertools.count(1))


def with_loads(
    engine: Engine, step_times: StepTimes, loops: Sequence[ClosedLoop], paces: Paces = STEADY
) -> StepTimes:
    """Return step times with the wait and the work by which simulated loops are nearest to these.

    Nearest in the squares of the logarithms of duration and median time to the first token, the
    latter counting less, as it is known less well; neither is below 0. Loops are simulated at the
    paces of their time.
    """
    if not loops:
        return step_times
    pace_of_loops = [paces.since(loop.started_s) for loop in loops]

    def distance(at: tuple[float, ...]) -> float:
        times = step_times.at_load(*at)
        found = [
            simulate_loop(engine, times, loop.num_callers, loop.lengths, pace, loop.longest_pause_s)
            for loop, pace in zip(loops, pace_of_loops, strict=True)
        ]
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


def pace_of(
    engine: Engine, step_times: StepTimes, loop: ClosedLoop, paces: Paces = STEADY
) -> float:
    """Return how many times as long the loop took as one that is simulated at these paces."""
    pace = paces.since(loop.started_s)
    simulated = simulate_loop(engine, step_times, loop.num_callers, loop.lengths, pace)
    return loop.seconds / simulated.seconds


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
