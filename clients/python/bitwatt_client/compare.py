"""Two models under equal work, in alternating windows: A B A B."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import httpx

from bitwatt_client.errors import ClientError, ComparisonError
from bitwatt_client.exposition import Samples
from bitwatt_client.load import Window, Work, run_window
from bitwatt_client.server import Server
from bitwatt_client.statistics import Interval, Spread, bootstrap_ratio, spread

__all__ = ["Comparison", "Figure", "Measured", "Plan", "compare", "summarize"]

WEIGHT_KINDS = ("packed_weights", "embedding", "other_weights")
HELD_KINDS = (*WEIGHT_KINDS, "kv_cache", "workspace")
MIN_WINDOW_S = 2.0
MIN_WINDOWS = 5

Side = Literal["a", "b"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How two models are compared.

    work          of one window
    num_windows   of each model that count
    num_warmups   of each model before them, dropped
    dollars_per_hour  what a and b cost to rent; None where it isn't known
    """

    work: Work
    num_windows: int = 6
    num_warmups: int = 1
    dollars_per_hour: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A window with the server's /metrics around it; None where it serves none."""

    window: Window
    before: Samples | None = None
    after: Samples | None = None

    @property
    def joules(self) -> float | None:
        """Energy of the devices that the model ran on, idle share included; None if unmeasured."""
        if self.before is None or self.after is None:
            return None
        before = self.before.total("bitwatt_energy_joules_total")
        after = self.after.total("bitwatt_energy_joules_total")
        if before is None or after is None or after <= before:
            return None
        return after - before


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One thing measured of both models.

    gain         how many times better a is than b; below 1 it is worse
    unavailable  why there is no value
    """

    key: str
    label: str
    unit: str
    better: Better
    a: Spread | None = None
    b: Spread | None = None
    gain: Interval | None = None
    unavailable: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came out; names are those of the models."""

    name_a: str
    name_b: str
    plan: Plan
    figures: tuple[Figure, ...]
    notices: tuple[str, ...]


async def compare(
    a: Server,
    b: Server,
    plan: Plan,
    *,
    on_window: Callable[[str, int, Window], None] | None = None,
) -> Comparison:
    """Return how the two models do with equal work.

    on_window  told the model's name, the window's number from -num_warmups, and the window

    Raises  ComparisonError if no pair of windows completed
    """
    measured: dict[Side, list[Measured]] = {"a": [], "b": []}
    servers: tuple[tuple[Side, Server], ...] = (("a", a), ("b", b))
    for number in range(-plan.num_warmups, plan.num_windows):
        for side, server in servers:
            before = await _scrape(server)
            window = await run_window(server, plan.work, salt=f"window-{number}")
            after = await _scrape(server)
            if on_window is not None:
                on_window(server.model, number, window)
            if number >= 0:
                measured[side].append(Measured(window=window, before=before, after=after))
    return summarize(measured["a"], measured["b"], plan, names=(a.model, b.model))


async def _scrape(server: Server) -> Samples | None:
    try:
        return await server.scrape()
    except (ClientError, httpx.HTTPError):
        return None


def summarize(
    a: Sequence[Measured], b: Sequence[Measured], plan: Plan, *, names: tuple[str, str]
) -> Comparison:
    """Return the figures of pairs of windows.

    A pair counts where every request of both was answered. Raises ComparisonError if none does.
    """
    pairs = list(zip(a, b, strict=True))
    whole = [pair for pair in pairs if all(_is_whole(m.window) for m in pair)]
    if not whole:
        raise ComparisonError(f"no pair of windows completed: {_why_not(pairs)}")
    of_a, of_b = [pair[0] for pair in whole], [pair[1] for pair in whole]

    def figure(
        key: str, label: str, unit: str, better: Better, value: Callable[[Measured], float | None]
    ) -> Figure:
        given = [(value(m_a), value(m_b)) for m_a, m_b in whole]
        both = [(x, y) for x, y in given if x is not None and y is not None and x > 0 and y > 0]
        empty = Figure(key=key, label=label, unit=unit, better=better)
        if not both:
            return empty
        values_a, values_b = [x for x, _ in both], [y for _, y in both]
        above, below = (values_a, values_b) if better == "higher" else (values_b, values_a)
        return replace(
            empty,
            a=spread(values_a),
            b=spread(values_b),
            gain=bootstrap_ratio(above, below),
        )

    figures = [
        figure("tokens_per_s", "output tokens/s, all requests", "tok/s", "higher", _tokens_per_s),
        figure("decode_tokens_per_s", "decode tokens/s a request", "tok/s", "higher", _decode),
        figure("ttft_s", "time to first token", "s", "lower", _ttft),
        figure("e2e_s", "request latency", "s", "lower", _e2e),
        _joules(figure("joules_per_token", "energy a token", "J", "lower", _joules_per_token), a),
        _dollars(of_a, of_b, plan),
        _memory("weights_bytes", "weights", WEIGHT_KINDS, of_a[-1], of_b[-1], names),
        _memory("memory_bytes", "weights, KV cache, workspace", HELD_KINDS, of_a[-1], of_b[-1],
                names),
    ]  # fmt: skip
    return Comparison(
        name_a=names[0],
        name_b=names[1],
        plan=plan,
        figures=tuple(figures),
        notices=tuple(_notices(pairs, whole, plan, names)),
    )


def _is_whole(window: Window) -> bool:
    return bool(window.answers) and not window.failures and not window.num_cut


def _tokens_per_s(measured: Measured) -> float:
    return measured.window.tokens_per_s


def _decode(measured: Measured) -> float | None:
    times = [answer.tpot_s for answer in measured.window.answers if answer.tpot_s]
    return 1 / statistics.median(times) if times else None


def _ttft(measured: Measured) -> float:
    return statistics.median(answer.ttft_s for answer in measured.window.answers)


def _e2e(measured: Measured) -> float:
    return statistics.median(answer.e2e_s for answer in measured.window.answers)


def _joules_per_token(measured: Measured) -> float | None:
    joules = measured.joules
    return None if joules is None else joules / measured.window.num_tokens


def _joules(figure: Figure, measured: Sequence[Measured]) -> Figure:
    if figure.gain is not None:
        return figure
    last = measured[-1].after
    reasons = [] if last is None else last.find("bitwatt_energy_available")
    told = ", ".join(dict.fromkeys(s.labels.get("reason", "") for s in reasons if not s.value))
    return replace(figure, unavailable=told or "the server reports no energy")  # fmt: skip


def _dollars(a: Sequence[Measured], b: Sequence[Measured], plan: Plan) -> Figure:
    """Rent divided by tokens, over the windows' wall-clock time: at this load, not at full load."""
    figure = Figure(
        key="dollars_per_million_tokens",
        label="rent a million output tokens",
        unit="$",
        better="lower",
    )
    rent_a, rent_b = plan.dollars_per_hour
    if not rent_a or not rent_b:
        return replace(figure, unavailable="no rent was given (--dollars-per-hour)")
    costs_a = [rent_a / (m.window.tokens_per_s * 3600) * 1e6 for m in a]
    costs_b = [rent_b / (m.window.tokens_per_s * 3600) * 1e6 for m in b]
    return replace(
        figure, a=spread(costs_a), b=spread(costs_b), gain=bootstrap_ratio(costs_b, costs_a)
    )


def _memory(
    key: str,
    label: str,
    kinds: Sequence[str],
    a: Measured,
    b: Measured,
    names: tuple[str, str],
) -> Figure:
    figure = Figure(key=key, label=label, unit="B", better="lower")
    held = [
        _held_bytes(measured.after, name, kinds)
        for measured, name in zip((a, b), names, strict=True)
    ]
    if held[0] is None or held[1] is None:
        return replace(figure, unavailable="the server reports no memory by kind")
    ratio = held[1] / held[0]
    return replace(
        figure,
        a=spread([held[0]]),
        b=spread([held[1]]),
        gain=Interval(ratio, ratio, ratio),
    )


def _held_bytes(samples: Samples | None, name: str, kinds: Sequence[str]) -> float | None:
    if samples is None:
        return None
    found = [samples.total("bitwatt_memory_bytes", model_name=name, kind=kind) for kind in kinds]
    return sum(value or 0.0 for value in found) or None


def _notices(
    pairs: Sequence[tuple[Measured, Measured]],
    whole: Sequence[tuple[Measured, Measured]],
    plan: Plan,
    names: tuple[str, str],
) -> list[str]:
    """Return what a reader of the figures should know."""
    notices = []
    if len(whole) < len(pairs):
        notices.append(
            f"{len(pairs) - len(whole)} of {len(pairs)} pairs of windows are left out: "
            f"{_why_not(pairs)}"
        )
    if len(whole) < MIN_WINDOWS:
        notices.append(f"{len(whole)} pairs of windows make rough intervals; {MIN_WINDOWS} or more")
    walls = [m.window.wall_s for pair in whole for m in pair]
    if min(walls) < MIN_WINDOW_S:
        notices.append(f"the shortest window took {min(walls):.2f} s; longer ones scatter less")
    for side, name in enumerate(names):
        tokens = {answer.num_tokens for pair in whole for answer in pair[side].window.answers}
        if tokens != {plan.work.max_tokens}:
            notices.append(
                f"{name} gave {min(tokens)} to {max(tokens)} tokens an answer in place of "
                f"{plan.work.max_tokens}: the work is not equal"
            )
    return notices


def _why_not(pairs: Sequence[tuple[Measured, Measured]]) -> str:
    windows = [measured.window for pair in pairs for measured in pair]
    reasons = list(dict.fromkeys(reason for window in windows for reason in window.failures))
    num_cut = sum(window.num_cut for window in windows)
    if num_cut:
        reasons.append(f"{num_cut} requests were unfinished when a window's time was up")
    return "; ".join(reasons[:3]) or "nothing was answered"
