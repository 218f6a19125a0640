"""Measure a served model's steps from outside, as its callers see them.

What server and callers cost besides the engine is then in the figures: on a machine where they
share its cores, a step takes longer than the engine alone would. Nothing else may ask the server.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import httpx
from bitwatt_client.server import Server

from bitwatt.simulation.callers import Callers, Stream, engine_state, prompt_of
from bitwatt.simulation.closed_loop import ClosedLoop, measure_loop, with_loads
from bitwatt.simulation.other_programs import undisturbed
from bitwatt.simulation.replica import BLOCK_SIZE, Engine
from bitwatt.simulation.step_times import MeasuredModel, StepPoint, StepTimes, StepWork

__all__ = ["measure_server"]

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FEW_BATCHES = (1, 8, 32)  # of long prompts
_PROMPTS = (16, 64, 128, 256, 512, 1024, 2048)
_DECODE_PROMPT = 32
_LONG_PROMPT_SHARE = 0.4  # of the context
_STEPS = 32  # of a measured decode
_CALLERS = (2, 4, 8, 16, 32, 64)
_LOOPS_SHARE = 0.5  # of the time
_RUNS = (2, 12)  # of a measurement, at least and at most
_SETTLED = 0.02  # relative standard error of the median


async def measure_server(
    http: httpx.AsyncClient,
    server: Server,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    lengths: Sequence[tuple[int, int]],
    seconds: float = 30.0,
    is_child: bool = False,
    report: Callable[[str], None] = lambda _line: None,
) -> MeasuredModel:
    """Return the model's steps.

    max_num_seqs, max_num_batched_tokens  as the server was started with
    lengths  tokens of prompts and answers, of requests that load it
    seconds  that it may take, about: a measurement is repeated until its median is known to 2%, its
             share of the time is over, or twelve runs were made; two are made whatever they take
    is_child  whether the server is a process of ours: then a closed loop from which other programs
             took the processors is measured again, twice at most
    report   takes a line as each figure is known
    Raises   ClientError, httpx.HTTPError
    """
    before = await engine_state(http, server)
    engine = Engine(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=before["engine"]["max_model_len"],
        num_blocks=before["engine"]["num_blocks"],
    )
    async with Callers(server, authorization=http.headers.get("Authorization")) as callers:
        await _together(callers, min(8, max_num_seqs), _DECODE_PROMPT, _STEPS)  # warm-up
        points = await _steps(callers, engine, seconds * (1 - _LOOPS_SHARE), report)
        fitting = [one for one in lengths if sum(one) <= engine.max_model_len]
        loops = await _loops(callers, engine, fitting, seconds * _LOOPS_SHARE, is_child, report)
    step_times = with_loads(engine, StepTimes.fit(points), loops)
    report(
        f"while a step runs, a request takes {1e3 * step_times.busy_work_s:.1f} ms from it, and "
        f"waits {1e3 * step_times.busy_wait_s:.1f} ms longer"
    )
    after = await engine_state(http, server)
    watts, reason = _watts(before, after)
    return MeasuredModel(
        name=server.model,
        step_times=step_times,
        max_model_len=engine.max_model_len,
        num_blocks=engine.num_blocks,
        watts_busy=watts,
        watts_reason=reason,
    )


async def _steps(
    callers: Callers, engine: Engine, seconds: float, report: Callable[[str], None]
) -> list[StepPoint]:
    long = int(engine.max_model_len * _LONG_PROMPT_SHARE)
    decodes = [
        (batch, num_prompt_tokens, num_tokens)
        for batches, num_prompt_tokens in ((_BATCHES, _DECODE_PROMPT), (_FEW_BATCHES, long))
        for batch in batches
        if batch <= engine.max_num_seqs
        # While the prompts of all are computed, those that were first decode already.
        and (num_tokens := 2 * _STEPS + batch * num_prompt_tokens // engine.max_num_batched_tokens)
        and num_prompt_tokens + num_tokens <= engine.max_model_len
        and batch * -(-(num_prompt_tokens + num_tokens) // BLOCK_SIZE) <= engine.num_blocks
    ]
    longest = min(engine.max_num_batched_tokens, engine.max_model_len - 1)
    prefills = [num_tokens for num_tokens in _PROMPTS if num_tokens <= longest]
    clock = _Clock(seconds, len(decodes) + len(prefills))
    points = []
    for batch, num_prompt_tokens, num_tokens in decodes:
        settled = await clock.settle(
            partial(_decode_s, callers, batch, num_prompt_tokens, num_tokens)
        )
        if settled is None:
            report(f"decode {batch} at {num_prompt_tokens} tokens: every answer came at once")
            continue
        run, spread = settled
        work = StepWork.decode(batch, num_prompt_tokens + num_tokens // 2)
        points.append(StepPoint(work, run, spread=spread))
        report(f"decode {batch} at {num_prompt_tokens} tokens: {_told(run, spread)}")
    for num_tokens in prefills:
        settled = await clock.settle(partial(_ttft_s, callers, num_tokens))
        assert settled is not None, "each run has a time"
        run, spread = settled
        work = StepWork.prefill(num_tokens)
        points.append(StepPoint(work, run, is_whole_request=True, spread=spread))
        report(f"prefill {num_tokens}: {_told(run, spread)} to the first token")
    return points


async def _loops(
    callers: Callers,
    engine: Engine,
    lengths: Sequence[tuple[int, int]],
    seconds: float,
    is_child: bool,
    report: Callable[[str], None],
) -> list[ClosedLoop]:
    loops: list[ClosedLoop] = []
    numbers = sorted({min(number, engine.max_num_seqs) for number in _CALLERS}) if lengths else []
    for num_callers in numbers:

        async def measure(num_callers: int = num_callers) -> ClosedLoop:
            return await measure_loop(callers, num_callers, lengths, seconds=seconds / len(numbers))

        loop = (await undisturbed(measure, report))[0] if is_child else await measure()
        loops.append(loop)
        report(
            f"{num_callers} callers: {loop.requests_per_s:.3g} requests/s, "
            f"{1e3 * loop.ttft_p50_s:.1f} ms to the first token"
        )
    return loops


class _Clock:
    """Shares the time between measurements: what one leaves, those behind it have."""

    def __init__(self, seconds: float, num_left: int) -> None:
        self._ends_s = time.perf_counter() + seconds
        self._num_left = num_left

    async def settle(
        self, run: Callable[[], Awaitable[float | None]]
    ) -> tuple[float, float] | None:
        """Return the median of as many runs as it takes, and their spread, a share of it.

        None where no run brought a time.
        """
        now = time.perf_counter()
        until_s = now + (self._ends_s - now) / max(1, self._num_left)
        self._num_left -= 1
        least, most = _RUNS
        values: list[float] = []
        for num_runs in range(1, most + 1):
            if (value := await run()) is not None:
                values.append(value)
            if values:
                median = statistics.median(values)
                spread = statistics.mean(abs(value - median) for value in values) / median
                # Of a normal distribution a median's standard error is 1.57 of these over √n.
                if len(values) > least and 1.57 * spread < _SETTLED * len(values) ** 0.5:
                    break
            if num_runs >= least and time.perf_counter() >= until_s:
                break
        return (median, spread) if values else None


def _told(seconds: float, spread: float) -> str:
    return f"{1e3 * seconds:.2f} ms ±{spread:.0%}"


_numbers = iter(range(1 << 62))


async def _together(
    callers: Callers, batch: int, num_prompt_tokens: int, max_tokens: int
) -> list[Stream]:
    """Return the streams of so many requests sent at once, of prompts nobody sent before."""
    numbers = [next(_numbers) for _ in range(batch)]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                callers.stream(prompt_of(num_prompt_tokens, n), max_tokens, f"plan {n}")
            )
            for n in numbers
        ]
    return [task.result() for task in tasks]


async def _ttft_s(callers: Callers, num_tokens: int) -> float:
    """Return the seconds of a lone request to its first token."""
    [one] = await _together(callers, 1, num_tokens, 1)
    return one.ttft_s


async def _decode_s(
    callers: Callers, batch: int, num_prompt_tokens: int, num_tokens: int
) -> float | None:
    """Return the seconds of a step while all of the batch decode, its prompts computed.

    None where every answer came in one piece, as from a server or to a caller that was held up.
    """
    streams = await _together(callers, batch, num_prompt_tokens, num_tokens)
    started = max(one.times_s[0] for one in streams)
    ended = min(one.times_s[-1] for one in streams)
    rates = []
    for one in streams:
        inside = [time_s for time_s in one.times_s if started <= time_s <= ended]
        if len(inside) > 1 and inside[-1] > inside[0]:
            tokens_a_chunk = (one.num_tokens - 1) / max(1, len(one.times_s) - 1)
            rates.append((inside[-1] - inside[0]) / (len(inside) - 1) / tokens_a_chunk)
    if rates:
        return statistics.median(rates)
    # They never all ran at once: the mean over the whole answer is what there is.
    means = [tpot for one in streams if (tpot := one.tpot_s)]
    return statistics.median(means) if means else None


def _watts(
    before: dict[str, dict[str, float | None]], after: dict[str, dict[str, float | None]]
) -> tuple[float | None, str | None]:
    """Return the device's power while it stepped, or why that isn't known."""
    started, ended = before["energy"]["joules"], after["energy"]["joules"]
    if started is None or ended is None:
        return None, str(after["energy"]["reason"])
    busy_s = (after["totals"]["busy_s"] or 0.0) - (before["totals"]["busy_s"] or 0.0)
    if busy_s <= 0 or ended <= started:
        return None, "the counter did not move while it was measured"
    return (ended - started) / busy_s, None
