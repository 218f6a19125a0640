"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients know them."""

from secrets import token_hex

from fastapi import APIRouter, Request, Response

from bitwatt.api.answering import Answering, Chunks, ResponseHead
from bitwatt.api.chat_requests import as_chat, as_chat_body
from bitwatt.api.client_link import tied_to_client
from bitwatt.api.dependencies import Models, SettingsOf, name_ignored_fields
from bitwatt.api.errors import describe
from bitwatt.api.json_route import JsonRoute, json_response
from bitwatt.api.schemas.message_events import (
    AnthropicMessage,
    BlockDelta,
    BlockStart,
    BlockStop,
    MessageDelta,
    MessageEnd,
    MessageEvent,
    MessageStart,
    MessageStop,
    Ping,
    StopReason,
    TextBlock,
    TextPiece,
    TokensCount,
    anthropic_usage,
)
from bitwatt.api.schemas.messages import CountTokensBody, MessagesBody
from bitwatt.api.sse import named_event
from bitwatt.serving.choice import Delta
from bitwatt.serving.generation import Generation
from bitwatt.serving.usage import Usage
from bitwatt.telemetry.logs import current_request_id

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)

_NAMES = {
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}


@router.post("/v1/messages")
async def create_message(body: MessagesBody, answering: Answering) -> Response:
    """Give the next message of the conversation."""
    asked, posted = as_chat(
        body.as_chat(),
        _NAMES,
        request_id=f"msg_{token_hex(12)}",
        key_salt=answering.key_salt,
    )

    async def new_writer(generation: Generation, head: ResponseHead, _: Chunks) -> _Writer:
        return _Writer(generation, head)

    return await answering(body, asked, new_writer, posted=posted)


@router.post("/v1/messages/count_tokens")
async def count_tokens(
    body: CountTokensBody, request: Request, models: Models, settings: SettingsOf
) -> Response:
    """Return how many tokens the conversation has, as the model's template puts it."""
    headers = name_ignored_fields(request, body)
    model = models.find(body.model)
    chat = as_chat_body(body.as_chat(), _NAMES)
    async with tied_to_client(request.receive, timeout_s=settings.request_timeout):
        token_ids = await model.text.encode_chat(
            [message.as_template_input() for message in chat.messages],
            kwargs=chat.chat_template_kwargs,
        )
    return json_response(TokensCount(len(token_ids)), headers=headers)


class _Writer:
    """Puts a generation as Anthropic's messages are: blocks, in events that open and close them."""

    def __init__(self, generation: Generation, head: ResponseHead) -> None:
        self._generation = generation
        self._head = head
        self._has_begun = False
        self._has_block = False
        self._end = MessageEnd(None, None)

    async def take_prompt(self, index: int) -> None:
        """Do nothing: no prompt is scored here."""

    def whole(self, choices: list[Delta]) -> AnthropicMessage:
        [delta] = choices
        content = [TextBlock(text=delta.text)] if delta.text else []
        return self._message(content, _end_of(delta), self._generation.usage)

    def events(self, delta: Delta) -> bytes:
        events: list[MessageEvent] = []
        if not self._has_begun:
            self._has_begun = True
            opening = self._generation.usage_of(delta.index, is_opening=True)
            events += [MessageStart(self._message([], self._end, opening)), Ping()]
        if delta.text:
            if not self._has_block:
                self._has_block = True
                events.append(BlockStart(0, TextBlock(text="")))
            events.append(BlockDelta(0, TextPiece(delta.text)))
        if delta.finish_reason is not None:
            self._end = _end_of(delta)
            if self._has_block:
                events.append(BlockStop(0))
        return b"".join(map(_sent, events))

    def ending(self) -> bytes:
        usage = anthropic_usage(self._generation.usage)
        return _sent(MessageDelta(self._end, usage)) + _sent(MessageStop())

    def failure(self, error: BaseException) -> bytes:
        _, body = describe(error).for_anthropic(current_request_id.get() or "")
        return named_event(body, "error")

    def _message(self, content: list[TextBlock], end: MessageEnd, usage: Usage) -> AnthropicMessage:
        return AnthropicMessage(
            id=self._head["id"],
            model=self._head["model"],
            content=content,
            stop_reason=end.stop_reason,
            stop_sequence=end.stop_sequence,
            usage=anthropic_usage(usage),
        )


def _end_of(delta: Delta) -> MessageEnd:
    reason: StopReason = "max_tokens" if delta.finish_reason == "length" else "end_turn"
    return MessageEnd("stop_sequence" if delta.stop_string else reason, delta.stop_string)


def _sent(event: MessageEvent) -> bytes:
    kind = type(event).__struct_config__.tag
    assert isinstance(kind, str)
    return named_event(event, kind)
