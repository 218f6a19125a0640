"""Tells every declared metric as a page."""

from itertools import groupby
from typing import Any

from bitwatt.telemetry.declarations import DECLARATIONS, LABELS, Declaration

__all__ = ["as_markdown"]

_HEAD = """\
# Metrics

`GET /metrics` answers in Prometheus's text format. `vllm:*` have vLLM's names, labels and meanings,
so that what was made for it reads this server unchanged; `DCGM_*` have NVIDIA DCGM's. A scrape
changes nothing. A model's counters and histograms begin at zero and go on across its engine's
restarts. What was never set has no series, as a price that isn't given or energy that isn't
measured; nor has a combination of further labels that never occurred.

`deploy/prometheus/rules.yml` records what dashboards and alerts share; `energy-and-cost.md` says
how joules are measured and what the formulas are.

*Written by `python -m bitwatt.documentation` from the declarations, and not by hand.*
"""


def as_markdown() -> str:
    """Return the page: a table a group, and what the labels say."""
    parts = [_HEAD]
    for group, declarations in groupby(DECLARATIONS, key=lambda declaration: declaration.group):
        parts.append(f"## {group}\n")
        parts.append("| Metric | Kind | Labels | What |\n|---|---|---|---|")
        parts += [_row(declaration) for declaration in declarations]
        parts.append("")
    parts.append("## Labels\n")
    parts.append("| Label | What it says |\n|---|---|")
    parts += [f"| `{label}` | {text} |" for label, text in LABELS.items()]
    return "\n".join(parts) + "\n"


def _row(declaration: Declaration[Any]) -> str:
    kind = declaration.kind.__name__.lower()
    name = declaration.name
    if kind == "histogram":
        low, high = declaration.buckets[0], declaration.buckets[-1]
        kind += f", {len(declaration.buckets)} buckets from {low:g} to {high:g}"
    else:
        [name] = declaration.series
    labels = ", ".join(f"`{label}`" for label in declaration.labels)
    return f"| `{name}` | {kind} | {labels} | {declaration.help} |"
