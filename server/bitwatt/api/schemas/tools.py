"""Tools as OpenAI's chat has them: what the model may call, and the calls of earlier turns."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema

from bitwatt.api.schemas.common import Body
from bitwatt.api.schemas.parameters import CALLED_FUNCTION, FUNCTION, TOOL, TOOL_CALL
from bitwatt.serving.tools import TOOL_NAME, template_call

__all__ = [
    "MAX_CALLS",
    "MAX_TOOLS",
    "CalledFunction",
    "ToolCallBody",
    "ToolChoice",
    "Tools",
    "unknown_in_tools",
]

MAX_TOOLS = 128
MAX_CALLS = 128
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
        return template_call(self.id, self.function.name, self.function.arguments)


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
