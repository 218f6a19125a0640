"""Writes what docs/ tells of the code: `python -m bitwatt.documentation`.

docs/metrics.md is written whole. In docs/api.md, docs/parameters.md and docs/settings.md the prose
is written by hand; a table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, and
is made from the schemas, parameters and settings: they say what they are.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bitwatt.api.schemas import parameters
from bitwatt.api.schemas.chat import ChatBody, Message
from bitwatt.api.schemas.common import Body, GenerationBody, SamplingBody, StreamOptions
from bitwatt.api.schemas.completions import CompletionBody
from bitwatt.api.schemas.embeddings import EmbeddingBody
from bitwatt.api.schemas.messages import MessagesBody
from bitwatt.api.schemas.parameters import Parameter, Parameters
from bitwatt.api.schemas.responses import ResponsesBody
from bitwatt.api.schemas.tokenize import DetokenizeBody, TokenizeBody
from bitwatt.cli import COMMANDS
from bitwatt.knobs import Knob, Settings, knobs_of
from bitwatt.serving.sampling_params import SamplingParams
from bitwatt.telemetry.document import as_markdown

__all__ = ["PAGES", "main", "rendered"]

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("api.md", "parameters.md", "settings.md")

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
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if schema["type"] == "array":
        return f"list of {_plural(schema['items'])}"
    return str(schema["type"])


def _plural(schema: Mapping[str, Any]) -> str:
    is_list = schema.get("type") == "array"
    return f"lists of {_plural(schema['items'])}" if is_list else f"{_type(schema)}s"


def _limits(schema: Mapping[str, Any]) -> str:
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
        default = "unless false" in (field.description or "")
    return "" if default in (None, "") else f"`{json.dumps(default)}`"


def _parameters(given: Parameters) -> str:
    """Return a body's parameters, those of one API together."""
    return _table(
        ("Parameter", "Of", "Here", "Note"),
        [
            (f"`{name}`", parameter.api, _outcome(parameter), parameter.note)
            for name, parameter in sorted(given.items(), key=lambda one: _API_ORDER(one[1].api))
        ],
    )


_API_ORDER = ("OpenAI", "Anthropic", "vLLM", "SGLang", "llama.cpp", "LiteLLM").index


def _outcome(parameter: Parameter) -> str:
    if parameter.works:
        return "works"
    if parameter.neutral is None:
        return "asks for nothing"
    passes = [f"at `{json.dumps(value)}`" for value in parameter.neutral]
    if parameter.unless is not None:
        name, value = parameter.unless
        passes.append(f"beside `{name}: {json.dumps(value)}`")
    return f"refused, but {' or '.join(passes)}" if passes else "refused"


def _besides(given: Parameters) -> Parameters:
    """Return those of one of the two completions alone."""
    return {name: parameter for name, parameter in given.items() if name not in _OF_BOTH}


def _settings(settings: type[Settings]) -> str:
    """Return the settings, one a row, in a table for each group."""
    by_group: dict[str, list[Knob]] = {}
    for knob in knobs_of(settings):
        by_group.setdefault(knob.group, []).append(knob)
    tables = [(title, _knobs(settings, knobs)) for title, knobs in by_group.items()]
    return "\n\n".join(f"### {title}\n\n{table}" if title else table for title, table in tables)


def _knobs(settings: type[Settings], knobs: Iterable[Knob]) -> str:
    return _table(
        ("Flag", "Variable", "Meaning", "Limits", "Default"),
        [
            (
                f"`{f'{knob.flag} {knob.value}'.strip()}`",
                f"`{settings.variable(knob.name)}`" if knob.flag == _flag(knob.name) else "",
                knob.meaning,
                knob.limits,
                knob.default or "required",
            )
            for knob in knobs
        ],
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


_OF_BOTH = {
    name: parameter
    for name, parameter in parameters.CHAT.items()
    if parameters.COMPLETIONS.get(name) == parameter
}
_SHARED = GenerationBody.model_fields.keys() - {"max_tokens"}
_SAMPLING = [name for name in SamplingBody.model_fields if name != "model"]
_TABLES: dict[str, Callable[[], str]] = {
    "generation": lambda: _body(GenerationBody, ["max_tokens"]),
    "completions": lambda: _body(CompletionBody, _SHARED),
    "chat": lambda: _body(ChatBody, _SHARED),
    "message": lambda: _body(Message),
    "stream options": lambda: _body(StreamOptions),
    "parameters of both": lambda: _parameters(_OF_BOTH),
    "parameters of chat": lambda: _parameters(_besides(parameters.CHAT)),
    "parameters of completions": lambda: _parameters(_besides(parameters.COMPLETIONS)),
    "parameters of stream options": lambda: _parameters(parameters.STREAM_OPTIONS),
    "parameters of messages": lambda: _parameters(parameters.MESSAGE),
    "parameters of tools": lambda: _parameters(parameters.TOOL),
    "parameters of functions": lambda: _parameters(parameters.FUNCTION),
    "parameters of tool calls": lambda: _parameters(parameters.TOOL_CALL),
    "parameters of called functions": lambda: _parameters(parameters.CALLED_FUNCTION),
    "parameters of content parts": lambda: _parameters(parameters.CONTENT_PART),
    "parameters of tokenize": lambda: _parameters(parameters.TOKENIZE),
    "parameters of detokenize": lambda: _parameters(parameters.DETOKENIZE),
    "sampling": lambda: _body(SamplingBody),
    "responses": lambda: _body(ResponsesBody, _SAMPLING),
    "anthropic messages": lambda: _body(MessagesBody, _SAMPLING),
    "parameters of responses": lambda: _parameters(parameters.RESPONSES),
    "parameters of responses tools": lambda: _parameters(parameters.RESPONSES_TOOL),
    "parameters of text": lambda: _parameters(parameters.TEXT),
    "parameters of reasoning": lambda: _parameters(parameters.REASONING),
    "parameters of anthropic messages": lambda: _parameters(parameters.MESSAGES),
    "parameters of count tokens": lambda: _parameters(parameters.MESSAGES_COUNT),
    "parameters of anthropic tools": lambda: _parameters(parameters.MESSAGES_TOOL),
    "parameters of thinking": lambda: _parameters(parameters.THINKING),
    "parameters of output config": lambda: _parameters(parameters.OUTPUT_CONFIG),
    "embeddings": lambda: _body(EmbeddingBody),
    "parameters of embeddings": lambda: _parameters(parameters.EMBEDDINGS),
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
