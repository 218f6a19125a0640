"""Writes what docs/ tells of the code: `python -m bitwatt.documentation`.

docs/metrics.md is written whole. In docs/api.md and docs/settings.md the prose is written by hand;
a table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, and is made from the
schemas and settings: their fields say what they are.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings

from bitwatt.api.schemas.chat import ChatBody, Message
from bitwatt.api.schemas.common import Body, GenerationBody, StreamOptions
from bitwatt.api.schemas.completions import CompletionBody
from bitwatt.api.schemas.tokenize import DetokenizeBody, TokenizeBody
from bitwatt.cli import COMMANDS
from bitwatt.knobs import knobs_of
from bitwatt.serving.sampling_params import SamplingParams
from bitwatt.telemetry.document import as_markdown

__all__ = ["PAGES", "main", "rendered"]

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("api.md", "settings.md")

_TABLE = re.compile(r"(<!-- table: (?P<name>[a-z -]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_DEFAULTS = {field.name: field.default for field in fields(SamplingParams) if field.init}


def rendered(page: str) -> str:
    """Return the page with every table as the code has it. Raises KeyError for a name unknown."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{_TABLES[found['name']]()}\n\n{found[3]}", page)


def main() -> None:
    """Write the tables, and the page of metrics."""
    (DOCS / "metrics.md").write_text(as_markdown(), encoding="utf-8")
    for name in PAGES:
        path = DOCS / name
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _body(model: type[Body], leave_out: Iterable[str] = ()) -> str:
    """Return a body's fields, one a row."""
    schema = model.model_json_schema()
    required = schema.get("required", [])
    properties = dict(sorted(schema["properties"].items(), key=lambda one: one[0] not in required))
    return _table(
        ("Field", "Type", "Limits", "Default", "Meaning"),
        [
            (
                f"`{name}`",
                " or ".join(dict.fromkeys(_type(part) for part in _parts(schema))),
                "; ".join(filter(None, (_limits(part) for part in _parts(schema)[:1]))),
                _default(model, name),
                str(schema.get("description", "")),
            )
            for name, schema in properties.items()
            if name not in leave_out
        ],
    )


def _parts(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the alternatives of a value, null left out."""
    return [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema:
        return "object"
    if schema["type"] == "array":
        return f"list of {_plural(schema['items'])}"
    return str(schema["type"])


def _plural(schema: Mapping[str, Any]) -> str:
    is_list = schema.get("type") == "array"
    return f"lists of {_plural(schema['items'])}" if is_list else f"{_type(schema)}s"


def _limits(schema: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in schema:
        return f"above {schema['exclusiveMinimum']}, at most {schema['maximum']}"
    if "minimum" in schema:
        return f"{_power(schema['minimum'])} to {_power(schema['maximum'])}"
    nouns = {"maxLength": "characters", "maxItems": "items", "maxProperties": "keys"}
    for key, noun in nouns.items():
        if key in schema:
            least = f"{schema['minItems']} to " if "minItems" in schema else "at most "
            return f"{least}{_power(schema[key])} {noun}"
    return ""


def _power(limit: float) -> str:
    for bits in (20, 31, 63):
        for less in (0, 1):
            if abs(limit) == 2**bits - less:
                power = f"2^{bits} - 1" if less else f"2^{bits}"
                return power if limit > 0 else f"-({power})" if less else f"-{power}"
    return str(limit)


def _default(model: type[Body], name: str) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    default = field.default
    if default is None and name not in ("max_tokens", "logprobs"):
        default = _DEFAULTS.get(name)
    if default is None and field.annotation == bool | None:
        default = False
    return "" if default in (None, "") else f"`{json.dumps(default)}`"


def _unsupported(model: type[Body], leave_out: Iterable[str] = ()) -> str:
    """Return the options that are refused, with the values at which they may pass."""
    return _table(
        ("Option", "Passes at"),
        [
            (f"`{name}`", ", ".join(["`null`", *(f"`{json.dumps(v)}`" for v in values)]))
            for name, values in sorted(model.unsupported.items())
            if name not in leave_out
        ],
    )


def _settings(settings: type[BaseSettings]) -> str:
    prefix = settings.model_config.get("env_prefix", "")
    return _table(
        ("Flag", "Variable", "Meaning", "Limits", "Default"),
        [
            (
                f"`{f'{knob.flag} {knob.value}'.strip()}`",
                f"`{prefix}{knob.name.upper()}`" if knob.flag == _flag(knob.name) else "",
                knob.meaning,
                knob.limits,
                knob.default or "required",
            )
            for knob in knobs_of(settings)
        ],
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


_SHARED = GenerationBody.model_fields.keys() - {"max_tokens"}
_TABLES: dict[str, Callable[[], str]] = {
    "generation": lambda: _body(GenerationBody, ["max_tokens"]),
    "generation unsupported": lambda: _unsupported(GenerationBody),
    "completions": lambda: _body(CompletionBody, _SHARED),
    "completions unsupported": lambda: _unsupported(CompletionBody, GenerationBody.unsupported),
    "chat": lambda: _body(ChatBody, _SHARED),
    "chat unsupported": lambda: _unsupported(ChatBody, GenerationBody.unsupported),
    "message": lambda: _body(Message),
    "message unsupported": lambda: _unsupported(Message),
    "stream options": lambda: _body(StreamOptions),
    "stream options unsupported": lambda: _unsupported(StreamOptions),
    "tokenize": lambda: _body(TokenizeBody),
    "detokenize": lambda: _body(DetokenizeBody),
    **{
        name: lambda settings=settings: _settings(settings)  # type: ignore[misc]
        for name, settings in COMMANDS.items()
        if name != "chat"
    },
    "chat command": lambda: _settings(COMMANDS["chat"]),
}

if __name__ == "__main__":
    main()
