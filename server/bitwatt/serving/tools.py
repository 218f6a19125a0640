"""Tools as OpenAI's chat has them: what may be called, and how templates know of it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from bitwatt.errors import InvalidRequestError, shorten
from bitwatt.serving.answers import Tool, ToolUse

__all__ = ["TOOL_NAME", "template_call", "template_tools", "tool_use_of"]

TOOL_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


def tool_use_of(
    tools: Sequence[Mapping[str, Any]] | None, choice: Any, is_parallel: bool | None
) -> ToolUse | None:
    """Return what tools, tool_choice and parallel_tool_calls ask for, None for no call.

    Raises  InvalidRequestError
    """
    given = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools or ())]
    names = [tool.name for tool in given]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise InvalidRequestError(f"tools has {shorten(twice)} twice", param="tools")
    mode, allowed = _choice(choice)
    unknown = next((name for name in allowed or () if name not in names), None)
    if unknown is not None:
        raise _refusal(f"names {shorten(unknown)}, which is none of the tools")
    if mode in ("required", "named") and not given:
        raise _refusal(f"is {shorten(choice)} without tools")
    if mode == "none" or not given:
        return None
    return ToolUse(
        tools=[
            tool for tool in given if mode == "named" or allowed is None or tool.name in allowed
        ],
        must_call=mode != "auto",
        only=allowed[0] if mode == "named" and allowed else None,
        is_parallel=is_parallel is not False,
    )


def template_tools(
    tools: Sequence[Mapping[str, Any]] | None, use: ToolUse | None
) -> list[dict[str, Any]] | None:
    """Return those tools of the body that are used, as templates know them."""
    if use is None or not tools:
        return None
    used = {tool.name for tool in use.tools}
    told = ("name", "description", "parameters")
    functions = [tool["function"] for tool in tools if tool["function"]["name"] in used]
    return [
        {
            "type": "function",
            "function": {
                "parameters": {"type": "object", "properties": {}},
                **{name: given[name] for name in told if given.get(name) is not None},
            },
        }
        for given in functions
    ]


def template_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return a call of an earlier turn as templates know it.

    arguments  JSON, of which templates put an object's members themselves; any other text as it is
    """
    put: Any = arguments
    try:
        parsed = from_json(arguments)  # no deeper than a body may be
    except ValueError:
        parsed = None
    if isinstance(parsed, dict):
        put = parsed
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": put}}


def _tool(given: object, at: str) -> Tool:
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"{at} must be an object, not {shorten(given)}", param=at)
    if given.get("type") != "function":
        raise InvalidRequestError(
            f"{at}.type is {shorten(given.get('type'))}; function is supported",
            param=f"{at}.type",
        )
    function = given.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequestError(f"{at}.function must be an object", param=f"{at}.function")
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(TOOL_NAME, name):
        raise InvalidRequestError(
            f"{at}.function.name is {shorten(name)}; it has 1 to 64 letters, digits, _, - and .",
            param=f"{at}.function.name",
        )
    for field, kind, words in _FIELDS:
        if not isinstance(function.get(field), kind):
            raise InvalidRequestError(
                f"{at}.function.{field} is {shorten(function[field])}; it must be {words}",
                param=f"{at}.function.{field}",
            )
    return Tool(
        name=name,
        parameters=function.get("parameters"),
        is_strict=bool(function.get("strict")),
    )


_FIELDS: tuple[tuple[str, Any, str], ...] = (
    ("description", str | None, "a string"),
    ("parameters", Mapping | None, "a JSON schema, an object"),
    ("strict", bool | None, "true or false"),
)


def _choice(choice: Any) -> tuple[str, list[str] | None]:
    """Return the mode of a tool_choice, and the names of the tools that it allows, None for all."""
    if choice is None or choice in ("none", "auto", "required"):
        return choice or "auto", None
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "function" and (name := _named(choice)) is not None:
        return "named", [name]
    if kind == "allowed_tools" and isinstance(within := choice.get("allowed_tools"), Mapping):
        listed, mode = within.get("tools"), within.get("mode")
        names = [_named(tool) for tool in listed] if isinstance(listed, list) else []
        if names and None not in names and mode in ("auto", "required"):
            return mode, [name for name in names if name is not None]
    raise _refusal(
        f"is {shorten(choice)}; it is none, auto, required, an object that names a function, or "
        "one of allowed_tools"
    )


def _named(tool: Any) -> str | None:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _refusal(told: str) -> InvalidRequestError:
    return InvalidRequestError(f"tool_choice {told}", param="tool_choice")
