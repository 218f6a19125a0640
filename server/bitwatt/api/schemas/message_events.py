"""/v1/messages, Anthropic's: what is answered, whole or as events."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from bitwatt.serving.usage import Took, Usage

__all__ = [
    "AnthropicMessage",
    "AnthropicUsage",
    "Block",
    "BlockDelta",
    "BlockStart",
    "BlockStop",
    "JsonPiece",
    "MessageDelta",
    "MessageEnd",
    "MessageEvent",
    "MessageStart",
    "MessageStop",
    "Ping",
    "SignaturePiece",
    "StopReason",
    "TextBlock",
    "TextPiece",
    "ThinkingBlock",
    "ThinkingPiece",
    "TokensCount",
    "ToolUseBlock",
    "anthropic_usage",
]

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """What the model says."""

    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, kw_only=True, tag="thinking"):
    """What the model thought before."""

    thinking: str
    signature: str


class ToolUseBlock(msgspec.Struct, frozen=True, kw_only=True, tag="tool_use"):
    """A call of one of the caller's tools."""

    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock


class AnthropicTokensDetails(msgspec.Struct, frozen=True):
    """What the output's tokens were."""

    thinking_tokens: int


class AnthropicUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a message cost, in tokens; `bitwatt` is an extension.

    input_tokens  those that the prefix cache did not have
    """

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: AnthropicTokensDetails | UnsetType = UNSET
    bitwatt: Took


def anthropic_usage(usage: Usage) -> AnthropicUsage:
    """Return the usage as Anthropic counts it."""
    cached = usage.prompt_tokens_details.cached_tokens
    details = usage.completion_tokens_details
    return AnthropicUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
        output_tokens_details=UNSET
        if isinstance(details, UnsetType)
        else AnthropicTokensDetails(details.reasoning_tokens),
        bitwatt=usage.bitwatt,
    )


class AnthropicMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The model's turn."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage


class TokensCount(msgspec.Struct, frozen=True):
    """How many tokens a conversation has."""

    input_tokens: int


class MessageStart(msgspec.Struct, frozen=True, tag="message_start"):
    """The message begins."""

    message: AnthropicMessage


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Nothing but a sign of life."""


class BlockStart(msgspec.Struct, frozen=True, tag="content_block_start"):
    """A block of the message begins."""

    index: int
    content_block: Block


class TextPiece(msgspec.Struct, frozen=True, tag="text_delta"):
    """What is new of a text."""

    text: str


class ThinkingPiece(msgspec.Struct, frozen=True, tag="thinking_delta"):
    """What is new of thinking."""

    thinking: str


class SignaturePiece(msgspec.Struct, frozen=True, tag="signature_delta"):
    """The signature of a thinking block, which ends it."""

    signature: str


class JsonPiece(msgspec.Struct, frozen=True, tag="input_json_delta"):
    """What is new of a call's input."""

    partial_json: str


Piece = TextPiece | ThinkingPiece | SignaturePiece | JsonPiece


class BlockDelta(msgspec.Struct, frozen=True, tag="content_block_delta"):
    """What is new of a block."""

    index: int
    delta: Piece


class BlockStop(msgspec.Struct, frozen=True, tag="content_block_stop"):
    """A block is whole."""

    index: int


class MessageEnd(msgspec.Struct, frozen=True):
    """Why the message ended."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, frozen=True, tag="message_delta"):
    """The message has come to its end."""

    delta: MessageEnd
    usage: AnthropicUsage


class MessageStop(msgspec.Struct, frozen=True, tag="message_stop"):
    """The stream has come to its end."""


MessageEvent = (
    MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
)
