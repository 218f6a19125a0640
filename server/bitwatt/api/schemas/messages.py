"""/v1/messages, Anthropic's: what a caller sends."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, JsonValue, WithJsonSchema, model_validator

from bitwatt.api.schemas.chat import MAX_MESSAGES, ChatTemplateKwargs
from bitwatt.api.schemas.common import Body, Bounded, ModelName, SamplingBody, StopStrings
from bitwatt.api.schemas.parameters import (
    MESSAGES,
    MESSAGES_COUNT,
    OUTPUT_CONFIG,
    THINKING,
    refuse,
)
from bitwatt.api.schemas.structured import check_schema
from bitwatt.errors import shorten
from bitwatt.serving.sampling_params import check_max_tokens

__all__ = ["CountTokensBody", "MessagesBody", "OutputConfig", "Thinking"]

_BLOCK_FIELDS = {
    "text": frozenset({"type", "text", "cache_control", "citations"}),
    "thinking": frozenset({"type", "thinking", "signature"}),
}

_STRING_OR_BLOCKS: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}
Turns = Annotated[
    list[dict[str, Any]],
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": {
                "type": "object",
                "properties": {"role": {"const": "user"}, "content": _STRING_OR_BLOCKS},
                "required": ["role", "content"],
            },
        }
    ),
]
System = Annotated[str, WithJsonSchema(_STRING_OR_BLOCKS)]
OutputFormat = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
            "required": ["type", "schema"],
        }
    ),
]


class Thinking(Body):
    """Whether a model that reasons does so."""

    parameters: ClassVar = THINKING

    type: Literal["enabled", "disabled", "adaptive"] = Field(
        description="`enabled` and `disabled` are told to the template; `adaptive` leaves it be."
    )


class OutputConfig(Body):
    """What an answer must be."""

    parameters: ClassVar = OUTPUT_CONFIG

    format: OutputFormat | None = Field(
        None, description="`json_schema`, JSON by `schema`; any text unless given."
    )


def _settle(data: Any) -> Any:
    """Make chat's messages of the turns, and one text of the system's."""
    if not isinstance(data, dict):
        return data
    unknown: list[str] = []
    settled = dict(data)
    if isinstance(data.get("system"), list):
        settled["system"] = _text_of(data["system"], "system", unknown)["content"]
    if isinstance(data.get("messages"), list):
        settled["messages"] = _messages(data["messages"], unknown)
    return {**settled, **dict.fromkeys(unknown)}


_EXAMPLE: dict[str, JsonValue] = {
    "model": "builtin",
    "messages": [{"role": "user", "content": "What does textwrap.dedent do?"}],
}


class _Conversation:
    """What both routes have; a mixin, for one of them draws no tokens."""

    system: str | None
    messages: list[dict[str, Any]]
    thinking: Thinking | None
    chat_template_kwargs: dict[str, Any] | None

    def _as_chat(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        kind = None if self.thinking is None else self.thinking.type
        told = {"enabled": {"enable_thinking": True}, "disabled": {"enable_thinking": False}}
        kwargs = told.get(str(kind), {}) | (self.chat_template_kwargs or {})
        return {
            "messages": [*system, *self.messages],
            "chat_template_kwargs": kwargs or None,
        }


_TURNS = Field(
    min_length=1,
    max_length=MAX_MESSAGES,
    description="The conversation so far, which ends with the user: a beginning of the answer is "
    "not continued. Content is a string or blocks of `text`, and of `thinking` in earlier answers.",
)
_SYSTEM = Field(None, description="What the system says: a string or text blocks.")
_THINKING = Field(None, description="Whether a model that reasons does so.")
_KWARGS = Field(None, description="What the model's template may be told. As in vLLM.")


class MessagesBody(_Conversation, SamplingBody):
    """A request for the next message of a conversation."""

    model_config = ConfigDict(json_schema_extra={"example": {**_EXAMPLE, "max_tokens": 24}})
    parameters: ClassVar = MESSAGES
    nested: ClassVar[tuple[str, ...]] = ("thinking", "output_config")

    messages: Turns = _TURNS
    max_tokens: Annotated[int, Bounded("max_tokens", lowest=1)] = Field(
        description="Tokens of the answer at most."
    )
    system: System | None = _SYSTEM
    stop_sequences: StopStrings | None = Field(
        None, description="Strings that end the answer, as completions have them in `stop`."
    )
    thinking: Thinking | None = _THINKING
    output_config: OutputConfig | None = Field(None, description="What the answer must be.")
    chat_template_kwargs: ChatTemplateKwargs | None = _KWARGS

    _settle_turns = model_validator(mode="before")(_settle)

    def as_chat(self) -> dict[str, Any]:
        """Return the fields of the chat completion that asks for the same.

        Raises  InvalidRequestError where nothing is to be generated
        """
        check_max_tokens("max_tokens", self.max_tokens, None)
        form = None if self.output_config is None else self.output_config.format
        return {
            **self.sampling(),
            **self._as_chat(),
            "stop": self.stop_sequences,
            "max_completion_tokens": self.max_tokens,
            "response_format": form and _response_format(form),
        }


class CountTokensBody(_Conversation, Body):
    """A conversation whose tokens are to be counted."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})
    parameters: ClassVar = MESSAGES_COUNT
    nested: ClassVar[tuple[str, ...]] = ("thinking",)

    model: ModelName
    messages: Turns = _TURNS
    system: System | None = _SYSTEM
    thinking: Thinking | None = _THINKING
    chat_template_kwargs: ChatTemplateKwargs | None = _KWARGS

    _settle_turns = model_validator(mode="before")(_settle)

    def as_chat(self) -> dict[str, Any]:
        """Return the fields of the chat completion that has the same prompt."""
        return {"model": self.model, **self._as_chat()}


def _response_format(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return chat's word for the format."""
    if given.get("type") != "json_schema":
        return {"type": given.get("type")}
    check_schema("output_config.format", given.get("schema"))
    schema = {"name": "output", "schema": given.get("schema")}
    return {"type": "json_schema", "json_schema": schema}


def _messages(given: list[Any], unknown: list[str]) -> list[dict[str, Any]]:
    """Return chat's messages, and put the names of unknown fields into the list."""
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(given):
        at = f"messages[{index}]"
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ("user", "assistant", "system"):
            raise refuse(f"{at}.role is {shorten(role)}; it is user or assistant", at)
        unknown += [f"messages[].{name}" for name in turn if name not in ("role", "content")]
        content = turn.get("content")
        if isinstance(content, str):
            said: dict[str, Any] = {"content": content}
        else:
            said = _text_of(content, f"{at}.content", unknown)
        messages.append({"role": role, **said})
    if messages and messages[-1]["role"] == "assistant":
        raise refuse("messages end with the assistant's turn, which is not continued", "messages")
    return messages


def _text_of(blocks: Any, at: str, unknown: list[str]) -> dict[str, Any]:
    """Return what blocks say, whose texts become lines, and what was thought before."""
    if not isinstance(blocks, list):
        raise refuse(f"{at} must be a string or a list of blocks", at)
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "redacted_thinking":
            continue
        if not isinstance(kind, str) or kind not in texts:
            raise refuse(f"{at}: blocks of type {shorten(kind)} are not supported", at)
        if not isinstance(block.get(kind), str):
            raise refuse(f"{at}: a block of type {kind} has a string {kind}", at)
        place = "system[]" if at == "system" else "messages[].content[]"
        unknown += [f"{place}.{name}" for name in block if name not in _BLOCK_FIELDS[kind]]
        texts[kind].append(block[kind])
    said = {"content": "\n".join(texts["text"])}
    thought = "\n".join(texts["thinking"])
    return {**said, "reasoning_content": thought} if thought else said
