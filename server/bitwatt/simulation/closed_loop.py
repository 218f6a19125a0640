"""Callers who each ask again once they are answered: what requests cost each other under load.

A lone caller shows what a request costs; a closed loop, what it costs the steps of others, and how
much longer its tokens are on their way where many streams share the server's and the callers'
event loops. Both are found by simulating the loops that were measured.
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

_HALVINGS = 24
_ROUNDS = 3  # of fitting one price after the other, which hardly depend on each other
_MOST_S = 0.1  # of a price
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
    """Return step times with the prices of load at which the loops take as long as they did.

    A price is 0 where they were faster than without it.
    """

    def excess(
        per_request_s: float, per_open_s: float, figure: Callable[[ClosedLoop], float]
    ) -> float:
        """Return by how much the simulated loops take longer, as a sum of logarithms."""
        times = step_times.at_load(per_request_s, per_open_s)
        return sum(
            math.log(figure(simulate_loop(engine, times, loop.num_callers, loop.lengths)))
            - math.log(figure(loop))
            for loop in loops
        )

    per_request_s = per_open_s = 0.0
    for _ in range(_ROUNDS if loops else 0):
        per_request_s = _root(lambda price, other=per_open_s: excess(price, other, _duration))
        per_open_s = _root(lambda price, other=per_request_s: excess(other, price, _ttft))
    return step_times.at_load(per_request_s, per_open_s)


def _duration(loop: ClosedLoop) -> float:
    return loop.seconds


def _ttft(loop: ClosedLoop) -> float:
    return loop.ttft_p50_s


def saturation(engine: Engine, step_times: StepTimes, lengths: Sequence[tuple[int, int]]) -> float:
    """Return the requests a second of a simulated server that always has as many as can run."""
    repeated = itertools.cycle(lengths)
    many = list(itertools.islice(repeated, _SATURATING_REQUESTS * engine.max_num_seqs))
    return simulate_loop(engine, step_times, engine.max_num_seqs, many).requests_per_s


def _root(rising: Callable[[float], float]) -> float:
    """Return where a rising function of 0 to _MOST_S crosses 0, or the end that is nearer."""
    low, high = 0.0, _MOST_S
    if rising(low) >= 0:
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
