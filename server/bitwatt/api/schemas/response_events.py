"""/v1/responses: what is answered, whole or as events."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from bitwatt.serving.usage import PromptTokensDetails, Took, Usage

__all__ = [
    "AnyResponseEvent",
    "ArgumentsDelta",
    "ArgumentsDone",
    "ContentPartEvent",
    "IncompleteDetails",
    "ItemEvent",
    "OutputCall",
    "OutputItem",
    "OutputMessage",
    "OutputReasoning",
    "OutputText",
    "ReasoningDelta",
    "ReasoningDone",
    "ReasoningText",
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
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, frozen=True, kw_only=True, tag="output_text"):
    """The text of a message."""

    text: str
    annotations: list[str] = []
    logprobs: list[str] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True, tag="message"):
    """What the model says."""

    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningText(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning_text"):
    """The text of reasoning."""

    text: str


class OutputReasoning(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning"):
    """What the model thought before; nobody sums it up."""

    id: str
    status: ItemStatus
    summary: list[str] = []
    content: list[ReasoningText]


class OutputCall(msgspec.Struct, frozen=True, kw_only=True, tag="function_call"):
    """A call of one of the caller's functions; arguments are JSON, unless they were cut."""

    id: str
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    arguments: str
    status: ItemStatus


OutputItem = OutputReasoning | OutputMessage | OutputCall


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
    bitwatt: Took


def response_usage(usage: Usage) -> ResponseUsage:
    """Return the usage by the names that responses have."""
    cached = usage.prompt_tokens_details.cached_tokens
    details = usage.completion_tokens_details
    num_reasoning = 0 if isinstance(details, UnsetType) else details.reasoning_tokens
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=cached, cache_write_tokens=0),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(num_reasoning),
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
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, str | None]
    store: Literal[False] = False
    temperature: float
    text: ResponseText
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
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
    item: OutputItem


class _ItemPartEvent(_Event, frozen=True, kw_only=True):
    item_id: str
    output_index: int


class _PartEvent(_ItemPartEvent, frozen=True, kw_only=True):
    content_index: int


class ContentPartEvent(_PartEvent, frozen=True, kw_only=True):
    """A part of a message or of reasoning begins, or ends."""

    part: OutputText | ReasoningText


class TextDelta(_PartEvent, frozen=True, kw_only=True):
    """What is new of a text."""

    delta: str
    logprobs: list[str] = []
    obfuscation: str | UnsetType = UNSET


class TextDone(_PartEvent, frozen=True, kw_only=True):
    """The whole of a text."""

    text: str
    logprobs: list[str] = []


class ReasoningDelta(_PartEvent, frozen=True, kw_only=True):
    """What is new of reasoning."""

    delta: str


class ReasoningDone(_PartEvent, frozen=True, kw_only=True):
    """The whole of reasoning."""

    text: str


class ArgumentsDelta(_ItemPartEvent, frozen=True, kw_only=True):
    """What is new of a call's arguments."""

    delta: str


class ArgumentsDone(_ItemPartEvent, frozen=True, kw_only=True):
    """The whole of a call's arguments."""

    arguments: str


AnyResponseEvent = (
    ResponseEvent
    | ItemEvent
    | ContentPartEvent
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
)
