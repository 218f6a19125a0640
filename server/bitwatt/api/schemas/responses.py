"""/v1/responses: what a caller sends."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from bitwatt.api.schemas.chat import ChatTemplateKwargs
from bitwatt.api.schemas.common import Body, Bounded, SamplingBody, StopStrings, needs
from bitwatt.api.schemas.parameters import (
    REASONING,
    RESPONSES,
    RESPONSES_STREAM_OPTIONS,
    TEXT,
    refuse,
)
from bitwatt.api.schemas.response_input import (
    Find,
    Input,
    chat_messages,
    has_references,
)
from bitwatt.api.schemas.response_tools import (
    ResponsesToolChoice,
    ResponsesTools,
    chat_tool_choice,
    chat_tools,
    check_tools,
)
from bitwatt.api.schemas.tools import MAX_TOOLS
from bitwatt.errors import InvalidRequestError
from bitwatt.serving.response_format import check_schema
from bitwatt.serving.sampling_params import check_max_tokens

__all__ = ["Reasoning", "ResponsesBody", "ResponsesStreamOptions", "TextConfig"]

_SOME_ITEM: dict[str, Any] = {"type": "message", "role": "assistant", "content": ""}
_SYSTEM = ("system", "developer")
_MAX_PAIRS = 16

TextFormat = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"type": {"enum": ["text", "json_object"]}},
                    "required": ["type"],
                },
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "json_schema"},
                        "name": {"type": "string"},
                        "schema": {"type": "object"},
                        "strict": {"type": ["boolean", "null"]},
                    },
                    "required": ["type", "name", "schema"],
                },
            ]
        }
    ),
]
_FORMAT_FIELDS = frozenset({"type", "name", "description", "schema", "strict"})


class ResponsesStreamOptions(Body):
    """How a stream is sent."""

    parameters: ClassVar = RESPONSES_STREAM_OPTIONS

    include_obfuscation: bool | None = Field(
        None,
        description="Pads each piece of text, in a field `obfuscation`, so that its size says "
        "little. OpenAI does so unless told not to.",
    )


class TextConfig(Body):
    """What the text of an answer must be."""

    parameters: ClassVar = TEXT

    format: TextFormat | None = Field(
        None,
        description="`text`, the default; `json_object`, any JSON object; `json_schema`, JSON by "
        "`schema`, strict or not.",
    )

    @property
    def unknown_fields(self) -> list[str]:
        """Those within format besides."""
        within = [f"format.{name}" for name in self.format or () if name not in _FORMAT_FIELDS]
        return [*super().unknown_fields, *within]


class Reasoning(Body):
    """How a model that reasons does so."""

    parameters: ClassVar = REASONING

    effort: str | None = Field(
        None,
        max_length=64,
        description="`none` has the template turn reasoning off, where it can; others turn it on, "
        "and are put to the template as chat's `reasoning_effort`.",
    )


class ResponsesBody(SamplingBody):
    """A request to answer, which has the whole conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [needs("stream_options", "stream")],
            "example": {
                "model": "builtin",
                "input": "What does textwrap.dedent do?",
                "max_output_tokens": 24,
                "temperature": 0,
            },
        }
    )
    parameters: ClassVar = RESPONSES
    nested: ClassVar[tuple[str, ...]] = ("text", "reasoning", "stream_options")

    input: Input = Field(
        description="The conversation: a text, or a list of messages, whose content is a string "
        "or parts of text, of earlier answers' items, and of what their calls brought."
    )
    instructions: str | None = Field(
        None, description="What the system says, before all of `input`."
    )
    max_output_tokens: Annotated[int, Bounded("max_tokens", lowest=1)] | None = Field(
        None, description="Tokens of the answer at most; all that the context has room for."
    )
    text: TextConfig | None = Field(None, description="What the answer's text must be.")
    reasoning: Reasoning | None = Field(None, description="How a model that reasons does so.")
    tools: ResponsesTools | None = Field(
        None,
        max_length=MAX_TOOLS,
        description="Up to 128 functions that the model may call, each with a `name`, a "
        "`description`, `parameters`, a JSON schema, and `strict`, false unless given.",
    )
    tool_choice: ResponsesToolChoice | None = Field(
        None,
        description="`none`, `auto`, `required`, an object that names a function, or "
        "`allowed_tools`, as chat completions have them.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether an answer may have several calls, unless false."
    )
    metadata: dict[str, str] | None = Field(
        None, max_length=_MAX_PAIRS, description="Comes back with the response."
    )
    stop: StopStrings | None = Field(
        None, description="Strings that end the answer, as completions have them. As in vLLM."
    )
    chat_template_kwargs: ChatTemplateKwargs | None = Field(
        None, description="What the model's template may be told. As in vLLM."
    )
    stream_options: ResponsesStreamOptions | None = Field(
        None, description="How a stream is sent; needs `stream`."
    )

    @property
    def is_forgotten(self) -> bool:
        """Whether nothing of the response is to be kept."""
        return (self.model_extra or {}).get("store") is False

    @model_validator(mode="before")
    @classmethod
    def _settle_input(cls, data: Any) -> Any:
        """Make chat's messages of the input, and look at the tools."""
        if not isinstance(data, dict):
            return data
        unknown: list[str] = []
        check_tools(data.get("tools"), unknown)
        if "input" in data:
            messages = chat_messages(data["input"], unknown, lambda _: _SOME_ITEM)
            if not has_references(data["input"]):  # which only as_chat can resolve
                data = data | {"input": messages}
        return {**data, **dict.fromkeys(unknown)}

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "ResponsesBody":
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options needs stream: true", "stream_options")
        return self

    def as_chat(self, find: Find) -> dict[str, Any]:
        """Return the fields of the chat completion that asks for the same.

        find  an item of an earlier response

        Raises  InvalidRequestError where nothing is to be generated, or an item isn't kept
        """
        check_max_tokens("max_output_tokens", self.max_output_tokens, None)
        messages = list(self.input)
        if has_references(messages):
            try:
                messages = chat_messages(messages, [], find)
            except PydanticCustomError as error:
                at = (error.context or {}).get("param")
                raise InvalidRequestError(error.message(), param=at) from None
        if self.instructions:
            told = [self.instructions]
            while messages and messages[0]["role"] in _SYSTEM:
                told.append(messages.pop(0)["content"])  # many templates take one system turn
            messages.insert(0, {"role": "system", "content": "\n\n".join(told)})
        return {
            **self.sampling(),
            "messages": messages,
            "stop": self.stop,
            "max_completion_tokens": self.max_output_tokens,
            "response_format": _response_format(None if self.text is None else self.text.format),
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
            "chat_template_kwargs": self.chat_template_kwargs,
            "tools": chat_tools(self.tools),
            "tool_choice": chat_tool_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
        }


def _response_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return chat's word for the format, which has a schema one level deeper."""
    if given is None:
        return None
    kind = given.get("type")
    if kind != "json_schema":
        return {"type": kind}
    check_schema("text.format", given.get("schema"))
    return {"type": kind, "json_schema": {n: v for n, v in given.items() if n != "type"}}
