"""Two models under equal work, in alternating windows: A B A B."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import httpx

from bitwatt_client.errors import ClientError, ComparisonError
from bitwatt_client.exposition import Samples
from bitwatt_client.figures import Figure, Measured, make_figures, roofline_figure
from bitwatt_client.load import Window, Work, run_window
from bitwatt_client.server import Roofline, Server
from bitwatt_client.terminal import plural

__all__ = ["Comparison", "LoadPlan", "compare", "summarize"]

MIN_WINDOW_S = 2.0
MIN_WINDOWS = 5

Side = Literal["a", "b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """How two models are compared.

    work          of one window
    num_windows   of each model that count
    num_warmups   of each model before them, dropped
    usd_per_hour  what a and b cost to rent; None where it isn't known
    """

    work: Work
    num_windows: int = 6
    num_warmups: int = 1
    usd_per_hour: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came out; names are those of the models."""

    name_a: str
    name_b: str
    plan: LoadPlan
    figures: tuple[Figure, ...]
    notices: tuple[str, ...]


async def compare(
    a: Server,
    b: Server,
    plan: LoadPlan,
    *,
    on_window: Callable[[str, int, Window], None] | None = None,
    on_request: Callable[[], None] | None = None,
) -> Comparison:
    """Return how the two models do with equal work.

    on_window   told the model's name, the window's number from -num_warmups, and the window
    on_request  called when a request has ended

    Raises  ComparisonError if no pair of windows completed
    """
    run = secrets.token_hex(8)  # no run finds another's prefix cache
    measured: dict[Side, list[Measured]] = {"a": [], "b": []}
    servers: tuple[tuple[Side, Server], ...] = (("a", a), ("b", b))
    for number in range(-plan.num_warmups, plan.num_windows):
        for side, server in servers:
            before = await _scrape(server)
            salt = f"{run}-{number}"
            window = await run_window(server, plan.work, salt=salt, on_end=on_request)
            after = await _scrape(server)
            if on_window is not None:
                on_window(server.model, number, window)
            if number >= 0:
                measured[side].append(
                    Measured(name=server.model, window=window, before=before, after=after)
                )
    comparison = summarize(measured["a"], measured["b"], plan)
    notices = [f"{s.model}: {told}" for s in (a, b) if (told := await s.fallback()) is not None]
    figures = list(comparison.figures)
    [decode] = [i for i, figure in enumerate(figures) if figure.key == "decode_tokens_per_s"]
    rooflines = (await a.roofline(), await b.roofline())
    figures.insert(decode + 1, roofline_figure(figures[decode], rooflines))
    notices += _roofline_notices((a, b), rooflines)
    return replace(comparison, figures=tuple(figures), notices=(*notices, *comparison.notices))


def _roofline_notices(
    servers: tuple[Server, Server], rooflines: tuple[Roofline, Roofline]
) -> list[str]:
    """Return what the rooflines are, and what a share of them tells."""
    if any(roofline.unavailable is not None for roofline in rooflines):
        return []
    notices = [
        f"{server.model}'s roofline is {1e3 * r.step_bytes / r.read_bytes_per_s:.3g} ms a step: "
        f"{r.step_bytes / 1e6:.3g} MB of weights at {r.read_bytes_per_s / 1e9:.3g} GB/s, as its "
        "engine measured"
        for server, r in zip(servers, rooflines, strict=True)
    ]
    told = (
        "the rest of a step is attention, sampling and the server, most of a small model's step: "
        "a low share tells of slow kernels only where the reading takes milliseconds"
    )
    return [*notices, told]


async def _scrape(server: Server) -> Samples | None:
    try:
        return await server.scrape()
    except (ClientError, httpx.HTTPError):
        return None


def summarize(a: Sequence[Measured], b: Sequence[Measured], plan: LoadPlan) -> Comparison:
    """Return the figures of pairs of windows, of which there is at least one.

    A pair counts where every request of both was answered. Raises ComparisonError if none does.
    """
    pairs = list(zip(a, b, strict=True))
    whole = [pair for pair in pairs if all(_is_whole(m.window) for m in pair)]
    if not whole:
        raise ComparisonError(f"no pair of windows completed: {_why_not(pairs)}")
    return Comparison(
        name_a=a[0].name,
        name_b=b[0].name,
        plan=plan,
        figures=tuple(
            make_figures([m for m, _ in whole], [m for _, m in whole], plan.usd_per_hour)
        ),
        notices=tuple(_notices(pairs, whole, plan)),
    )


def _is_whole(window: Window) -> bool:
    return bool(window.answers) and not window.failures and not window.num_cut


def _notices(
    pairs: Sequence[tuple[Measured, Measured]],
    whole: Sequence[tuple[Measured, Measured]],
    plan: LoadPlan,
) -> list[str]:
    """Return what a reader of the figures should know."""
    notices = []
    if len(whole) < len(pairs):
        notices.append(
            f"{len(pairs) - len(whole)} of {plural(len(pairs), 'pair')} of windows left out: "
            f"{_why_not(pairs)}"
        )
    if len(whole) < MIN_WINDOWS:
        pairs_of = "1 pair of windows makes" if len(whole) == 1 else f"{len(whole)} pairs make"
        notices.append(f"{pairs_of} rough intervals; {MIN_WINDOWS} or more are better")
    walls = [m.window.wall_s for pair in whole for m in pair]
    if min(walls) < MIN_WINDOW_S:
        notices.append(f"the shortest window took {min(walls):.2f} s; longer ones scatter less")
    for side, name in enumerate(measured.name for measured in whole[0]):
        tokens = {answer.num_tokens for pair in whole for answer in pair[side].window.answers}
        if tokens != {plan.work.max_tokens}:
            given = f"{min(tokens)} to {max(tokens)}" if len(tokens) > 1 else f"{min(tokens)}"
            notices.append(
                f"{name} gave {given} tokens an answer in place of "
                f"{plan.work.max_tokens}: the work is not equal"
            )
    return notices


def _why_not(pairs: Sequence[tuple[Measured, Measured]]) -> str:
    windows = [measured.window for pair in pairs for measured in pair]
    reasons = list(dict.fromkeys(reason for window in windows for reason in window.failures))
    num_cut = sum(window.num_cut for window in windows)
    if num_cut:
        verb = "was" if num_cut == 1 else "were"
        reasons.append(
            f"{plural(num_cut, 'request')} {verb} unfinished when a window's time was up "
            "(--max-window-seconds)"
        )
    return "; ".join(reasons[:3]) or "nothing was answered"
