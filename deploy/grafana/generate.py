"""Writes the dashboards: `python -m deploy.grafana.generate`, with --check to compare alone."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.grafana.capacity import CAPACITY
from deploy.grafana.comparison import COMPARISON
from deploy.grafana.operations import OPERATIONS
from deploy.grafana.panels import Dashboard

__all__ = ["DASHBOARDS", "main", "outdated"]

DASHBOARDS = (COMPARISON, OPERATIONS, CAPACITY)
_FOLDER = Path(__file__).parent / "dashboards"


def _file(dashboard: Dashboard) -> Path:
    return _FOLDER / f"{dashboard.uid}.json"


def _text(dashboard: Dashboard) -> str:
    return json.dumps(dashboard.as_json(), indent=1, ensure_ascii=False) + "\n"


def outdated() -> list[str]:
    """Return the files that are missing, stale or nobody's."""
    expected = {_file(dashboard): _text(dashboard) for dashboard in DASHBOARDS}
    stale = [
        file.name
        for file, text in expected.items()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    ]
    return stale + [file.name for file in _FOLDER.glob("*") if file not in expected]


def main(args: Sequence[str] | None = None) -> int:
    """Write the files, or with --check name those that would change; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if outdated")
    if parser.parse_args(args).check:
        files = outdated()
        if files:
            parser.exit(1, f"outdated: {', '.join(files)}; run python -m deploy.grafana.generate\n")
        return 0
    _FOLDER.mkdir(exist_ok=True)
    for dashboard in DASHBOARDS:
        _file(dashboard).write_text(_text(dashboard), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
