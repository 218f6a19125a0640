"""Tools as OpenAI's chat has them: what the model may call, and the calls of earlier turns."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema
from pydantic_core import from_json

from bitwatt.api.schemas.common import Body
from bitwatt.api.schemas.parameters import CALLED_FUNCTION, FUNCTION, TOOL, TOOL_CALL
from bitwatt.errors import InvalidRequestError, shorten
from bitwatt.serving.answers import Tool, ToolUse

__all__ = [
    "MAX_CALLS",
    "MAX_TOOLS",
    "TOOL_NAME",
    "CalledFunction",
    "ToolCallBody",
    "ToolChoice",
    "Tools",
    "template_tools",
    "tool_use_of",
    "unknown_in_tools",
]

MAX_TOOLS = 128
MAX_CALLS = 128
TOOL_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
_NAMED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
ToolChoice = Annotated[
    Any,  # tool_use_of checks it
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                _NAMED,
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "allowed_tools"},
                        "allowed_tools": {
                            "type": "object",
                            "properties": {
                                "mode": {"enum": ["auto", "required"]},
                                "tools": {"type": "array", "items": _NAMED, "minItems": 1},
                            },
                            "required": ["mode", "tools"],
                        },
                    },
                    "required": ["type", "allowed_tools"],
                },
            ]
        }
    ),
]


Tools = Annotated[
    list[dict[str, Any]],  # tool_use_of checks them
    Field(max_length=MAX_TOOLS),
    WithJsonSchema(
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string", "pattern": TOOL_NAME},
                            "description": {"type": ["string", "null"]},
                            "parameters": {"type": ["object", "null"]},
                            "strict": {"type": ["boolean", "null"]},
                        },
                        "required": ["name"],
                    },
                },
                "required": ["type", "function"],
            },
            "maxItems": MAX_TOOLS,
        }
    ),
]


class CalledFunction(Body):
    """A function that an assistant's earlier turn called."""

    parameters: ClassVar = CALLED_FUNCTION

    name: str = Field(min_length=1, max_length=256, description="Its name.")
    arguments: str = Field(description="Its arguments: an object in JSON.")


class ToolCallBody(Body):
    """A call of an assistant's earlier turn."""

    parameters: ClassVar = TOOL_CALL
    nested: ClassVar[tuple[str, ...]] = ("function",)

    id: str = Field(max_length=256, description="What the message with its result names.")
    type: Literal["function"] = Field("function", description="The kind of tool: there is one.")
    function: CalledFunction = Field(description="What was called.")

    def as_template_input(self) -> dict[str, Any]:
        """Return the call as templates know it: they put an object's members themselves."""
        arguments: Any = self.function.arguments
        try:
            parsed = from_json(arguments)  # no deeper than a body may be
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            arguments = parsed
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


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


def unknown_in_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Return the fields of tools that no API known here defines."""
    names: dict[str, None] = {}
    for tool in tools or ():
        names |= dict.fromkeys(f"tools[].{name}" for name in tool if name not in TOOL)
        function = tool.get("function")
        within = function if isinstance(function, Mapping) else {}
        names |= dict.fromkeys(
            f"tools[].function.{name}" for name in within if name not in FUNCTION
        )
    return list(names)


def _tool(given: Mapping[str, Any], at: str) -> Tool:
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
