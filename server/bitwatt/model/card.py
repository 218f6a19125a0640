"""What a model's card says of its quality. No torch."""

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

__all__ = ["Quality", "quality_told"]

_MAX_CARD_CHARS = 2**20
_COLUMN = "bits/byte"
_TERNARY_ROW = "ternary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A model's loss on held-out text.

    bits_per_byte  lower is better
    evaluation     names what it was measured on; figures of one evaluation may be compared
    """

    bits_per_byte: float
    evaluation: str


def quality_told(folder: Path) -> Quality | None:
    """Return what the card in a model's folder says, README.md; None where it says nothing.

    That is a table with a column bits/byte, as `python -m bitwatt.training` writes it: a row a
    model of one evaluation, the ternary one's named so.
    """
    try:
        with (folder / "README.md").open(encoding="utf-8") as file:
            lines = iter(file.read(_MAX_CARD_CHARS).splitlines())
        config = json.loads((folder / "config.json").read_text())
        is_ternary = config.get("model_type") == "bitnet"
        head = next(cells for line in lines if _COLUMN in (cells := _cells(line)))
        next(lines)  # the rule under the head
        rows = list(takewhile(bool, map(_cells, lines)))
        [row] = [r for r in rows if len(rows) == 1 or (r[0] == _TERNARY_ROW) is is_ternary]
        bits_per_byte = float(row[head.index(_COLUMN)])
    except (OSError, ValueError, AttributeError, IndexError, StopIteration):
        return None
    if not 0 < bits_per_byte < 8:
        return None
    return Quality(
        bits_per_byte=bits_per_byte, evaluation=sha256(repr(rows).encode()).hexdigest()[:12]
    )


def _cells(line: str) -> list[str]:
    """Return the cells of a table's row; none of another line."""
    if not re.fullmatch(r"\s*\|.*\|\s*", line):
        return []
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]
