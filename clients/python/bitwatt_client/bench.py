"""A benchmark of one model: so many requests at once, or so many a second."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from bitwatt_client.errors import ClientError, ServerError, told
from bitwatt_client.server import Answer, Server, whole_answer
from bitwatt_client.workload import Asked

__all__ = ["Api", "BenchPlan", "BenchRun", "Failure", "Slo", "run_bench"]

Api = Literal["chat", "completions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a caller is promised of a request, in seconds; None promises nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @property
    def promises_anything(self) -> bool:
        """Whether there is a limit at all."""
        return not (self.ttft_s is None and self.tpot_s is None and self.e2e_s is None)

    def is_met(self, answer: Answer) -> bool:
        """Return whether the answer kept every limit; one without later tokens has no TPOT."""
        pairs = ((answer.ttft_s, self.ttft_s), (answer.tpot_s, self.tpot_s))
        return all(
            limit is None or value is None or value <= limit
            for value, limit in (*pairs, (answer.e2e_s, self.e2e_s))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """How the requests are sent.

    concurrency  requests open at once at most; None for any number
    rate         requests a second (open loop); None sends one when another ends (closed loop)
    burstiness   shape of the gamma distribution of gaps: 1 makes arrivals Poisson, less is burstier
    max_tokens   of answers whose request doesn't say; None leaves it to the server
    max_s        after which nothing new is sent and what runs is dropped
    """

    asked: Sequence[Asked]
    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0
    api: Api = "chat"
    max_tokens: int | None = None
    temperature: float | None = 0.0
    ignore_eos: bool = False
    max_s: float = 3600.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed.

    kind  by which failures are counted: the status, or the name of what broke
    """

    kind: str
    message: str


@dataclass(slots=True, kw_only=True)
class BenchRun:
    """What a benchmark brought; outcomes stand in the order of the plan's requests.

    outcomes      None where max_s left a request unsent or unfinished
    wall_s        from the first arrival to the last end
    most_open     requests that were open at once
    send_delay_s  by which the client itself was late to send a request, at most
    """

    outcomes: list[Answer | Failure | None]
    wall_s: float = 0.0
    most_open: int = 0
    send_delay_s: float = 0.0
    _num_open: int = field(default=0, repr=False)

    @property
    def answers(self) -> list[Answer]:
        """The requests that were answered."""
        return [one for one in self.outcomes if isinstance(one, Answer)]

    @property
    def failures(self) -> list[Failure]:
        """The requests that failed."""
        return [one for one in self.outcomes if isinstance(one, Failure)]

    @property
    def num_cut(self) -> int:
        """Requests that max_s left unsent or unfinished."""
        return sum(one is None for one in self.outcomes)

    def opens(self) -> None:
        """Count a request that is sent."""
        self._num_open += 1
        self.most_open = max(self.most_open, self._num_open)

    def closes(self) -> None:
        """Count a request that has ended."""
        self._num_open -= 1


def arrivals(plan: BenchPlan) -> Iterator[float]:
    """Yield when each request of an open loop is due, in seconds from the start."""
    assert plan.rate is not None
    chance = random.Random(plan.seed)  # noqa: S311 - a workload, no secret
    due_s = 0.0
    for _ in plan.asked:
        yield due_s
        due_s += chance.gammavariate(plan.burstiness, 1 / (plan.rate * plan.burstiness))


async def run_bench(
    server: Server, plan: BenchPlan, *, on_end: Callable[[], None] | None = None
) -> BenchRun:
    """Return what the server did with the plan. Requests that fail are counted, not raised.

    In an open loop a request's time counts from when it was due, sent or not: a server that is slow
    delays no arrival, and what waits for it counts (coordinated omission).

    on_end  called when a request has ended
    """
    run = BenchRun(outcomes=[None] * len(plan.asked))
    started_s = time.perf_counter()
    send = _send_when_due if plan.rate is not None else _send_when_free
    try:
        async with asyncio.timeout(plan.max_s), asyncio.TaskGroup() as group:
            await send(server, plan, run, group, started_s, on_end or (lambda: None))
    except TimeoutError:
        pass
    run.wall_s = time.perf_counter() - started_s
    return run


async def _send_when_free(
    server: Server,
    plan: BenchPlan,
    run: BenchRun,
    group: asyncio.TaskGroup,
    _: float,
    on_end: Callable[[], None],
) -> None:
    numbers = iter(range(len(plan.asked)))

    async def call() -> None:
        for number in numbers:
            await _request(server, plan, run, number, time.perf_counter())
            on_end()

    for _ in range(min(plan.concurrency or len(plan.asked), len(plan.asked))):
        group.create_task(call())


async def _send_when_due(
    server: Server,
    plan: BenchPlan,
    run: BenchRun,
    group: asyncio.TaskGroup,
    started_s: float,
    on_end: Callable[[], None],
) -> None:
    places = nullcontext() if plan.concurrency is None else asyncio.Semaphore(plan.concurrency)

    async def call(number: int, due_s: float) -> None:
        run.send_delay_s = max(run.send_delay_s, time.perf_counter() - due_s)
        async with places:
            await _request(server, plan, run, number, due_s)
        on_end()

    for number, after_s in enumerate(arrivals(plan)):
        due_s = started_s + after_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        group.create_task(call(number, due_s))


async def _request(
    server: Server, plan: BenchPlan, run: BenchRun, number: int, due_s: float
) -> None:
    """Send a request whose time counts from due_s, and keep what became of it."""
    run.opens()
    try:
        run.outcomes[number] = await ask(
            server, plan, plan.asked[number], due_s, plan.seed + number
        )
    except (ClientError, httpx.HTTPError, httpx.InvalidURL) as error:
        run.outcomes[number] = Failure(_kind(error), told(error))
    finally:
        run.closes()


async def ask(server: Server, plan: BenchPlan, asked: Asked, due_s: float, seed: int) -> Answer:
    """Return the answer to one request of the plan.

    Raises  ServerError, StreamError, httpx.HTTPError
    """
    max_tokens = plan.max_tokens if asked.max_tokens is None else asked.max_tokens
    options: dict[str, Any] = {"seed": seed % 2**31}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if plan.temperature is not None:
        options["temperature"] = plan.temperature
    if plan.ignore_eos:
        options["ignore_eos"] = True
    if plan.api == "completions":
        assert asked.prompt is not None, "the completions API has no messages"
        return await whole_answer(server.stream_completion(asked.prompt, **options), due_s)
    return await whole_answer(server.stream_chat(asked.as_messages(), **options), due_s)


def _kind(error: Exception) -> str:
    if isinstance(error, ServerError):
        return f"HTTP {error.status}"
    return type(error).__name__
