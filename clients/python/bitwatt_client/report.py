"""A comparison as a table and as JSON."""

from dataclasses import asdict
from decimal import Decimal
from typing import Any

from bitwatt_client.compare import Comparison
from bitwatt_client.figures import Figure
from bitwatt_client.statistics import Spread
from bitwatt_client.terminal import plural, printable

__all__ = ["as_json", "as_table", "verdict"]

_BYTES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def verdict(figure: Figure) -> str:
    """Return in words what a figure says of the first model; its interval decides."""
    gain = figure.gain
    if gain is None:
        return "unavailable" if figure.a is None else "each of its own"
    if gain.low > 1:
        return "better"
    if gain.high < 1:
        return "worse"
    return "equal" if gain.low == gain.high else "no clear difference"


def as_table(comparison: Comparison) -> str:
    """Return the figures as lines of text for a terminal."""
    work = comparison.plan.work
    rows = [("", comparison.name_a, comparison.name_b, "gain", "95% interval", "")]
    for figure in comparison.figures:
        if figure.a is None or figure.b is None:
            rows.append((figure.label, "–", "–", "–", "", f"unavailable: {figure.unavailable}"))
            continue
        largest = max(figure.a.median, figure.b.median)
        values = (
            _shown(figure.a, figure.unit, largest),
            _shown(figure.b, figure.unit, largest),
        )
        gain = figure.gain
        if gain is None:
            rows.append((figure.label, *values, "–", "", verdict(figure)))
            continue
        between = "" if gain.low == gain.high else f"{gain.low:.2f}–{gain.high:.2f}"
        rows.append(
            (
                figure.label,
                *values,
                f"{gain.value:.2f}×",
                between,
                verdict(figure),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    windows = plural(comparison.plan.num_windows, "alternating window")
    title = (
        f"{comparison.name_a} against {comparison.name_b}: {windows} each of "
        f"{plural(work.num_requests, 'request')}, {work.concurrency} at once, {work.max_tokens} "
        "tokens an answer"
    )
    lines = [title, ""]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [row[column].rjust(widths[column]) for column in range(1, 5)]
        lines.append("  ".join([*cells, row[5]]).rstrip())
    num_warmups = comparison.plan.num_warmups
    warmups = f", without {plural(num_warmups, 'warm-up window')} before them"
    lines += [
        "",
        f"Medians of windows ± half their interquartile range{warmups if num_warmups else ''}.",
        f"Gain is how many times better {comparison.name_a} is; below 1 it is worse.",
    ]
    lines += [f"Note: {notice}." for notice in comparison.notices]
    return printable("\n".join(lines))


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as plain data; what is unavailable is null beside its reason."""
    plan = asdict(comparison.plan)
    plan["work"]["num_prompts"] = len(plan["work"].pop("prompts"))
    figures = {}
    for figure in comparison.figures:
        fields = asdict(figure)
        figures[fields.pop("key")] = fields | {"verdict": verdict(figure)}
    return {
        "a": comparison.name_a,
        "b": comparison.name_b,
        "plan": plan,
        "figures": figures,
        "notices": list(comparison.notices),
    }


def _shown(value: Spread, unit: str, largest: float) -> str:
    """Return the value in the unit of the largest that stands beside it."""
    scale, name = 1.0, unit
    if unit == "B":
        name, scale = next(
            ((name, scale) for name, scale in _BYTES if largest >= scale), ("B", 1.0)
        )
    elif unit == "s" and largest < 1:
        name, scale = "ms", 1e-3
    median = _plain(value.median / scale, 3)
    half_range = (value.high - value.low) / 2 / scale
    around = f" ±{_plain(half_range, 2)}" if value.n > 1 else ""
    return f"${median}{around}" if name == "$" else f"{median}{around} {name}"


def _plain(number: float, num_digits: int) -> str:
    """Return the number with so many digits that count, and never with an exponent."""
    if number >= 10**num_digits:
        return f"{number:.0f}"
    return f"{Decimal(f'{number:.{num_digits}g}'):f}"
