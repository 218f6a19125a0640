"""A fleet's day as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitwatt.errors import BitwattError
from bitwatt.simulation.fleet import NUM_HOURS, FleetRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["fleet_as_markdown", "joules_a_token", "save_fleet_png"]

_COLORS = ("#5b6472", "#b3641e", "#0b7a55")


def joules_a_token(
    run: FleetRun,
    *,
    num_replicas: int,
    day_s: float,
    watts_idle: float | None,
    watts_busy: float | None,
) -> float | None:
    """Return joules of the devices over tokens answered; None where the watts aren't known."""
    if watts_idle is None or watts_busy is None or not run.num_tokens:
        return None
    idle_s = max(0.0, num_replicas * day_s - run.busy_s)
    return (run.busy_s * watts_busy + idle_s * watts_idle) / run.num_tokens


def fleet_as_markdown(
    runs: Sequence[FleetRun], joules: Sequence[float | None], percentile: float
) -> str:
    """Return the day by router.

    joules  a token, by router
    """
    share = f"p{percentile:g}"
    days = [run.day for run in runs]
    worst = [max(run.hours, key=lambda hour: hour.ttft_s or 0.0) for run in runs]
    rows: list[tuple[str, list[str]]] = [
        ("requests", [f"{day.num_requests:,}" for day in days]),
        ("lost", [f"{day.num_lost:,}" for day in days]),
        ("crashes", [f"{run.num_crashes:,}" for run in runs]),
        (f"TTFT, ms ({share})", [_ms(day.ttft_s) for day in days]),
        (f"TTFT of the worst hour, ms ({share})", [_ms(hour.ttft_s) for hour in worst]),
        (f"time per output token, ms ({share})", [_ms(day.tpot_s) for day in days]),
        ("prompt tokens from the prefix cache", [_percent(day.cached_share) for day in days]),
        ("utilization", [_percent(run.utilization) for run in runs]),
        ("joules per token", ["unknown" if j is None else f"{j:.3g}" for j in joules]),
    ]
    lines = [f"| | {' | '.join(run.router for run in runs)} |", "|---" + "|--:" * len(runs) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows), ""])


def _ms(seconds: float | None) -> str:
    return "none" if seconds is None else f"{1e3 * seconds:,.1f}"


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.0%}"


def save_fleet_png(
    runs: Sequence[FleetRun], path: Path, *, day_s: float, percentile: float, title: str
) -> None:
    """Write the day hour by hour: requests a second, time to the first token, cached, lost.

    Raises  BitwattError without matplotlib
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BitwattError("a picture needs matplotlib: pip install 'bitwatt[compare]'") from error
    picture = Figure(figsize=(9, 7), dpi=150, layout="constrained")
    rate, ttft, cached, lost = picture.subplots(4, sharex=True)
    requests = [hour.num_requests * NUM_HOURS / day_s for hour in runs[0].hours]
    rate.plot(range(NUM_HOURS), requests, color="black")
    rate.set_ylabel("requests/s")
    _draw(ttft, runs, [[_times(1e3, h.ttft_s) for h in run.hours] for run in runs])
    ttft.set_ylabel(f"TTFT, ms (p{percentile:g})")
    ttft.set_yscale("log")
    _draw(cached, runs, [[_times(100, h.cached_share) for h in run.hours] for run in runs])
    cached.set_ylabel("cached, %")
    _draw(lost, runs, [[float(h.num_lost) for h in run.hours] for run in runs])
    lost.set_ylabel("lost")
    lost.set_xlabel("hour of the day")
    ttft.legend(frameon=False, ncols=len(runs), fontsize="small")
    rate.set_title(title, fontsize="medium")
    for axes in (rate, ttft, cached, lost):
        axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, format="png")


def _draw(axes: "Axes", runs: Sequence[FleetRun], lines: Sequence[Sequence[float]]) -> None:
    for run, line, color in zip(runs, lines, _COLORS, strict=False):
        axes.plot(range(NUM_HOURS), line, color=color, label=run.router)


def _times(factor: float, value: float | None) -> float:
    return float("nan") if value is None else factor * value
