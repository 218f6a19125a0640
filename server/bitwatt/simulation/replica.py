"""A server in simulated time: the engine's own scheduler, and a clock of measured steps.

It steps as EngineCore does, with one step planned while the one before runs: a request that comes
in the middle of a step waits for its end, and for the step that was planned behind it.
"""

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.plan import Plan
from bitwatt.scheduling.request import Request, ResolvedSampling
from bitwatt.scheduling.scheduler import RequestTooLongError, Scheduler
from bitwatt.simulation.pace import Pace, steady
from bitwatt.simulation.step_times import StepTimes, StepWork
from bitwatt.simulation.traffic import Arrival

__all__ = ["BLOCK_SIZE", "Engine", "Replica", "Served"]

BLOCK_SIZE = 16
_HALF_WAIT_OTHERS = 3  # open requests at which one waits half of what it does among many


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """How a replica's engine is set, as bitwatt serve's flags of these names."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int
    num_blocks: int
    prefix_caching: bool = False


@dataclass(slots=True, eq=False)
class Served:
    """A request and what became of it; times in seconds, as its caller sees them.

    ended_s       None while it runs, and of one that a replica lost
    error         why it was refused or lost
    is_impossible  whether it was refused, as no replica of this kind could ever run it
    """

    arrival: Arrival
    first_token_s: float | None = None
    ended_s: float | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None
    is_impossible: bool = False

    @property
    def ttft_s(self) -> float:
        """From the request to its first token."""
        assert self.first_token_s is not None
        return self.first_token_s - self.arrival.time_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of each token after the first; None of one token."""
        if self.num_tokens < 2 or self.ended_s is None or self.first_token_s is None:
            return None
        return (self.ended_s - self.first_token_s) / (self.num_tokens - 1)


@dataclass(slots=True)
class _InFlight:
    plan: Plan
    ends_s: float


@dataclass(slots=True)
class Replica:
    """One server. Call submit in order of time, and run_until before what happens at a time.

    pace    how many times as long as in step_times everything takes, at a simulated time
    now_s   how far it has come
    busy_s  seconds in which a step ran
    """

    engine: Engine
    step_times: StepTimes
    pace: Pace = steady
    now_s: float = 0.0
    busy_s: float = 0.0
    _scheduler: Scheduler = field(init=False)
    _open: dict[str, Served] = field(default_factory=dict)
    _coming: list[tuple[float, int, Request]] = field(default_factory=list)  # a heap
    _in_flight: _InFlight | None = None
    _device_free_s: float = 0.0
    _ids: Iterator[int] = field(default_factory=count)
    _chance: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self._scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        engine = self.engine
        blocks = BlockAllocator(engine.num_blocks, BLOCK_SIZE, prefix_caching=engine.prefix_caching)
        return Scheduler(
            blocks,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_model_len=engine.max_model_len,
        )

    @property
    def num_open(self) -> int:
        """Requests that run or wait."""
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """Of those, requests that don't run yet."""
        return self._scheduler.num_waiting + len(self._coming)

    def submit(self, arrival: Arrival) -> Served:
        """Take a request at its time; what becomes of it is written where it is returned.

        One that could never run has an error at once.
        """
        served = Served(arrival)
        request = Request(
            request_id=str(next(self._ids)),
            prompt_token_ids=self._prompt(arrival),
            sampling=ResolvedSampling(max_tokens=arrival.num_tokens),
        )
        reason = self._why_never(request)
        if reason is not None:
            served.error = reason
            served.is_impossible = True
            return served
        self._open[request.request_id] = served
        # What a request costs outside the engine is spent before it gets there.
        pace = self.pace(arrival.time_s)
        came_s = arrival.time_s + pace * self.step_times.overhead_s
        if others := len(self._open) - 1:
            share = others / (others + _HALF_WAIT_OTHERS)
            came_s += pace * share * self.step_times.busy_wait_s
            self._work(arrival.time_s, pace * self.step_times.busy_work_s)
        heapq.heappush(self._coming, (came_s, next(self._ids), request))
        return served

    def _work(self, time_s: float, seconds: float) -> None:
        """Take the processors for so long: from the step that runs, or else from the next."""
        if self._in_flight is not None:
            self._in_flight.ends_s += seconds
        self._device_free_s = max(self._device_free_s, time_s) + seconds
        self.busy_s += seconds

    def run_until(self, time_s: float) -> None:
        """Go on to this time; a step that has begun by then is finished."""
        while self.now_s < time_s and self.advance(time_s):
            pass
        self.now_s = max(self.now_s, time_s)

    def run_to_end(self) -> None:
        """Serve all that was submitted."""
        while self.advance():
            pass

    def lose_all(self, reason: str, until_s: float) -> list[Served]:
        """Crash: lose every open request and the cache, be gone until a time; return those lost."""
        lost = list(self._open.values())
        for served in lost:
            served.error = reason
        self._open.clear()
        self._coming.clear()
        self._in_flight = None
        self._scheduler = self._new_scheduler()
        self.now_s = self._device_free_s = until_s
        return lost

    def _why_never(self, request: Request) -> str | None:
        num_blocks = -(-(request.max_len - 1) // BLOCK_SIZE)
        if request.max_len > self.engine.max_model_len:
            return f"{request.max_len} tokens are more than {self.engine.max_model_len}"
        if num_blocks > self.engine.num_blocks:
            return f"{num_blocks} KV-cache blocks are more than {self.engine.num_blocks}"
        return None

    def _prompt(self, arrival: Arrival) -> list[int]:
        """Return tokens that equal another's in the shared prefix alone."""
        if not self.engine.prefix_caching:
            return [0] * arrival.num_prompt_tokens
        shared = min(arrival.num_prefix_tokens, arrival.num_prompt_tokens)
        own = arrival.num_prompt_tokens - shared
        return [arrival.prefix] * shared + [-1 - self._chance.getrandbits(62) for _ in range(own)]

    def advance(self, limit_s: float = math.inf) -> bool:
        """Take one turn of the engine's loop; return False if there is nothing to do before."""
        self._take_coming()
        if not self._scheduler.has_work and self._in_flight is None:
            if not self._coming or self._coming[0][0] > limit_s:
                return False
            self.now_s = max(self.now_s, self._coming[0][0])
            self._take_coming()
        plan = self._scheduler.plan()
        launched = None
        if plan.chunks:
            starts_s = max(self.now_s, self._device_free_s)
            seconds = self.pace(starts_s) * self.step_times.seconds(StepWork.of(plan))
            self._device_free_s = starts_s + seconds
            self.busy_s += seconds
            launched = _InFlight(plan, self._device_free_s)
        done, self._in_flight = self._in_flight, launched
        if done is not None:
            self.now_s = max(self.now_s, done.ends_s)
            self._commit(done.plan)
        return True

    def _take_coming(self) -> None:
        while self._coming and self._coming[0][0] <= self.now_s:
            _, _, request = heapq.heappop(self._coming)
            try:
                self._scheduler.add(request)
            except RequestTooLongError as error:  # submit has looked for these
                raise AssertionError from error

    def _commit(self, plan: Plan) -> None:
        num_samples = sum(chunk.samples for chunk in plan.chunks)
        for committed in self._scheduler.commit(plan, [0] * num_samples):
            served = self._open[committed.request.request_id]
            served.num_tokens += 1
            if served.first_token_s is None:
                served.first_token_s = self.now_s
                served.num_cached_tokens = committed.request.num_cached_tokens or 0
            if committed.finish_reason is not None:
                served.ended_s = self.now_s
                del self._open[committed.request.request_id]
