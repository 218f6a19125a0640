"""What /v1/responses takes as tools, put as chat has them."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import WithJsonSchema

from bitwatt.api.schemas.as_chat import check_tool_fields, function_tool
from bitwatt.api.schemas.parameters import RESPONSES_TOOL, refuse
from bitwatt.api.schemas.tools import MAX_TOOLS
from bitwatt.errors import shorten
from bitwatt.serving.tools import TOOL_NAME

__all__ = [
    "ResponsesToolChoice",
    "ResponsesTools",
    "chat_tool_choice",
    "chat_tools",
    "check_tools",
    "namespaced",
    "qualified",
]

_STRING = {"type": "string"}
_FUNCTION = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "name": {"type": "string", "pattern": TOOL_NAME},
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"]},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["type", "name"],
}
ResponsesTools = Annotated[
    list[dict[str, Any]],  # check_tools and chat's tool_use_of check them
    WithJsonSchema({"type": "array", "items": _FUNCTION, "maxItems": MAX_TOOLS}),
]
_NAMED = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": _STRING},
    "required": ["type", "name"],
}
ResponsesToolChoice = Annotated[
    Any,  # chat's tool_use_of checks it
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                _NAMED,
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "allowed_tools"},
                        "mode": {"enum": ["auto", "required"]},
                        "tools": {"type": "array", "items": _NAMED, "minItems": 1},
                    },
                    "required": ["type", "mode", "tools"],
                },
            ]
        }
    ),
]


def qualified(namespace: str, name: str) -> str:
    """Return the name under which the model knows a namespace's function."""
    return f"{namespace}.{name}"


def check_tools(tools: Any, unknown: list[str]) -> None:
    """Raise the error of a tool that isn't the caller's function, or a namespace of such.

    unknown  gets the names of fields that no API known here has
    """
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        at = f"tools[{index}]"
        is_namespace = isinstance(tool, dict) and tool.get("type") == "namespace"
        if not is_namespace:
            _check_function(tool, at, unknown)
            continue
        space, within = tool.get("name"), tool.get("tools")
        if not isinstance(space, str):
            raise refuse(f"{at}.name is {shorten(space)}; it must be a string", f"{at}.name")
        if not isinstance(within, list):
            raise refuse(f"{at}.tools is {shorten(within)}; it must be a list", f"{at}.tools")
        known = ("type", "name", "description", "tools")
        unknown += [f"tools[].{name}" for name in tool if name not in known]
        for number, function in enumerate(within):
            place = f"{at}.tools[{number}]"
            _check_function(function, place, unknown)
            name = function.get("name")
            if not isinstance(name, str) or not re.fullmatch(TOOL_NAME, qualified(space, name)):
                raise refuse(
                    f"{place}.name is {shorten(name)}; with its namespace before it, it has up to "
                    "64 letters, digits, _, - and .",
                    f"{place}.name",
                )


def chat_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return the functions as chat has them, None for none; a namespace's are qualified.

    Templates tell of functions alone, so what is said of a namespace begins its first function's
    description.
    """
    if not tools:
        return None
    functions: list[dict[str, Any]] = []
    for tool in tools:
        if tool["type"] != "namespace":
            functions.append(function_tool(tool))
            continue
        said = tool.get("description")
        for function in tool["tools"]:
            described = [text for text in (said, function.get("description")) if text is not None]
            said = None
            changes = {"name": qualified(tool["name"], function["name"])}
            if described:
                changes["description"] = "\n".join(map(str, described))
            functions.append(function_tool(function, **changes))
    return functions


def namespaced(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, dict[str, str]]:
    """Return what an item says of each function of a namespace, by its qualified name."""
    return {
        qualified(tool["name"], function["name"]): {
            "name": function["name"],
            "namespace": tool["name"],
        }
        for tool in tools or ()
        if tool["type"] == "namespace"
        for function in tool["tools"]
    }


def chat_tool_choice(choice: Any) -> Any:
    """Return chat's word for the choice; what isn't one as it is, for chat to refuse."""
    match choice:
        case {"type": "function", "name": name}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": mode, "tools": [*tools]}:
            named = [chat_tool_choice(tool) for tool in tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
        case _:
            return choice


def _check_function(tool: Any, at: str, unknown: list[str]) -> None:
    if not isinstance(tool, dict):
        raise refuse(f"{at} must be an object, not {shorten(tool)}", at)
    if tool.get("type") != "function":
        raise refuse(
            f"{at}.type is {shorten(tool.get('type'))}; function is supported, and a namespace of "
            "functions: the caller runs every tool",
            f"{at}.type",
        )
    check_tool_fields(tool, at, RESPONSES_TOOL, unknown)
