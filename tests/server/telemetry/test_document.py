"""docs/metrics.md, held to the declarations."""

import re
from fnmatch import fnmatch
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


def test_what_is_said_not_to_be_here_is_not():
    told = as_markdown().partition("## Of vLLM's, not here")[2].partition("## Labels")[0]
    patterns = [
        name for name in re.findall(r"`([a-z:_*]+)`", told) if name.endswith(("*", "_info"))
    ]
    assert patterns
    names = [declaration.name for declaration in DECLARATIONS]
    assert not [name for name in names for pattern in patterns if fnmatch(name, pattern)]


def test_headings_differ():
    headings = [line for line in as_markdown().splitlines() if line.startswith("## ")]
    assert len(set(headings)) == len(headings)


def test_every_label_says_something():
    assert {label for declaration in DECLARATIONS for label in declaration.labels} == LABELS.keys()
