"""A comparison as a picture. Needs matplotlib, from the extra `compare`."""

from pathlib import Path
from typing import TYPE_CHECKING

from bitwatt_client.compare import Comparison
from bitwatt_client.errors import ClientError
from bitwatt_client.report import verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

__all__ = ["save_png"]

_COLORS = {"better": "#0b7a55", "worse": "#b3261e"}
_NEUTRAL = "#5b6472"


def save_png(comparison: Comparison, path: Path) -> None:
    """Write each figure's gain with its interval beside the line of no difference.

    Raises  ClientError without matplotlib
    """
    try:
        from matplotlib.figure import Figure as Picture
    except ImportError as error:
        raise ClientError("a picture needs matplotlib: pip install 'bitwatt[compare]'") from error
    picture = Picture(figsize=(8, 4.5), dpi=150, layout="constrained")
    _draw(comparison, picture)
    picture.savefig(path, format="png")


def _draw(comparison: Comparison, picture: "Picture") -> None:
    axes = picture.add_subplot()
    figures = [figure for figure in comparison.figures if figure.gain is not None]
    missing = [figure for figure in comparison.figures if figure.a is None]
    for row, figure in enumerate(figures):
        gain = figure.gain
        assert gain is not None
        color = _COLORS.get(verdict(figure), _NEUTRAL)
        axes.plot([gain.low, gain.high], [row, row], color=color, linewidth=3, alpha=0.4)
        axes.plot([gain.value], [row], "o", color=color, markersize=8)
        axes.annotate(
            f"{gain.value:.2f}×", (gain.value, row), xytext=(0, 8), textcoords="offset points",
            ha="center", color=color, fontweight="bold",
        )  # fmt: skip
    axes.axvline(1, color=_NEUTRAL, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_yticks(range(len(figures)), [figure.label for figure in figures])
    axes.set_ylim(len(figures) - 0.4, -0.7)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlabel(f"{comparison.name_a} is better by → (left of 1×: worse)")
    work = comparison.plan.work
    axes.set_title(
        f"{comparison.name_a} against {comparison.name_b}: {work.concurrency} requests at once, "
        f"n = {comparison.plan.num_windows} windows of {work.num_requests}",
        fontsize="medium",
    )
    axes.spines[["top", "right"]].set_visible(False)
    if missing:
        said = "\n".join(f"{figure.label}: unavailable, {figure.unavailable}" for figure in missing)
        picture.text(0.01, -0.02, said, fontsize="x-small", color=_NEUTRAL, va="top")
