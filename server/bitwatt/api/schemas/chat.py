"""/v1/chat/completions."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import ConfigDict, Field, WithJsonSchema, model_validator

from bitwatt.api.schemas.common import (
    Body,
    Bounded,
    GenerationBody,
    PromptLogprob,
    excludes,
    needs,
    zero_needs,
)
from bitwatt.api.schemas.parameters import CHAT, CONTENT_PART, MESSAGE, refuse
from bitwatt.errors import shorten
from bitwatt.serving.choice import FinishReasonName
from bitwatt.serving.sampling_params import BOUNDS, SamplingParams, check_max_tokens
from bitwatt.serving.usage import Usage
from bitwatt.text.chat_template import ALLOWED_KWARGS

__all__ = [
    "ChatBody",
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatDelta",
    "ChatLogprobs",
    "ChatMessage",
    "ChatTokenLogprob",
    "ChatTopLogprob",
    "Message",
]

MAX_MESSAGES = 1024


_PARTS = ("text", "refusal")
"""The types of content parts, each of which has its text in a field of the same name."""


def _read_part(part: Any, unknown: list[str]) -> str:
    """Return the part's text, and put the names of its unknown fields into the list."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _PARTS:
        raise refuse(
            f"content parts of type {shorten(kind)} are not supported; only text is", "content"
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise refuse(f"a content part of type {kind} has a string {kind}", "content")
    unknown += [f"content[].{name}" for name in part if name not in CONTENT_PART]
    return text


Content = Annotated[
    str,
    WithJsonSchema(
        {
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
    ),
]
ChatTemplateKwargs = Annotated[
    dict[str, bool],  # TextCodec checks it
    WithJsonSchema(
        {
            "type": "object",
            "properties": {name: {"type": "boolean"} for name in sorted(ALLOWED_KWARGS)},
            "additionalProperties": False,
        }
    ),
]


class Message(Body):
    """A turn of the conversation."""

    parameters: ClassVar = MESSAGE

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="Who speaks. A developer speaks as the system; tools are not supported."
    )
    content: Content = Field(
        description="What is said: a string, or a list of text parts, which become its lines. May "
        "be null beside a `refusal`."
    )
    refusal: str | None = Field(
        None, description="What an assistant's earlier turn said instead of content."
    )
    reasoning_content: str | None = Field(
        None,
        description="What an assistant's earlier turn was reasoned by, for templates that use it. "
        "As in vLLM.",
    )
    reasoning: str | None = Field(None, description="The same, under vLLM's newer name.")
    name: str | None = Field(
        None, max_length=256, description="The speaker's name, for templates that use it."
    )

    @model_validator(mode="before")
    @classmethod
    def _settle_content(cls, data: Any) -> Any:
        """Make one text of content: parts are lines of it, and so is a refusal."""
        if not isinstance(data, dict):
            return data
        content, refusal = data.get("content"), data.get("refusal")
        unknown: list[str] = []
        if isinstance(content, list):
            content = "\n".join([_read_part(part, unknown) for part in content])
        elif content is not None and not isinstance(content, str):
            raise refuse("content must be a string or a list of text parts", "content")
        if isinstance(refusal, str) and refusal:
            content = f"{content}\n{refusal}" if content else refusal
        if content is data.get("content"):
            return data
        return {**data, "content": content, **dict.fromkeys(unknown)}

    def as_template_input(self) -> dict[str, str]:
        """Return the message as templates know it."""
        reasoning = self.reasoning_content if self.reasoning is None else self.reasoning
        given = {"name": self.name, "reasoning_content": reasoning, "reasoning": reasoning}
        known = {name: value for name, value in given.items() if value is not None}
        return {"role": self.role, "content": self.content, **known}


class ChatBody(GenerationBody):
    """A request to continue a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                needs("stream_options", "stream"),
                needs("top_logprobs", "logprobs"),
                excludes("max_tokens", "max_completion_tokens"),
                excludes("stream", "prompt_logprobs"),
                zero_needs("max_tokens", "prompt_logprobs"),
                zero_needs("max_completion_tokens", "prompt_logprobs"),
            ],
            "example": {
                "model": "builtin",
                "messages": [{"role": "user", "content": "What does textwrap.dedent do?"}],
                "max_completion_tokens": 24,
                "temperature": 0,
            },
        }
    )
    parameters: ClassVar = CHAT
    nested: ClassVar[tuple[str, ...]] = (*GenerationBody.nested, "messages")

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The conversation so far, in order."
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Adds what the tokenizer puts around a text, beside what the model's template "
        "puts there. As in vLLM.",
    )
    chat_template_kwargs: ChatTemplateKwargs | None = Field(
        None,
        description="What the model's template may be told: `enable_thinking`, `thinking`. vLLM "
        "passes anything on.",
    )
    max_tokens: Annotated[int, Bounded("max_tokens")] | None = Field(
        None, description="The same as `max_completion_tokens`, under its former name."
    )
    max_completion_tokens: Annotated[int, Bounded("max_tokens")] | None = Field(
        None,
        description="Tokens of each choice at most; all that the context has room for unless "
        "given; 0 with `prompt_logprobs` alone.",
    )
    logprobs: bool | None = Field(
        None, description="Returns the natural-log probability of each token of the answer."
    )
    top_logprobs: Annotated[int, Bounded("logprobs")] | None = Field(
        None, description="Likeliest tokens to return at each position; needs `logprobs`."
    )

    @model_validator(mode="after")
    def _settle(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise refuse("top_logprobs needs logprobs: true", "top_logprobs")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise refuse("max_tokens and max_completion_tokens differ", "max_completion_tokens")
        return self

    @property
    def max_tokens_param(self) -> str:
        """The field that limits each choice's tokens, under the name that was used."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def sampling_params(self) -> SamplingParams:
        """Return what is asked; raises InvalidRequestError beyond a limit."""
        for name, bounds in (("max_completion_tokens", "max_tokens"), ("top_logprobs", "logprobs")):
            if (value := getattr(self, name)) is not None:
                BOUNDS[bounds].check(name, value)
        max_tokens = getattr(self, self.max_tokens_param)
        check_max_tokens(self.max_tokens_param, max_tokens, self.prompt_logprobs)
        return self._sampling_params(
            max_tokens=max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )


class ChatTopLogprob(msgspec.Struct, frozen=True):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """A token that was drawn."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """One entry a token of the text."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReasonName


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The response."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is new of the model's turn."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReasonName | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk of the streamed response."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    obfuscation: str | UnsetType = UNSET
