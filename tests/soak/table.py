"""`python -m tests.soak.table soak.json`: the figures of a soak, into docs/soak.md."""

import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["as_markdown", "slope_mib_per_hour", "written"]

PAGE = Path(__file__).parents[2] / "docs" / "soak.md"
_TABLE = re.compile(r"(<!-- table: soak -->\n).*?(<!-- end of table -->)", re.DOTALL)
_FILLED = 3  # epochs in which allocators' pools fill


def main() -> int:
    """Put the table of the file that is named into the page."""
    found = json.loads(Path(sys.argv[1]).read_text())
    PAGE.write_text(written(PAGE.read_text(), found))
    return 0


def written(page: str, found: Mapping[str, Any]) -> str:
    """Return the page with the table of a soak's JSON in place of what it has."""
    return _TABLE.sub(lambda place: f"{place[1]}\n{as_markdown(found)}\n{place[2]}", page)


def as_markdown(found: Mapping[str, Any]) -> str:
    """Return the run in a sentence, and its figures by model."""
    models = list(found["ends"])
    counted = [found["counted"].get(model, {}) for model in models]
    kinds = list(dict.fromkeys(kind for model in models for kind in found["ends"][model]))
    rows = [
        ("requests", [f"{sum(found['ends'][model].values()):,}" for model in models]),
        *((f"… {kind}", [f"{found['ends'][m].get(kind, 0):,}" for m in models]) for kind in kinds),
        ("answers that the server counts", [_number(one, "choices") for one in counted]),
        ("… that callers read", [_number(one, "choices_read") for one in counted]),
        ("… that callers gave up, or that broke off", _given_up(counted)),
        ("tokens that the server counts", [_number(one, "tokens") for one in counted]),
        ("… that callers read", [_number(one, "tokens_read") for one in counted]),
        ("longest request, s", [f"{found['longest_s'][model]:.1f}" for model in models]),
        ("longest without a byte, s", [f"{found['largest_gap_s'][model]:.1f}" for model in models]),
    ]
    processes = [
        ("API process", found["rss_api_mib"]),
        ("engine that nothing happens to", found["rss_engine_mib"]),
    ]
    machine = found["machine"]
    faults = found["faults"]
    told = (
        f"{found['seconds'] / 60:.0f} minutes on {machine['num_cpus']} cores of {machine['cpu']} "
        f"(commit {machine['commit']}): {found['callers']} callers, {found['epochs']} epochs, "
        f"{found['engine_kills']} engines killed, {found['server_stops']} servers stopped amid "
        f"traffic, {found['requests']:,} requests, {len(faults)} faults."
    )
    return "\n".join(
        [
            told,
            "",
            *_table(["", *(f"`{model}`" for model in models)], rows),
            "",
            *_table(
                ["RssAnon", "after the first epoch, MiB", "after the last, MiB", "slope, MiB/hour"],
                [(name, _memory(series, found["rss_at_s"])) for name, series in processes],
            ),
            "",
            *(f"- {fault}" for fault in faults),
            *([""] if faults else []),
        ]
    )


def _given_up(counted: Iterable[Mapping[str, int]]) -> list[str]:
    return [_number(one, "choices_given_up") for one in counted]


def _number(figures: Mapping[str, int], name: str) -> str:
    return f"{figures[name]:,}" if name in figures else "none"


def _memory(servers: Sequence[Sequence[float]], at_s: Sequence[Sequence[float]]) -> list[str]:
    """Return the figures of the server that lived longest."""
    longest = max(range(len(servers)), key=lambda i: len(servers[i]))
    mib = servers[longest]
    if not mib:
        return ["none"] * 3
    slope = slope_mib_per_hour(at_s[longest][_FILLED:], mib[_FILLED:])
    told = "too short to tell" if slope is None else f"{slope:+.1f}"
    return [f"{mib[0]:.0f}", f"{mib[-1]:.0f}", told]


def slope_mib_per_hour(at_s: Sequence[float], mib: Sequence[float]) -> float | None:
    """Return the least-squares slope; None of fewer than three points."""
    if len(mib) < 3:
        return None
    return 3600 * statistics.linear_regression(at_s, mib).slope


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---" + "|--:" * (len(head) - 1) + "|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
    ]


if __name__ == "__main__":
    sys.exit(main())
