"""What mirrors cost callers on one machine: the originals' throughput with every request mirrored,
and with none, in alternating windows of one server.
"""

import asyncio
from collections import Counter
from dataclasses import asdict
from statistics import harmonic_mean
from typing import Any

from bitwatt_client.exposition import parse_samples

from bitwatt import builtin
from bitwatt.bench.measure import spread_of
from bitwatt.bench.serving import Server, request, serve, tokens_per_s

__all__ = ["bench_mirrors"]

_NUM_CLIENTS = 4
_MAX_TOKENS = 128
_NUM_BURSTS = 3  # of a window; each client asks once in each
_NUM_WINDOWS = 15
_GAPS_S = {"without_gaps": 0.0, "with_gaps": 1.0}
_OUTCOMES = ("compared", "preempted", "dropped", "failed", "abandoned")


async def _window(server: Server, gap_s: float, *, is_mirrored: bool) -> tuple[float, float]:
    """Return the originals' tokens/s and the server's processor seconds, gaps left out."""
    rates, cpu_s = [], 0.0
    for _ in range(_NUM_BURSTS):
        before_s = server.cpu_s()
        rates.append(
            await tokens_per_s(server.port, _NUM_CLIENTS, _MAX_TOKENS, is_mirrored=is_mirrored)
        )
        cpu_s += server.cpu_s() - before_s
        await asyncio.sleep(gap_s)
    return harmonic_mean(rates), cpu_s


async def _outcomes(port: int) -> Counter[str]:
    """Return how many mirrors came out how, since the start."""
    _, _, body = (await request(port, "GET", "/metrics")).partition(b"\r\n\r\n")
    samples = parse_samples(body.decode())
    totals = {
        outcome: samples.total("bitwatt_shadow_requests_total", outcome=outcome)
        for outcome in _OUTCOMES
    }
    return Counter({outcome: int(total or 0) for outcome, total in totals.items()})


async def _settled(port: int, num_mirrors: int) -> Counter[str]:
    """Wait until so many mirrors have come out, and return how."""
    while (outcomes := await _outcomes(port)).total() < num_mirrors:
        await asyncio.sleep(0.2)
    return outcomes


async def _alternate(server: Server, gap_s: float) -> dict[str, Any]:
    rates: dict[bool, list[float]] = {True: [], False: []}
    cpu_s = {True: 0.0, False: 0.0}
    before = await _outcomes(server.port)
    num_mirrors = before.total()
    for window in range(_NUM_WINDOWS + 1):
        for is_mirrored in (True, False):
            rate, used_s = await _window(server, gap_s, is_mirrored=is_mirrored)
            if window:  # the first is a warm-up
                rates[is_mirrored].append(rate)
                cpu_s[is_mirrored] += used_s
            num_mirrors += is_mirrored * _NUM_BURSTS * _NUM_CLIENTS
            outcomes = await _settled(server.port, num_mirrors)
    ratios = [on / off for on, off in zip(rates[True], rates[False], strict=True)]
    return {
        "gap_s": gap_s,
        "tokens_per_s_mirrored": asdict(spread_of(rates[True])),
        "tokens_per_s": asdict(spread_of(rates[False])),
        "ratio_mirrored_to_not": asdict(spread_of(ratios)),
        # Of all windows: unlike rates, it tells nothing of the machine's other work.
        "cpu_ratio_mirrored_to_not": cpu_s[True] / cpu_s[False],
        "mirrors": dict(outcomes - before),
    }


async def _run() -> dict[str, Any]:
    async with serve(builtin.TERNARY, "--compare", "--no-prefix-caching") as server:
        return {
            "num_clients": _NUM_CLIENTS,
            "max_tokens": _MAX_TOKENS,
            **{name: await _alternate(server, gap_s) for name, gap_s in _GAPS_S.items()},
        }


def bench_mirrors() -> dict[str, Any]:
    """Return both rates and their ratio, for callers that leave no gaps and for some that do.

    A machine that does other work shows more spread: run it when nothing else runs.
    """
    return asyncio.run(_run())
