"""The 1,000 names that the embedded pair is asked about, with the right answers' facts."""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

NAMES_FILE = Path(__file__).parent / "names.jsonl"

Kind = Literal["module", "class", "exception", "function", "method"]


@dataclass(frozen=True, slots=True)
class Name:
    """What there is to ask about one public name; None and () where there is nothing.

    path        as one writes it after `import`: `len`, `str.join`, `os.path.join`
    purpose     one sentence
    signature   the call, without annotations
    module      where it is defined, if its last part says which name is meant
    members     the best-known attributes of a module or a class, the best-known first
    """

    path: str
    kind: Kind
    purpose: str
    signature: str | None
    module: str | None
    members: tuple[str, ...]


@cache
def load_names() -> tuple[Name, ...]:
    """Return the committed list, the best-known name first."""
    lines = NAMES_FILE.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return tuple(Name(**(fields | {"members": tuple(fields["members"])})) for fields in found)


def save_names(names: list[Name], path: Path = NAMES_FILE) -> None:
    """Write the list, a name a line."""
    path.write_text("".join(json.dumps(asdict(name)) + "\n" for name in names), encoding="utf-8")
