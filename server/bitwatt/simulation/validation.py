"""How far a simulation is from the server it simulates: the same requests, replayed to it."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import httpx
from bitwatt_client.server import Server

from bitwatt.simulation.callers import Callers, Stream, prompt_of
from bitwatt.simulation.capacity import percentile
from bitwatt.simulation.closed_loop import ClosedLoop, fitting_lengths, measure_loop, pace_of
from bitwatt.simulation.other_programs import undisturbed
from bitwatt.simulation.pace import STEADY, Pace, PaceMeter, Paces, steady
from bitwatt.simulation.replica import Engine, Replica
from bitwatt.simulation.step_times import StepTimes
from bitwatt.simulation.traffic import Arrival, Traffic

__all__ = ["Comparison", "Figures", "Replay", "compare_with_server", "comparisons_as_markdown"]

_T = TypeVar("_T")
_TURNS = 6
_LEAST_REQUESTS = 20  # of a replay
_PACE_SHARE = 0.25  # of a replay's time
_PACE_CALLERS = 8
_PACE_LENGTHS = 1000
_RATE_LOOPS = 4  # a turn's, of three rates
_TRIES = 3
_MOST_OFF = 0.05  # of the pace that a replay's rate was made for


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What callers saw: times in seconds, tokens from the first request to the last token."""

    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p95_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One replay.

    requests_per_s  at which they came
    planned         by the step times that were measured before
    predicted       by these at the pace of the machine
    pace            the mean of that: how many times as long as planned everything took
    others          share of the processors that other programs took meanwhile; None if unknown
    """

    requests_per_s: float
    planned: Figures
    predicted: Figures
    measured: Figures
    pace: float
    others: float | None

    @property
    def errors(self) -> dict[str, float]:
        """What was predicted over what was measured, minus one, by figure."""
        return _errors(self.predicted, self.measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The replays of one rate; figures are of all their requests together.

    requests_per_s  as planned: at the pace of the step times that were measured
    utilization     share of the time in which the simulated machine stepped
    planned         by the step times that were measured
    predicted       by these at the pace of each replay
    """

    requests_per_s: float
    utilization: float
    num_requests: int
    planned: Figures
    predicted: Figures
    measured: Figures
    replays: tuple[Replay, ...]

    @property
    def errors(self) -> dict[str, float]:
        """What was predicted over what was measured, minus one, by figure."""
        return _errors(self.predicted, self.measured)

    @property
    def median_errors(self) -> dict[str, float]:
        """The median of the replays' errors, by figure: a hiccup of one of them is not in it."""
        of_replays = [one.errors for one in self.replays]
        return {name: statistics.median(one[name] for one in of_replays) for name in self.errors}

    def as_json(self) -> dict[str, Any]:
        """Return everything."""
        replays = [asdict(one) | {"errors": one.errors} for one in self.replays]
        errors = {
            "errors": self.errors,
            "median_errors": self.median_errors,
            "planned_errors": _errors(self.planned, self.measured),
        }
        return asdict(self) | errors | {"replays": replays}


@dataclass(slots=True, kw_only=True)
class _Seen:
    """What the callers of one replay, or of several, saw; and how long it took them.

    started_s  of one that was measured, by time.perf_counter
    """

    started_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    span_s: float = 0.0
    busy_s: float = 0.0

    def add(self, other: "_Seen") -> None:
        self.ttft_s += other.ttft_s
        self.tpot_s += other.tpot_s
        self.num_tokens += other.num_tokens
        self.span_s += other.span_s
        self.busy_s += other.busy_s

    @property
    def figures(self) -> Figures:
        return Figures(
            ttft_p50_s=percentile(self.ttft_s, 50) or 0.0,
            ttft_p95_s=percentile(self.ttft_s, 95) or 0.0,
            tpot_p95_s=percentile(self.tpot_s, 95) or 0.0,
            tokens_per_s=self.num_tokens / self.span_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replayed:
    """One replay as its callers saw it, and should have.

    rate_pace  that its rate was made for
    """

    requests_per_s: float
    planned: _Seen
    predicted: _Seen
    measured: _Seen
    pace: float
    rate_pace: float
    others: float | None

    @property
    def pace_off(self) -> float:
        """How many times as slow the machine was as its rate was made for, minus one."""
        return self.pace / self.rate_pace - 1

    @property
    def replay(self) -> Replay:
        return Replay(
            requests_per_s=self.requests_per_s,
            planned=self.planned.figures,
            predicted=self.predicted.figures,
            measured=self.measured.figures,
            pace=self.pace,
            others=self.others,
        )


class _OfRate:
    """The replays of one rate as they come."""

    def __init__(self, requests_per_s: float) -> None:
        self.requests_per_s = requests_per_s
        self._planned, self._predicted, self._measured = _Seen(), _Seen(), _Seen()
        self._replays: list[Replay] = []

    def add(self, one: _Replayed) -> None:
        self._planned.add(one.planned)
        self._predicted.add(one.predicted)
        self._measured.add(one.measured)
        self._replays.append(one.replay)

    def comparison(self) -> Comparison:
        return Comparison(
            requests_per_s=self.requests_per_s,
            utilization=min(1.0, self._predicted.busy_s / self._predicted.span_s),
            num_requests=len(self._predicted.ttft_s),
            planned=self._planned.figures,
            predicted=self._predicted.figures,
            measured=self._measured.figures,
            replays=tuple(self._replays),
        )


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
    meter: PaceMeter | None = None,
    probe_s: float | None = None,
    report: Callable[[str], None] = lambda _line: None,
) -> list[Comparison]:
    """Return what was predicted and what the server did at each rate, in requests a second.

    The rates take turns, six replays of each: a machine's speed changes with the minutes. So a
    closed loop runs after each replay, and four before the first. A machine that took twice as long
    for the last four as was simulated gets half as many requests a second: one alone is of a
    moment. And a replay is predicted with step times that are as many times as long as the loops
    beside it took of what was simulated.

    rates    of a machine at the pace of the step times
    seconds  that requests arrive at each rate, in all
    meter    of the machine that this process and the server share, if it is one of ours. Then loops
             and replays are simulated at the paces of their time, and what these leave over is the
             loops'. And it is known what other programs took of the processors: a replay that they
             slowed down is made again, twice at most. So is one in which the machine's pace was
             more than a twentieth off what its rate was made for: it was fuller, or emptier, than
             its rate says. The one that was least off counts
    probe_s  the meter's arithmetic while the step times were measured
    Raises   ClientError, httpx.HTTPError
    """
    of_rates = [_OfRate(rate) for rate in rates]
    lengths = fitting_lengths(engine, traffic.arrivals(1.0, _PACE_LENGTHS, seed + _TURNS))

    async def timed(run: Callable[[], Awaitable[_T]]) -> tuple[_T, float | None]:
        return await undisturbed(run, report) if meter else (await run(), None)

    async def measured_loop() -> ClosedLoop | None:
        if not lengths:
            return None
        loop, _ = await timed(
            partial(
                measure_loop,
                callers,
                min(_PACE_CALLERS, engine.max_num_seqs),
                lengths,
                seconds=_PACE_SHARE * seconds / _TURNS,
            )
        )
        return loop

    def slowness(loops: Iterable[ClosedLoop | None], paces: Paces) -> float:
        """Return how many times as long the loops took as those that are simulated, the mean."""
        of_loops = [pace_of(engine, step_times, loop, paces) for loop in loops if loop is not None]
        return statistics.mean(of_loops) if of_loops else 1.0

    async def replay(requests_per_s: float, turn: int) -> _Replayed:
        rate_pace = statistics.mean(slow[-_RATE_LOOPS:])
        rate, before = requests_per_s / rate_pace, loops[-1]
        number = max(_LEAST_REQUESTS, round(rate * seconds / _TURNS))
        arrivals = traffic.arrivals(rate, number, seed + turn)
        seen, others = await timed(partial(_replay, callers, arrivals))
        loops.append(await measured_loop())
        slow.append(slowness(loops[-1:], STEADY))
        paces = meter.paces().over(probe_s) if meter and probe_s else STEADY
        paces = paces.over(1 / slowness([before, loops[-1]], paces))
        one = _Replayed(
            requests_per_s=rate,
            planned=_predict(engine, step_times, arrivals),
            predicted=_predict(engine, step_times, arrivals, paces.since(seen.started_s)),
            measured=seen,
            pace=paces.mean(seen.started_s, seen.started_s + seen.span_s),
            rate_pace=rate_pace,
            others=others,
        )
        told = ", ".join(f"{name} {100 * error:+.0f}%" for name, error in one.replay.errors.items())
        report(f"{rate:.3g} requests/s, {number} requests, pace {one.pace:.2f}: {told}")
        return one

    async with Callers(server, authorization=http.headers.get("Authorization")) as callers:
        loops = [await measured_loop() for _ in range(_RATE_LOOPS)]
        slow = [slowness([loop], STEADY) for loop in loops]
        for turn in range(_TURNS):
            for of_rate in of_rates:
                tries = [await replay(of_rate.requests_per_s, turn)]
                while meter and abs(tries[-1].pace_off) > _MOST_OFF and len(tries) < _TRIES:
                    report(f"its rate was made for a pace of {tries[-1].rate_pace:.2f}: once more")
                    tries.append(await replay(of_rate.requests_per_s, turn))
                of_rate.add(min(tries, key=lambda one: abs(one.pace_off)))
    return [of_rate.comparison() for of_rate in of_rates]


def comparisons_as_markdown(by_model: Mapping[str, Sequence[Comparison]]) -> str:
    """Return what was predicted and measured, and how far apart, a rate a row."""
    figures = [
        ("TTFT p50, ms", "ttft_p50_s", 1e3, ".1f"),
        ("TTFT p95, ms", "ttft_p95_s", 1e3, ".1f"),
        ("time per output token p95, ms", "tpot_p95_s", 1e3, ".2f"),
        ("tokens/s", "tokens_per_s", 1.0, ",.0f"),
    ]
    names = [
        "model",
        "requests/s",
        "requests",
        "utilization",
        "pace",
        *(label for label, *_ in figures),
    ]
    lines = [f"| {' | '.join(names)} |", "|---" + "|--:" * (len(names) - 1) + "|"]
    for model, comparisons in by_model.items():
        for one in comparisons:
            planned, predicted, measured = map(asdict, (one.planned, one.predicted, one.measured))
            rates = [replay.requests_per_s for replay in one.replays]
            paces = [replay.pace for replay in one.replays]
            cells = [
                model,
                f"{min(rates):.3g} to {max(rates):.3g}",
                f"{one.num_requests}",
                f"{one.utilization:.0%}",
                f"{min(paces):.2f} to {max(paces):.2f}",
            ]
            for _, name, factor, form in figures:
                errors = [replay.errors[name] for replay in one.replays]
                cells.append(
                    f"{factor * planned[name]:{form}}, {factor * predicted[name]:{form}} / "
                    f"{factor * measured[name]:{form}} "
                    f"({one.errors[name]:+.0%}; {one.median_errors[name]:+.0%}, "
                    f"{min(errors):+.0%} to {max(errors):+.0%})"
                )
            lines.append(f"| {' | '.join(cells)} |")
    told = (
        "Planned, predicted at the machine's pace / measured: all replays together (error of the "
        "predicted; median error of the replays, range)"
    )
    return "\n".join([told, "", *lines, ""])


def _errors(predicted: Figures, measured: Figures) -> dict[str, float]:
    of = asdict(measured)
    return {name: value / of[name] - 1 for name, value in asdict(predicted).items()}


def _predict(
    engine: Engine, step_times: StepTimes, arrivals: Sequence[Arrival], pace: Pace = steady
) -> _Seen:
    replica = Replica(engine, step_times, pace)
    served = []
    for arrival in arrivals:
        replica.run_until(arrival.time_s)
        served.append(replica.submit(arrival))
    replica.run_to_end()
    whole = [one for one in served if one.error is None]
    return _Seen(
        ttft_s=[one.ttft_s for one in whole],
        tpot_s=[t for one in whole if (t := one.tpot_s) is not None],
        num_tokens=sum(one.num_tokens for one in whole),
        span_s=max(one.ended_s or 0.0 for one in whole) - arrivals[0].time_s,
        busy_s=replica.busy_s,
    )


async def _replay(callers: Callers, arrivals: Sequence[Arrival]) -> _Seen:
    async def call(number: int, arrival: Arrival) -> Stream:
        await asyncio.sleep(max(0.0, started + arrival.time_s - time.perf_counter()))
        prompt = prompt_of(arrival.num_prompt_tokens, number)
        return await callers.stream(prompt, arrival.num_tokens, f"replay {started} {number}")

    async with asyncio.TaskGroup() as group:
        started = time.perf_counter()
        tasks = [group.create_task(call(i, arrival)) for i, arrival in enumerate(arrivals)]
    streams = [task.result() for task in tasks]
    return _Seen(
        started_s=started,
        ttft_s=[s.ttft_s for s in streams],
        tpot_s=[t for s in streams if (t := s.tpot_s) is not None],
        num_tokens=sum(s.num_tokens for s in streams),
        span_s=max(s.times_s[-1] for s in streams) - min(s.started_s for s in streams),
    )
