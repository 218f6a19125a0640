"""Measure a served model's steps from outside, as its callers see them.

What server and callers cost besides the engine is then in the figures: on a machine where they
share its cores, a step takes longer than the engine alone would. Nothing else may ask the server.
"""

import asyncio
import statistics
from collections.abc import Callable

import httpx
from bitwatt_client.server import Server

from bitwatt.simulation.callers import Stream, engine_state, prompt_of, stream
from bitwatt.simulation.step_times import MeasuredModel, StepPoint, StepTimes, StepWork

__all__ = ["measure_server"]

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_PROMPTS = (16, 64, 128, 256, 512, 1024, 2048)
_DECODE_PROMPT = 32
_LONG_PROMPT_SHARE = 0.6  # of the context
_STEPS = 48  # of a measured decode
_REPEATS = 5


async def measure_server(
    http: httpx.AsyncClient,
    server: Server,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    repeats: int = _REPEATS,
    report: Callable[[str], None] = lambda _line: None,
) -> MeasuredModel:
    """Return the model's steps.

    max_num_seqs, max_num_batched_tokens  as the server was started with
    repeats  of each measurement, of which the median counts
    report   takes a line as each figure is known
    Raises   ClientError, httpx.HTTPError
    """
    before = await engine_state(http, server)
    context = before["engine"]["max_model_len"]
    num_blocks, block_size = before["engine"]["num_blocks"], before["engine"]["block_size"]
    await _together(http, server, min(8, max_num_seqs), _DECODE_PROMPT, _STEPS)  # warm-up
    points = []
    for num_prompt_tokens in (_DECODE_PROMPT, int(context * _LONG_PROMPT_SHARE)):
        for batch in _BATCHES:
            num_tokens = num_prompt_tokens + 2 * _STEPS
            fits = batch * -(-num_tokens // block_size) <= num_blocks and num_tokens <= context
            if batch > max_num_seqs or not fits:
                continue
            found = [
                await _decode_s(http, server, batch, num_prompt_tokens) for _ in range(repeats)
            ]
            known = [seconds for seconds in found if seconds is not None]
            if not known:
                report(f"decode {batch} at {num_prompt_tokens} tokens: every answer came at once")
                continue
            seconds = statistics.median(known)
            work = StepWork(batch, batch, batch * (num_prompt_tokens + _STEPS))
            points.append(StepPoint(work, seconds))
            report(f"decode {batch} at {num_prompt_tokens} tokens: {1e3 * seconds:.2f} ms")
    for num_tokens in _PROMPTS:
        if num_tokens > min(max_num_batched_tokens, context - 1):
            break
        [*streams] = [
            (await _together(http, server, 1, num_tokens, 1))[0] for _ in range(2 * repeats)
        ]
        seconds = statistics.median([one.ttft_s for one in streams])
        work = StepWork(num_tokens, 1, num_tokens * ((num_tokens + 1) // 2))
        points.append(StepPoint(work, seconds, is_whole_request=True))
        report(f"prefill {num_tokens}: {1e3 * seconds:.2f} ms to the first token")
    after = await engine_state(http, server)
    watts, reason = _watts(before, after)
    return MeasuredModel(
        name=server.model,
        step_times=StepTimes.fit(points),
        max_model_len=context,
        num_blocks=num_blocks,
        watts_busy=watts,
        watts_reason=reason,
    )


_numbers = iter(range(1 << 62))


async def _together(
    http: httpx.AsyncClient, server: Server, batch: int, num_prompt_tokens: int, max_tokens: int
) -> list[Stream]:
    """Return the streams of so many requests sent at once, of prompts nobody sent before."""
    numbers = [next(_numbers) for _ in range(batch)]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                stream(http, server, prompt_of(num_prompt_tokens, n), max_tokens, f"plan {n}")
            )
            for n in numbers
        ]
    return [task.result() for task in tasks]


async def _decode_s(
    http: httpx.AsyncClient, server: Server, batch: int, num_prompt_tokens: int
) -> float | None:
    """Return the seconds of a step while all of the batch decode, its prompts computed.

    None where every answer came in one piece, as from a server or to a caller that was held up.
    """
    streams = await _together(http, server, batch, num_prompt_tokens, 2 * _STEPS)
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
