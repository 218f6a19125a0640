"""/v1/responses: what is answered, whole or as events."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from bitwatt.serving.usage import PromptTokensDetails, Usage
from bitwatt.telemetry.energy.ledger import RequestEnergy

__all__ = [
    "AnyResponseEvent",
    "ContentPartEvent",
    "IncompleteDetails",
    "ItemEvent",
    "OutputMessage",
    "OutputText",
    "ResponseError",
    "ResponseEvent",
    "ResponseObject",
    "ResponseText",
    "ResponseUsage",
    "TextDelta",
    "TextDone",
    "response_usage",
]

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(msgspec.Struct, frozen=True, kw_only=True):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = []
    logprobs: list[str] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What the model says."""

    type: Literal["message"] = "message"
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class InputTokensDetails(PromptTokensDetails, frozen=True, kw_only=True):
    """What the input's tokens were; none is billed for being written to the cache."""

    cache_write_tokens: int


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """What the output's tokens were."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a response cost, in tokens; `bitwatt` is an extension."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    bitwatt: RequestEnergy


def response_usage(usage: Usage) -> ResponseUsage:
    """Return the usage by the names that responses have."""
    cached = usage.prompt_tokens_details.cached_tokens
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=cached, cache_write_tokens=0),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(0),
        total_tokens=usage.total_tokens,
        bitwatt=usage.bitwatt,
    )


class ResponseError(msgspec.Struct, frozen=True):
    """Why a response failed."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response is not all that the model had to say."""

    reason: Literal["max_output_tokens"]


class ResponseText(msgspec.Struct, frozen=True):
    """What the text was to be."""

    format: dict[str, Any]


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """The response, as far as it has come."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | UnsetType = UNSET
    status: Status
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    reasoning: dict[str, str | None]
    store: Literal[False] = False
    temperature: float
    text: ResponseText
    tool_choice: str = "auto"
    tools: list[dict[str, Any]] = []
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str]


class _Event(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    sequence_number: int


class ResponseEvent(_Event, frozen=True, kw_only=True):
    """The response begins, or ends."""

    response: ResponseObject


class ItemEvent(_Event, frozen=True, kw_only=True):
    """An item of the output begins, or ends."""

    output_index: int
    item: OutputMessage


class _PartEvent(_Event, frozen=True, kw_only=True):
    item_id: str
    output_index: int
    content_index: int


class ContentPartEvent(_PartEvent, frozen=True, kw_only=True):
    """A part of a message begins, or ends."""

    part: OutputText


class TextDelta(_PartEvent, frozen=True, kw_only=True):
    """What is new of a text."""

    delta: str
    logprobs: list[str] = []
    obfuscation: str | UnsetType = UNSET


class TextDone(_PartEvent, frozen=True, kw_only=True):
    """The whole of a text."""

    text: str
    logprobs: list[str] = []


AnyResponseEvent = ResponseEvent | ItemEvent | ContentPartEvent | TextDelta | TextDone
