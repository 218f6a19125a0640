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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitwatt.simulation.callers import Callers, Stream, prompt_of
from bitwatt.simulation.replica import Engine, Replica, Served
from bitwatt.simulation.step_times import StepTimes
from bitwatt.simulation.traffic import Arrival

__all__ = ["ClosedLoop", "measure_loop", "saturation", "simulate_loop", "with_loads"]

_HALVINGS = 6
_FIRST_STEP_S = 8e-3
_SATURATING_REQUESTS = 10  # a caller


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
    first_number: int,
) -> ClosedLoop:
    """Return what the callers see who take the lengths in turn for so long.

    Each has one request at least, and ends it.

    first_number  of prompts that nobody sent before
    Raises        ClientError, OSError
    """
    started = time.perf_counter()
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
    """Return step times with the work, then the wait, by which simulated loops are nearest these.

    Nearest in the squares of logarithms, of durations for the work: all who ask share it, so that a
    loop's requests a second are the processors'. Of median times to the first token for the wait.
    Neither is below 0.
    """
    if not loops:
        return step_times

    def distance(times: StepTimes, figure: Callable[[ClosedLoop], float]) -> float:
        found = [simulate_loop(engine, times, loop.num_callers, loop.lengths) for loop in loops]
        ratios = [figure(one) / figure(loop) for one, loop in zip(found, loops, strict=True)]
        return sum(math.log(ratio) ** 2 for ratio in ratios)

    work_s = _least(
        lambda work_s: distance(step_times.at_load(0.0, work_s), lambda loop: loop.seconds)
    )
    wait_s = _least(
        lambda wait_s: distance(step_times.at_load(wait_s, work_s), lambda loop: loop.ttft_p50_s)
    )
    return step_times.at_load(wait_s, work_s)


def saturation(engine: Engine, step_times: StepTimes, lengths: Sequence[tuple[int, int]]) -> float:
    """Return the requests a second of a simulated server that always has as many as can run."""
    repeated = itertools.cycle(lengths)
    many = list(itertools.islice(repeated, _SATURATING_REQUESTS * engine.max_num_seqs))
    return simulate_loop(engine, step_times, engine.max_num_seqs, many).requests_per_s


def _least(distance: Callable[[float], float]) -> float:
    """Return where, at or above 0, the distance is least, found by halved steps."""
    here, step = 0.0, _FIRST_STEP_S
    best = distance(here)
    for _ in range(_HALVINGS):
        for sign in (1, -1):
            while (there := max(0.0, here + sign * step)) != here:
                if (found := distance(there)) >= best:
                    break
                here, best = there, found
        step /= 2
    return here
