"""How far a simulation is from the server it simulates: the same requests, replayed to it."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from bitwatt_client.server import Server

from bitwatt.simulation.callers import Callers, Stream, prompt_of
from bitwatt.simulation.capacity import percentile
from bitwatt.simulation.replica import Engine, Replica
from bitwatt.simulation.step_times import StepTimes
from bitwatt.simulation.traffic import Arrival, Traffic

__all__ = ["Comparison", "Figures", "compare_with_server", "comparisons_as_markdown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What callers saw: times in seconds, tokens from the first request to the last token."""

    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p95_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One replayed load.

    utilization  share of the time in which the simulated machine stepped
    """

    requests_per_s: float
    utilization: float
    num_requests: int
    predicted: Figures
    measured: Figures

    @property
    def errors(self) -> dict[str, float]:
        """What was predicted over what was measured, minus one, by figure."""
        measured = asdict(self.measured)
        return {name: p / measured[name] - 1 for name, p in asdict(self.predicted).items()}

    def as_json(self) -> dict[str, Any]:
        """Return everything."""
        return asdict(self) | {"errors": self.errors}


async def compare_with_server(
    http: httpx.AsyncClient,
    server: Server,
    engine: Engine,
    step_times: StepTimes,
    traffic: Traffic,
    rates: Sequence[float],
    *,
    seconds: float,
    seed: int = 0,
    report: Callable[[str], None] = lambda _line: None,
) -> list[Comparison]:
    """Return what was predicted and what the server did at each rate, in requests a second.

    seconds  that requests arrive, at each
    Raises   ClientError, httpx.HTTPError
    """
    comparisons = []
    for rate in rates:
        arrivals = traffic.arrivals(rate, max(20, round(rate * seconds)), seed)
        predicted, utilization = _predict(engine, step_times, arrivals)
        async with Callers(server, authorization=http.headers.get("Authorization")) as callers:
            measured = await _replay(callers, arrivals, seed)
        one = Comparison(
            requests_per_s=rate,
            utilization=utilization,
            num_requests=len(arrivals),
            predicted=predicted,
            measured=measured,
        )
        comparisons.append(one)
        told = ", ".join(f"{name} {100 * error:+.0f}%" for name, error in one.errors.items())
        report(f"{rate:.3g} requests/s, utilization {utilization:.0%}: {told}")
    return comparisons


def comparisons_as_markdown(by_model: Mapping[str, Sequence[Comparison]]) -> str:
    """Return what was predicted and measured, and how far apart, a rate a row."""
    figures = [
        ("TTFT p50, ms", "ttft_p50_s", 1e3, ".1f"),
        ("TTFT p95, ms", "ttft_p95_s", 1e3, ".1f"),
        ("time per output token p95, ms", "tpot_p95_s", 1e3, ".2f"),
        ("tokens/s", "tokens_per_s", 1.0, ",.0f"),
    ]
    names = ["model", "requests/s", "utilization", *(label for label, *_ in figures)]
    lines = [f"| {' | '.join(names)} |", "|---" + "|--:" * (len(names) - 1) + "|"]
    for model, comparisons in by_model.items():
        for one in comparisons:
            predicted, measured = asdict(one.predicted), asdict(one.measured)
            cells = [model, f"{one.requests_per_s:.4g}", f"{one.utilization:.0%}"] + [
                f"{factor * predicted[name]:{form}} / {factor * measured[name]:{form}} "
                f"({one.errors[name]:+.0%})"
                for _, name, factor, form in figures
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(["Predicted / measured:", "", *lines, ""])


def _predict(
    engine: Engine, step_times: StepTimes, arrivals: Sequence[Arrival]
) -> tuple[Figures, float]:
    replica = Replica(engine, step_times)
    served = []
    for arrival in arrivals:
        replica.run_until(arrival.time_s)
        served.append(replica.submit(arrival))
    share = min(1.0, replica.busy_s / arrivals[-1].time_s)
    replica.run_to_end()
    whole = [one for one in served if one.error is None]
    span = max(one.ended_s or 0.0 for one in whole) - arrivals[0].time_s
    return (
        _figures(
            [one.ttft_s for one in whole],
            [t for one in whole if (t := one.tpot_s) is not None],
            sum(one.num_tokens for one in whole) / span,
        ),
        share,
    )


async def _replay(callers: Callers, arrivals: Sequence[Arrival], seed: int) -> Figures:
    started = time.perf_counter()

    async def call(number: int, arrival: Arrival) -> Stream:
        await asyncio.sleep(max(0.0, started + arrival.time_s - time.perf_counter()))
        prompt = prompt_of(arrival.num_prompt_tokens, number)
        salt = f"replay {seed} {started} {number}"
        return await callers.stream(prompt, arrival.num_tokens, salt)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call(i, arrival)) for i, arrival in enumerate(arrivals)]
    streams = [task.result() for task in tasks]
    span = max(s.times_s[-1] for s in streams) - min(s.started_s for s in streams)
    return _figures(
        [s.ttft_s for s in streams],
        [t for s in streams if (t := s.tpot_s) is not None],
        sum(s.num_tokens for s in streams) / span,
    )


def _figures(ttft_s: Sequence[float], tpot_s: Sequence[float], tokens_per_s: float) -> Figures:
    return Figures(
        ttft_p50_s=percentile(ttft_s, 50) or 0.0,
        ttft_p95_s=percentile(ttft_s, 95) or 0.0,
        tpot_p95_s=percentile(tpot_s, 95) or 0.0,
        tokens_per_s=tokens_per_s,
    )
