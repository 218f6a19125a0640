"""/v1/chat/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from bitwatt.api.schemas.common import Body, GenerationBody, bounded, refuse
from bitwatt.errors import shorten
from bitwatt.serving.choice import FinishReasonName
from bitwatt.serving.sampling_params import BOUNDS, SamplingParams
from bitwatt.serving.usage import Usage

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


def _settle_content(value: Any) -> Any:
    """Return the content's text; parts of text are lines of it."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refuse("content must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise refuse(f"content parts of type {shorten(kind)} are not supported; only text is")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise refuse("a text part has a type, a text and nothing else")
        texts.append(part["text"])
    return "\n".join(texts)


Content = Annotated[
    str,
    BeforeValidator(_settle_content),
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


class Message(Body):
    """A turn of the conversation."""

    unsupported: ClassVar = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "reasoning": ("",),
        "reasoning_content": ("",),
        "refusal": ("",),
        "tool_call_id": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="Who speaks. A developer speaks as the system; tools are not supported."
    )
    content: Content = Field(
        description="What is said: a string, or a list of text parts, which become its lines."
    )
    name: str | None = Field(
        None, max_length=256, description="The speaker's name, for templates that use it."
    )

    def as_template_input(self) -> dict[str, str]:
        """Return the message as templates know it."""
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": self.content, **named}


class ChatBody(GenerationBody):
    """A request to continue a conversation."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationBody.unsupported,
        "add_generation_prompt": (True,),
        "audio": (),
        "chat_template": (),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": ("none",),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The conversation so far, in order."
    )
    chat_template_kwargs: dict[str, bool] | None = Field(
        None,
        description="What the model's template may be told: `enable_thinking`, `thinking`. vLLM "
        "passes anything on.",
    )
    max_tokens: Annotated[int, bounded("integer", "max_tokens")] | None = Field(
        None, description="The same as `max_completion_tokens`, under its former name."
    )
    max_completion_tokens: Annotated[int, bounded("integer", "max_tokens")] | None = Field(
        None,
        description="Tokens of each choice at most; all that the context has room for unless "
        "given.",
    )
    logprobs: bool | None = Field(
        None, description="Returns the natural-log probability of each token of the answer."
    )
    top_logprobs: Annotated[int, bounded("integer", "logprobs")] | None = Field(
        None, description="Likeliest tokens to return at each position; needs `logprobs`."
    )

    @model_validator(mode="after")
    def _settle(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs needs logprobs: true", "top_logprobs")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise refuse("max_tokens and max_completion_tokens differ", "max_completion_tokens")
        return self

    def sampling_params(self) -> SamplingParams:
        """Return what is asked; raises InvalidRequestError beyond a limit."""
        for name, bounds in (("max_completion_tokens", "max_tokens"), ("top_logprobs", "logprobs")):
            if (value := getattr(self, name)) is not None:
                BOUNDS[bounds].check(name, value)
        return self._sampling_params(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
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
    """One entry a token."""

    content: list[ChatTokenLogprob]


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
