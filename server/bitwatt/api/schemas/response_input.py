"""What /v1/responses takes as input, put as chat has it."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import WithJsonSchema

from bitwatt.api.schemas.as_chat import ID_SCHEMA, function_call, short_text, tagged
from bitwatt.api.schemas.chat import MAX_MESSAGES
from bitwatt.api.schemas.parameters import refuse
from bitwatt.api.schemas.response_tools import qualified
from bitwatt.api.schemas.tools import MAX_CALLS
from bitwatt.errors import shorten

__all__ = [
    "Find",
    "Input",
    "chat_messages",
    "has_references",
]

_ROLES = ("user", "assistant", "system", "developer")
_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "refusal": "refusal",
    "reasoning_text": "text",
    "summary_text": "text",
}
"""Where each type of content part has its text."""

_REFERENCE = "item_reference"
_PART_FIELDS = frozenset(
    {"type", "text", "refusal", "annotations", "logprobs", "prompt_cache_breakpoint"}
)
_OF_ANY_ITEM = frozenset({"type", "id", "status", "created_by"})
_ITEM_FIELDS = {
    "message": _OF_ANY_ITEM | {"role", "content", "phase"},
    "reasoning": _OF_ANY_ITEM | {"content", "summary", "encrypted_content"},
    "function_call": _OF_ANY_ITEM
    | {"call_id", "name", "namespace", "arguments", "async", "caller"},
    "function_call_output": _OF_ANY_ITEM | {"call_id", "output", "name", "namespace", "caller"},
}

_STRING = {"type": "string"}
_TEXT_OR_PARTS = {
    "anyOf": [
        _STRING,
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": _STRING},
                "required": ["type", "text"],
            },
        },
    ]
}
_MESSAGE = tagged("message", {"role": {"enum": list(_ROLES)}, "content": _TEXT_OR_PARTS})
_ITEMS = [
    _MESSAGE | {"required": ["role", "content"]},
    tagged(
        "function_call",
        {"call_id": ID_SCHEMA, "name": ID_SCHEMA, "arguments": _STRING},
    ),
    tagged("function_call_output", {"call_id": ID_SCHEMA, "output": _TEXT_OR_PARTS}),
]
Input = Annotated[
    list[dict[str, Any]],  # chat_messages makes them
    WithJsonSchema(
        {
            "anyOf": [
                _STRING,
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MAX_MESSAGES,
                    "items": {"anyOf": _ITEMS},
                },
            ]
        }
    ),
]

Find = Callable[[str], dict[str, Any] | None]
"""Returns an item of an earlier response, by its id; None where it isn't kept."""


def has_references(given: Any) -> bool:
    """Return whether an item of the input stands for one of an earlier response."""
    return isinstance(given, list) and any(
        isinstance(item, dict) and item.get("type") == _REFERENCE for item in given
    )


def chat_messages(given: Any, unknown: list[str], find: Find) -> list[dict[str, Any]]:
    """Return chat's messages, and put the names of unknown fields into the list.

    find  resolves references
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise refuse("input must be a string or a list of at least one item", "input")
    if len(given) > MAX_MESSAGES:
        raise refuse(f"input has {len(given)} items; the limit is {MAX_MESSAGES}", "input")
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's, while items add to it
    for index, item in enumerate(given):
        at = f"input[{index}]"
        if not isinstance(item, dict):
            raise refuse(f"{at} must be an object, not {shorten(item)}", at)
        if item.get("type") == _REFERENCE:
            found = find(_short_text(item, "id", at))
            if found is None:
                raise refuse(
                    f"{at} refers to {shorten(item['id'])}, which isn't kept (--kept-items-bytes): "
                    "send the item itself",
                    at,
                )
            item = found
        kind = item.get("type", "message")
        if not isinstance(kind, str) or kind not in _ITEM_FIELDS:
            raise refuse(f"{at}: items of type {shorten(kind)} are not supported", at)
        unknown += [f"input[].{name}" for name in item if name not in _ITEM_FIELDS[kind]]
        match kind:
            case "function_call_output":
                call_id = _short_text(item, "call_id", at)
                content = _text(item.get("output"), f"{at}.output", unknown)
                messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
                turn = None
                continue
            case "message" if item.get("role") != "assistant":
                messages.append(_message(item, at, unknown))
                turn = None
                continue
            case "reasoning":
                content = item.get("content")
                if content is None or content == []:
                    content = item.get("summary")
                thought = "" if content is None else _text(content, at, unknown)
                if not thought:
                    continue
                is_next = turn is None or bool(turn["content"]) or "tool_calls" in turn
                if turn is not None and not is_next and "reasoning_content" in turn:
                    thought = f"{turn['reasoning_content']}\n{thought}"
                added: dict[str, Any] = {"reasoning_content": thought}
            case "message":
                added = _message(item, at, unknown)
                is_next = turn is None or bool(turn["content"]) or "tool_calls" in turn
            case _:
                calls = [] if turn is None else turn.get("tool_calls", [])
                if len(calls) == MAX_CALLS:
                    raise refuse(f"{at} is a call too many: a turn has {MAX_CALLS} at most", at)
                added = {"tool_calls": [*calls, _call(item, at)]}
                is_next = turn is None
        if is_next or turn is None:
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        turn |= added
    if not messages:
        raise refuse("input has no message", "input")
    return messages


def _message(item: Mapping[str, Any], at: str, unknown: list[str]) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        raise refuse(f"{at}.role is {shorten(role)}; it is one of {', '.join(_ROLES)}", at)
    return {"role": role, "content": _text(item.get("content"), f"{at}.content", unknown)}


def _call(item: Mapping[str, Any], at: str) -> dict[str, Any]:
    arguments = item.get("arguments")
    if not isinstance(arguments, str):
        raise refuse(f"{at}.arguments is {shorten(arguments)}; it must be JSON in a string", at)
    name = _short_text(item, "name", at)
    if item.get("namespace") is not None:
        name = qualified(_short_text(item, "namespace", at), name)
    return function_call(_short_text(item, "call_id", at), name, arguments)


def _short_text(item: Mapping[str, Any], name: str, at: str) -> str:
    place = f"{at}.{name}"
    return short_text(item.get(name), place, place)


def _text(parts: Any, at: str, unknown: list[str]) -> str:
    """Return a text, or that of parts, which become lines."""
    if isinstance(parts, str):
        return parts
    if not isinstance(parts, list):
        raise refuse(f"{at} must be a string or a list of text parts", at)
    lines: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        name = _PARTS.get(kind) if isinstance(kind, str) else None
        if name is None:
            raise refuse(f"{at}: parts of type {shorten(kind)} are not supported; only text is", at)
        if not isinstance(part.get(name), str):
            raise refuse(f"{at}: a part of type {kind} has a string {name}", at)
        unknown += [f"input[].content[].{field}" for field in part if field not in _PART_FIELDS]
        lines.append(part[name])
    return "\n".join(lines)
