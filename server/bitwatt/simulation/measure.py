"""Measure a served model's steps from outside, as its callers see them.

What server and callers cost besides the engine is then in the figures: on a machine where they
share its cores, a step takes longer than the engine alone would. Nothing else may ask the server.
"""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import httpx
from bitwatt_client.server import Server

from bitwatt.simulation.callers import Callers, Stream, engine_state, prompt_of
from bitwatt.simulation.closed_loop import ClosedLoop, measure_loop, with_loads
from bitwatt.simulation.other_programs import undisturbed
from bitwatt.simulation.pace import STEADY, PaceMeter, Paces
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
_LONGEST_PAUSE_S = 0.03  # of a caller in a closed loop
_TURNS = (2, 12)  # at least and at most
_LEAST_S = 0.2  # of a step in a turn, where there are 30 seconds


async def measure_server(
    http: httpx.AsyncClient,
    server: Server,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    lengths: Sequence[tuple[int, int]],
    seconds: float = 30.0,
    meter: PaceMeter | None = None,
    report: Callable[[str], None] = lambda _line: None,
) -> MeasuredModel:
    """Return the model's steps.

    max_num_seqs, max_num_batched_tokens  as the server was started with
    lengths  tokens of prompts and answers, of requests that load it
    seconds  that it may take, about: all is measured in turns until they are over, or twelve were
             made; two are made whatever they take
    meter    of the machine that this process and the server share, if it is one of ours: then each
             turn is taken at the pace of its seconds over the usual one, and a closed loop from
             which other programs took the processors is measured again, twice at most
    report   takes a line a figure
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
        steps = _steps(callers, engine)
        fitting = [one for one in lengths if sum(one) <= engine.max_model_len]
        numbers = sorted({min(n, max_num_seqs) for n in _CALLERS}) if fitting else []

        async def take_loop(number: int, seconds: float) -> ClosedLoop:
            run = partial(
                measure_loop,
                callers,
                number,
                fitting,
                seconds=seconds,
                longest_pause_s=_LONGEST_PAUSE_S,
            )
            return (await undisturbed(run, report))[0] if meter else await run()

        began_s = time.perf_counter()
        loops = await _in_turns(steps, take_loop, numbers, seconds)
    paces, probe_s = STEADY, None
    if meter is not None:
        paces = meter.paces()
        probe_s = paces.median(began_s, time.perf_counter())
        paces = paces.over(probe_s)
    points = [point for step in steps if (point := step.point(report, paces)) is not None]
    _tell_loops(loops, report)
    step_times = with_loads(engine, StepTimes.fit(points), loops, paces)
    report(
        f"while a step runs, a request takes {1e3 * step_times.busy_work_s:.1f} ms from it; among "
        f"many others it waits {1e3 * step_times.busy_wait_s:.1f} ms longer"
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
        probe_s=probe_s,
    )


@dataclass(frozen=True, slots=True)
class _Turn:
    began_s: float
    ended_s: float
    mean_s: float  # of its runs


class _Step:
    """A step that is measured again and again."""

    def __init__(
        self,
        label: str,
        work: StepWork,
        run: Callable[[], Awaitable[float | None]],
        *,
        is_whole_request: bool = False,
    ) -> None:
        self._label = label
        self._work = work
        self._run = run
        self._is_whole_request = is_whole_request
        self._turns: list[_Turn] = []

    async def measure(self, seconds: float) -> None:
        """Take a turn: the mean of the runs of so many seconds, one at least."""
        runs_s = []
        began_s = time.perf_counter()
        while True:
            if (run_s := await self._run()) is not None:
                runs_s.append(run_s)
            if (ended_s := time.perf_counter()) >= began_s + seconds:
                break
        if runs_s:
            self._turns.append(_Turn(began_s, ended_s, statistics.mean(runs_s)))

    def point(self, report: Callable[[str], None], paces: Paces = STEADY) -> StepPoint | None:
        """Return the median of its turns at these paces; None where no run brought a time."""
        if not self._turns:
            report(f"{self._label}: every answer came at once")
            return None
        turns_s = [turn.mean_s / paces.mean(turn.began_s, turn.ended_s) for turn in self._turns]
        median = statistics.median(turns_s)
        spread = statistics.mean(abs(turn_s - median) for turn_s in turns_s) / median
        until = " to the first token" if self._is_whole_request else ""
        report(f"{self._label}: {1e3 * median:.2f} ms ±{spread:.0%}{until}")
        return StepPoint(self._work, median, self._is_whole_request, spread)


def _steps(callers: Callers, engine: Engine) -> list[_Step]:
    long = int(engine.max_model_len * _LONG_PROMPT_SHARE)
    steps = []
    for batches, num_prompt_tokens in ((_BATCHES, _DECODE_PROMPT), (_FEW_BATCHES, long)):
        for batch in batches:
            # While the prompts of all are computed, those that were first decode already.
            num_tokens = 2 * _STEPS + batch * num_prompt_tokens // engine.max_num_batched_tokens
            context = num_prompt_tokens + num_tokens
            has_blocks = batch * -(-context // BLOCK_SIZE) <= engine.num_blocks
            if batch <= engine.max_num_seqs and context <= engine.max_model_len and has_blocks:
                work = StepWork.decode(batch, num_prompt_tokens + num_tokens // 2)
                run = partial(_decode_s, callers, batch, num_prompt_tokens, num_tokens)
                steps.append(_Step(f"decode {batch} at {num_prompt_tokens} tokens", work, run))
    longest = min(engine.max_num_batched_tokens, engine.max_model_len - 1)
    return steps + [
        _Step(
            f"prefill {num_tokens}",
            StepWork.prefill(num_tokens),
            partial(_ttft_s, callers, num_tokens),
            is_whole_request=True,
        )
        for num_tokens in _PROMPTS
        if num_tokens <= longest
    ]


async def _in_turns(
    steps: Sequence[_Step],
    take_loop: Callable[[int, float], Awaitable[ClosedLoop]],
    numbers: Sequence[int],
    seconds: float,
) -> list[ClosedLoop]:
    """Measure each step and each closed loop once a turn, for so long; return the loops.

    A machine's speed changes with the seconds. What is measured in one piece is compared with
    what was measured at another speed, and step times fitted to both fit neither.
    """
    loops: list[ClosedLoop] = []
    least, most = _TURNS
    began_s = turn_began_s = time.perf_counter()
    for turn in range(1, most + 1):
        for step in steps:
            await step.measure(_LEAST_S * min(1.0, seconds / 30))
        # As long as the steps took, while as much of the time is left.
        steps_s = time.perf_counter() - turn_began_s
        loops_s = max(0.0, min(steps_s, seconds / 2 - sum(loop.seconds for loop in loops)))
        loops += [await take_loop(number, loops_s / len(numbers)) for number in numbers]
        ended_s = time.perf_counter()
        if turn >= least and ended_s + (ended_s - turn_began_s) > began_s + seconds:
            break
        turn_began_s = ended_s
    return loops


def _tell_loops(loops: Iterable[ClosedLoop], report: Callable[[str], None]) -> None:
    by_number: dict[int, list[ClosedLoop]] = {}
    for loop in loops:
        by_number.setdefault(loop.num_callers, []).append(loop)
    for number, of_number in by_number.items():
        requests = sum(len(loop.lengths) for loop in of_number)
        ttft_s = statistics.median(loop.ttft_p50_s for loop in of_number)
        report(
            f"{number} callers: {requests / sum(loop.seconds for loop in of_number):.3g} "
            f"requests/s, {1e3 * ttft_s:.1f} ms to the first token"
        )


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
