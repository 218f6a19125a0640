"""docs/metrics.md, held to the declarations."""

from pathlib import Path

from bitwatt.telemetry.declarations import DECLARATIONS, LABELS
from bitwatt.telemetry.document import as_markdown

METRICS = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_the_page_is_what_the_declarations_say():
    assert METRICS.read_text(encoding="utf-8") == as_markdown(), (
        "run python -m bitwatt.documentation"
    )


def test_every_metric_is_declared_once_and_stands_in_one_row():
    names = [declaration.name for declaration in DECLARATIONS]
    assert len(set(names)) == len(names)
    rows = [line for line in as_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(names) + len(LABELS)
    headings = [line for line in as_markdown().splitlines() if line.startswith("## ")]
    assert len(set(headings)) == len(headings)


def test_every_label_says_something():
    assert {label for declaration in DECLARATIONS for label in declaration.labels} == LABELS.keys()
