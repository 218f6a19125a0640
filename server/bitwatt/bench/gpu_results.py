"""The results of `make gpu`: one JSON file, whole after every row."""

import json
from pathlib import Path
from typing import Any

from bench.report import goals

from bitwatt.bench.gpu_speedups import speedups

__all__ = ["NO_GPU", "REPOSITORY", "Results"]

NO_GPU = 2
"""A stage's exit status, and the bench's, where there is nothing to measure on."""

REPOSITORY = Path(__file__).resolve().parents[3]


class Results:
    """What has been measured so far, by one process at a time.

    The file is replaced at once, never half written.
    """

    def __init__(self, path: Path) -> None:
        """Read what stages before have left."""
        self._path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def put(self, **figures: Any) -> None:
        """Set figures, and save."""
        self.data |= figures
        self.save()

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to a list, and save."""
        self.data.setdefault(name, []).append(row)
        self.save()

    def skip(self, stage: str, reason: str) -> None:
        """Name what was left out, or ended early, and save."""
        self.data.setdefault("skipped", {})[stage] = reason
        self.save()

    def save(self) -> None:
        """Write the file anew, with the ratios and goals that follow from its figures."""
        self.data["speedups"] = speedups(self.data.get("end_to_end", []))
        self.data["goals"] = goals(self.data)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".part")
        draft.write_text(json.dumps(self.data, indent=1) + "\n")
        draft.replace(self._path)
