"""/v1/responses: what a caller sends."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, WithJsonSchema, model_validator

from bitwatt.api.schemas.chat import MAX_MESSAGES, ChatTemplateKwargs
from bitwatt.api.schemas.common import Body, Bounded, SamplingBody, StopStrings, needs
from bitwatt.api.schemas.parameters import (
    REASONING,
    RESPONSES,
    RESPONSES_STREAM_OPTIONS,
    TEXT,
    refuse,
)
from bitwatt.api.schemas.structured import check_schema
from bitwatt.errors import shorten
from bitwatt.serving.sampling_params import check_max_tokens

__all__ = ["Reasoning", "ResponsesBody", "ResponsesStreamOptions", "TextConfig"]

_ROLES = ("user", "assistant", "system", "developer")
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Where each type of content part has its text."""

_SYSTEM = ("system", "developer")
_MAX_PAIRS = 16

Input = Annotated[
    list[dict[str, Any]],
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MAX_MESSAGES,
                    "items": {
                        "type": "object",
                        "properties": {
                            "type": {"const": "message"},
                            "role": {"enum": list(_ROLES)},
                            "content": {"type": "string"},
                        },
                        "required": ["role", "content"],
                    },
                },
            ]
        }
    ),
]
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
        description="`none` has the template turn reasoning off, where it can; the model decides "
        "between all others.",
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
        "or parts of text, and of earlier answers' items."
    )
    instructions: str | None = Field(
        None, description="What the system says, before all of `input`."
    )
    max_output_tokens: Annotated[int, Bounded("max_tokens", lowest=1)] | None = Field(
        None, description="Tokens of the answer at most; all that the context has room for."
    )
    text: TextConfig | None = Field(None, description="What the answer's text must be.")
    reasoning: Reasoning | None = Field(None, description="How a model that reasons does so.")
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

    @model_validator(mode="before")
    @classmethod
    def _settle_input(cls, data: Any) -> Any:
        """Make chat's messages of the input."""
        if not isinstance(data, dict) or "input" not in data:
            return data
        unknown: list[str] = []
        messages = _messages(data["input"], unknown)
        return {**data, "input": messages, **dict.fromkeys(unknown)}

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "ResponsesBody":
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options needs stream: true", "stream_options")
        return self

    def as_chat(self) -> dict[str, Any]:
        """Return the fields of the chat completion that asks for the same.

        Raises  InvalidRequestError where nothing is to be generated
        """
        check_max_tokens("max_output_tokens", self.max_output_tokens, None)
        messages = list(self.input)
        if self.instructions:
            told = [self.instructions]
            while messages and messages[0]["role"] in _SYSTEM:
                told.append(messages.pop(0)["content"])  # many templates take one system turn
            messages.insert(0, {"role": "system", "content": "\n\n".join(told)})
        effort = None if self.reasoning is None else self.reasoning.effort
        thinking = {"enable_thinking": False} if effort == "none" else {}
        kwargs = thinking | (self.chat_template_kwargs or {})
        return {
            **self.sampling(),
            "messages": messages,
            "stop": self.stop,
            "max_completion_tokens": self.max_output_tokens,
            "response_format": _response_format(None if self.text is None else self.text.format),
            "chat_template_kwargs": kwargs or None,
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


def _messages(given: Any, unknown: list[str]) -> list[dict[str, Any]]:
    """Return chat's messages, and put the names of unknown fields into the list."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise refuse("input must be a string or a list of at least one item", "input")
    if len(given) > MAX_MESSAGES:
        raise refuse(f"input has {len(given)} items; the limit is {MAX_MESSAGES}", "input")
    messages: list[dict[str, Any]] = []
    reasoning = ""
    for index, item in enumerate(given):
        at = f"input[{index}]"
        if not isinstance(item, dict):
            raise refuse(f"{at} must be an object, not {shorten(item)}", at)
        match item.get("type", "message"):
            case "message":
                message = _message(item, at, unknown)
                if reasoning and message["role"] == "assistant":
                    message["reasoning_content"], reasoning = reasoning, ""
                messages.append(message)
            case "reasoning":
                reasoning = _text(item.get("content") or item.get("summary") or [], at, unknown)
            case kind:
                raise refuse(f"{at}: items of type {shorten(kind)} are not supported", at)
    if not messages:
        raise refuse("input has no message", "input")
    return messages


_MESSAGE_FIELDS = frozenset({"type", "role", "content", "id", "status", "phase"})
_PART_FIELDS = frozenset(
    {"type", "text", "refusal", "annotations", "logprobs", "prompt_cache_breakpoint"}
)


def _message(item: Mapping[str, Any], at: str, unknown: list[str]) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        raise refuse(f"{at}.role is {shorten(role)}; it is one of {', '.join(_ROLES)}", at)
    unknown += [f"input[].{name}" for name in item if name not in _MESSAGE_FIELDS]
    content = item.get("content")
    if not isinstance(content, str):
        content = _text(content, f"{at}.content", unknown)
    return {"role": role, "content": content}


def _text(parts: Any, at: str, unknown: list[str]) -> str:
    """Return the text of parts, which become lines."""
    if not isinstance(parts, list):
        raise refuse(f"{at} must be a string or a list of text parts", at)
    lines: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        name = {**_PARTS, "reasoning_text": "text", "summary_text": "text"}.get(str(kind))
        if name is None:
            raise refuse(f"{at}: parts of type {shorten(kind)} are not supported; only text is", at)
        if not isinstance(part.get(name), str):
            raise refuse(f"{at}: a part of type {kind} has a string {name}", at)
        unknown += [f"input[].content[].{field}" for field in part if field not in _PART_FIELDS]
        lines.append(part[name])
    return "\n".join(lines)
