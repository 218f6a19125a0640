"""What the bodies of other APIs than chat's share on their way to it."""

from collections.abc import Mapping
from typing import Any

from bitwatt.api.schemas.parameters import Parameters, refuse
from bitwatt.errors import shorten

__all__ = [
    "ID_SCHEMA",
    "check_tool_fields",
    "function_call",
    "function_tool",
    "short_text",
    "tagged",
]

_MAX_NAME_CHARS = 256

ID_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": _MAX_NAME_CHARS}
"""The JSON schema of what short_text takes."""


def tagged(kind: str, required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    """Return the JSON schema of an object of the type kind, with these fields' schemas."""
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, **required, **optional},
        "required": ["type", *required],
    }


def short_text(value: object, called: str, param: str) -> str:
    """Return a value that must be a short text, as names and ids are.

    called  what an error calls it; param is the field that it blames
    """
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME_CHARS:
        raise refuse(
            f"{called} is {shorten(value)}; it must be a string of 1 to {_MAX_NAME_CHARS} "
            "characters",
            param,
        )
    return value


def function_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return a call of an earlier turn as chat has it."""
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def function_tool(given: Mapping[str, Any], **renamed: Any) -> dict[str, Any]:
    """Return a tool as chat has it, from one whose fields have chat's names, or are renamed."""
    fields = ("name", "description", "parameters", "strict")
    function = {name: given[name] for name in fields if name in given}
    return {"type": "function", "function": function | renamed}


def check_tool_fields(
    tool: Mapping[str, Any], at: str, known: Parameters, unknown: list[str]
) -> None:
    """Refuse a tool's fields that ask for what isn't done, and put names not known into the list.

    known  what the API has in a tool
    """
    for name, value in tool.items():
        if name not in known:
            unknown.append(f"tools[].{name}")
        elif not known[name].works:
            known[name].check(f"{at}.{name}", value, tool)
