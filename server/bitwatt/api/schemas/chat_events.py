"""/v1/chat/completions: what comes back, whole and streamed."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from bitwatt.api.schemas.common import PromptLogprob
from bitwatt.serving.choice import ChatFinishReason
from bitwatt.serving.usage import Usage

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatDelta",
    "ChatFunction",
    "ChatLogprobs",
    "ChatMessage",
    "ChatTokenLogprob",
    "ChatToolCall",
    "ChatTopLogprob",
]


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


class ChatFunction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A function that is called, or what is new of it; arguments are JSON."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ChatToolCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool call; a stream has its index, and the rest with its first delta alone."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: ChatFunction


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The model's turn; content is null where it only calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ChatToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason


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
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ChatToolCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk of the streamed response."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    obfuscation: str | UnsetType = UNSET
