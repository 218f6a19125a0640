"""What /v1/messages takes as turns and tools, put as chat has it."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import WithJsonSchema

from bitwatt.api.schemas.as_chat import (
    ID_SCHEMA,
    check_tool_fields,
    function_call,
    function_tool,
    short_text,
    tagged,
)
from bitwatt.api.schemas.chat import MAX_MESSAGES
from bitwatt.api.schemas.parameters import MESSAGES_TOOL, refuse
from bitwatt.api.schemas.tools import MAX_CALLS, MAX_TOOLS
from bitwatt.errors import shorten
from bitwatt.serving.tools import TOOL_NAME

__all__ = [
    "MessagesToolChoice",
    "MessagesTools",
    "System",
    "Turns",
    "chat_messages",
    "chat_tool",
    "chat_tool_choice",
    "check_tools",
    "text_of",
]

_BLOCK_FIELDS = {
    "text": frozenset({"type", "text", "cache_control", "citations"}),
    "thinking": frozenset({"type", "thinking", "signature"}),
    "redacted_thinking": frozenset({"type", "data"}),
    "tool_use": frozenset({"type", "id", "name", "input", "cache_control", "caller"}),
    "tool_result": frozenset({"type", "tool_use_id", "content", "is_error", "cache_control"}),
}
_BLOCKS_OF = {
    "system": ("text",),
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": "tool"}

_STRING = {"type": "string"}


def _string_or(*blocks: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [_STRING, {"type": "array", "items": {"anyOf": list(blocks)}}]}


def _turn(role: str, content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"role": {"const": role}, "content": content},
        "required": ["role", "content"],
    }


_TEXT = tagged("text", {"text": _STRING})
_TOOL_USE = tagged("tool_use", {"id": ID_SCHEMA, "name": ID_SCHEMA, "input": {"type": "object"}})
_TOOL_RESULT = tagged("tool_result", {"tool_use_id": ID_SCHEMA}, content=_string_or(_TEXT))
_THINKING = tagged("thinking", {"thinking": _STRING}, signature={"type": ["string", "null"]})
Turns = Annotated[
    list[dict[str, Any]],  # chat_messages makes them
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": {
                "anyOf": [
                    _turn("user", _string_or(_TEXT, _TOOL_RESULT)),
                    _turn("assistant", _string_or(_TEXT, _THINKING, _TOOL_USE)),
                ]
            },
        }
    ),
]
System = Annotated[str, WithJsonSchema(_string_or(_TEXT))]
MessagesTools = Annotated[
    list[dict[str, Any]],  # check_tools and chat's tool_use_of check them
    WithJsonSchema(
        {
            "type": "array",
            "maxItems": MAX_TOOLS,
            "items": {
                "type": "object",
                "properties": {
                    "type": {"enum": ["custom", None]},
                    "name": {"type": "string", "pattern": TOOL_NAME},
                    "description": {"type": ["string", "null"]},
                    "input_schema": {"type": "object"},
                    "strict": {"type": ["boolean", "null"]},
                },
                "required": ["name", "input_schema"],
            },
        }
    ),
]
_IS_ALONE = {"type": ["boolean", "null"]}
MessagesToolChoice = Annotated[
    dict[str, Any],  # check_tools checks it
    WithJsonSchema(
        {
            "anyOf": [
                tagged("auto", {}, disable_parallel_tool_use=_IS_ALONE),
                tagged("any", {}, disable_parallel_tool_use=_IS_ALONE),
                tagged("tool", {"name": _STRING}, disable_parallel_tool_use=_IS_ALONE),
                tagged("none", {}),
            ]
        }
    ),
]


def chat_messages(given: list[Any], unknown: list[str]) -> list[dict[str, Any]]:
    """Return chat's messages, and put the names of unknown fields into the list."""
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(given):
        at = f"messages[{index}]"
        role = turn.get("role") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in _BLOCKS_OF:
            raise refuse(f"{at}.role is {shorten(role)}; it is user or assistant", at)
        unknown += [f"messages[].{name}" for name in turn if name not in ("role", "content")]
        content = turn.get("content")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
            continue
        blocks = _blocks(content, role, f"{at}.content", unknown)
        if role == "user":
            messages += _user_messages(blocks, f"{at}.content", unknown)
        else:
            messages.append({"role": role, **_said(blocks, f"{at}.content")})
    if messages and "tool_calls" in messages[-1]:
        raise refuse("messages end with tool_use; its tool_result is needed", "messages")
    return messages


def text_of(blocks: Any, at: str, unknown: list[str]) -> str:
    """Return the text of the system's blocks, which become lines."""
    return "\n".join(block["text"] for block in _blocks(blocks, "system", at, unknown))


def check_tools(tools: Any, choice: Any, unknown: list[str]) -> None:
    """Raise the error of a tool that isn't the caller's, or of a choice that is none.

    unknown  gets the names of fields that no API known here has
    """
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        at = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise refuse(f"{at} must be an object, not {shorten(tool)}", at)
        if tool.get("type") not in (None, "custom"):
            raise refuse(
                f"{at}.type is {shorten(tool['type'])}; custom is supported: a tool with an "
                "input_schema, which the caller runs",
                f"{at}.type",
            )
        if not isinstance(tool.get("input_schema"), dict):
            raise refuse(
                f"{at}.input_schema is {shorten(tool.get('input_schema'))}; it must be a JSON "
                "schema, an object",
                f"{at}.input_schema",
            )
        check_tool_fields(tool, at, MESSAGES_TOOL, unknown)
    if not isinstance(choice, dict):
        return
    kind, is_alone = choice.get("type"), choice.get("disable_parallel_tool_use")
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise refuse(
            f"tool_choice.type is {shorten(kind)}; it is auto, any, tool or none",
            "tool_choice.type",
        )
    if kind == "tool" and not isinstance(choice.get("name"), str):
        raise refuse("tool_choice of the type tool has a name, a string", "tool_choice.name")
    if not isinstance(is_alone, bool | None):
        raise refuse(
            f"tool_choice.disable_parallel_tool_use is {shorten(is_alone)}; it is true or false",
            "tool_choice.disable_parallel_tool_use",
        )
    if kind in ("any", "tool") and not tools:
        raise refuse(f"tool_choice is {kind} without tools", "tool_choice")
    known = ("type", "name", "disable_parallel_tool_use")
    unknown += [f"tool_choice.{name}" for name in choice if name not in known]


def chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool as chat has it."""
    return function_tool(tool, parameters=tool["input_schema"])


def chat_tool_choice(choice: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields by which chat has the choice."""
    if choice is None:
        return {}
    mode: Any = _CHOICES[choice["type"]]
    if mode == "tool":
        mode = {"type": "function", "function": {"name": choice["name"]}}
    is_alone = choice.get("disable_parallel_tool_use")
    return {"tool_choice": mode, "parallel_tool_calls": False if is_alone else None}


def _blocks(given: Any, role: str, at: str, unknown: list[str]) -> list[dict[str, Any]]:
    """Return the blocks, each of a type that the role has, with the text that it needs."""
    if not isinstance(given, list):
        raise refuse(f"{at} must be a string or a list of blocks", at)
    place = "system[]" if at == "system" else "messages[].content[]"
    for block in given:
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str) or kind not in _BLOCKS_OF[role]:
            raise refuse(f"{at}: blocks of type {shorten(kind)} are not supported", at)
        if kind in ("text", "thinking") and not isinstance(block.get(kind), str):
            raise refuse(f"{at}: a block of type {kind} has a string {kind}", at)
        if kind == "thinking" and not isinstance(block.get("signature"), str | None):
            raise refuse(f"{at}: a block's signature is a string", at)
        unknown += [f"{place}.{name}" for name in block if name not in _BLOCK_FIELDS[kind]]
    return given


def _user_messages(
    blocks: list[dict[str, Any]], at: str, unknown: list[str]
) -> list[dict[str, Any]]:
    """Return what a user's turn holds: results of tools, and texts, which become lines."""
    messages: list[dict[str, Any]] = []
    for block in blocks:
        if block["type"] == "tool_result":
            content = "" if block.get("content") is None else block["content"]
            if not isinstance(content, str):
                content = text_of(content, f"{at}.content", unknown)
            call_id = _short_text(block, "tool_use_id", at)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        elif messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += "\n" + block["text"]
        else:
            messages.append({"role": "user", "content": block["text"]})
    return messages or [{"role": "user", "content": ""}]


def _said(blocks: list[dict[str, Any]], at: str) -> dict[str, Any]:
    """Return what an assistant said, thought and called, or the system said."""
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    thoughts = [block["thinking"] for block in blocks if block["type"] == "thinking"]
    calls = [_call(block, at) for block in blocks if block["type"] == "tool_use"]
    if len(calls) > MAX_CALLS:
        raise refuse(f"{at} has {len(calls)} tool_use; the limit is {MAX_CALLS}", at)
    said: dict[str, Any] = {"content": "\n".join(texts)}
    if any(thoughts):
        said["reasoning_content"] = "\n".join(thoughts)
    if calls:
        said["tool_calls"] = calls
    return said


def _call(block: Mapping[str, Any], at: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, dict):
        raise refuse(f"{at}: input of tool_use is {shorten(given)}; it must be an object", at)
    arguments = json.dumps(given, ensure_ascii=False)
    name = _short_text(block, "name", at)
    return function_call(_short_text(block, "id", at), name, arguments)


def _short_text(block: Mapping[str, Any], name: str, at: str) -> str:
    return short_text(block.get(name), f"{at}: {name} of {block['type']}", at)
