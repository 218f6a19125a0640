"""What a model's card says of its quality. No torch."""

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

__all__ = ["SAME_TOKENS", "Quality", "quality_told"]

SAME_TOKENS = "same tokens in the same order"
"""What the card of a twin says that was trained as the ternary model beside it."""

_MAX_CARD_CHARS = 2**20
_COLUMN = "bits/byte"
_TOKENS_COLUMN = "tokens seen"
_TERNARY_ROW = "ternary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A model's loss on held-out text, and what it was trained on.

    bits_per_byte  lower is better
    evaluation     names what it was measured on; figures of one evaluation may be compared
    num_tokens     it was trained on; None where the card doesn't say
    has_same_tokens  whether the card says that its twin was trained on the same ones
    """

    bits_per_byte: float
    evaluation: str
    num_tokens: int | None = None
    has_same_tokens: bool = False


def quality_told(folder: Path) -> Quality | None:
    """Return what the card in a model's folder says, README.md; None where it says nothing.

    That is a table with a column bits/byte, as `python -m bitwatt.training` writes it: a row a
    model of one evaluation, the ternary one's named so.
    """
    try:
        with (folder / "README.md").open(encoding="utf-8") as file:
            text = file.read(_MAX_CARD_CHARS)
        lines = iter(text.splitlines())
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
        bits_per_byte=bits_per_byte,
        evaluation=sha256(repr(rows).encode()).hexdigest()[:12],
        num_tokens=_num_tokens(head, row),
        has_same_tokens=SAME_TOKENS in " ".join(text.split()),
    )


def _num_tokens(head: list[str], row: list[str]) -> int | None:
    """Return what the row has under "tokens seen"; None where that is no number."""
    try:
        told = row[head.index(_TOKENS_COLUMN)].replace(",", "")
    except (ValueError, IndexError):
        return None
    return int(told) if re.fullmatch(r"[0-9]{1,18}", told) else None


def _cells(line: str) -> list[str]:
    """Return the cells of a table's row; none of another line."""
    if not re.fullmatch(r"\s*\|.*\|\s*", line):
        return []
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]
