"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients know them."""

from collections.abc import Iterator
from secrets import token_hex

from fastapi import APIRouter, Request, Response

from bitwatt.api.answering import Answering, Chunks, ResponseHead
from bitwatt.api.chat_requests import as_chat, as_chat_body, chat_prompt, refusing_in
from bitwatt.api.client_link import tied_to_client
from bitwatt.api.dependencies import Models, SettingsOf, name_ignored_fields
from bitwatt.api.errors import describe
from bitwatt.api.json_route import JsonRoute, json_response
from bitwatt.api.message_blocks import MessageBlocks
from bitwatt.api.schemas.message_events import (
    AnthropicMessage,
    Block,
    MessageDelta,
    MessageEnd,
    MessageEvent,
    MessageStart,
    MessageStop,
    Ping,
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
    "continue_final_message": "messages",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking.budget_tokens",
    ".function.parameters": ".input_schema",
    ".function": "",
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
        return _Writer(generation, head, body)

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
        with refusing_in(_NAMES):
            token_ids = await chat_prompt(chat, model.text)
    return json_response(TokensCount(len(token_ids)), headers=headers)


class _Writer:
    """Puts a generation as Anthropic's messages are: blocks, in events that open and close them."""

    def __init__(self, generation: Generation, head: ResponseHead, body: MessagesBody) -> None:
        self._generation = generation
        self._head = head
        is_omitted = body.thinking is not None and body.thinking.display == "omitted"
        self._blocks = MessageBlocks(tells_thinking=not is_omitted)
        self._has_begun = False
        self._end = MessageEnd(None, None)

    async def take_prompt(self, index: int) -> None:
        """Do nothing: no prompt is scored here."""

    def whole(self, choices: list[Delta]) -> AnthropicMessage:
        [delta] = choices
        for _ in self._new(delta):
            pass  # a message that isn't streamed has no events
        return self._message(self._blocks.ended, self._generation.usage)

    def events(self, delta: Delta) -> bytes:
        events: list[MessageEvent] = []
        if not self._has_begun:
            self._has_begun = True
            opening = self._generation.usage_of(delta.index, is_opening=True)
            events += [MessageStart(self._message([], opening)), Ping()]
        return b"".join(map(_sent, [*events, *self._new(delta)]))

    def ending(self) -> bytes:
        usage = anthropic_usage(self._generation.usage)
        return _sent(MessageDelta(self._end, usage)) + _sent(MessageStop())

    def failure(self, error: BaseException) -> bytes:
        _, body = describe(error).for_anthropic(current_request_id.get() or "")
        return named_event(body, "error")

    def _new(self, delta: Delta) -> Iterator[MessageEvent]:
        """Yield the events of a delta; with the last one, the end is known."""
        yield from self._blocks.push(delta.told)
        if delta.finish_reason is not None:
            yield from self._blocks.finish()
            self._end = self._end_of(delta)

    def _end_of(self, delta: Delta) -> MessageEnd:
        if delta.stop_string:
            return MessageEnd("stop_sequence", delta.stop_string)
        if delta.finish_reason == "length":
            return MessageEnd("max_tokens", None)
        return MessageEnd("tool_use" if self._blocks.has_called else "end_turn", None)

    def _message(self, content: list[Block], usage: Usage) -> AnthropicMessage:
        return AnthropicMessage(
            id=self._head["id"],
            model=self._head["model"],
            content=content,
            stop_reason=self._end.stop_reason,
            stop_sequence=self._end.stop_sequence,
            usage=anthropic_usage(usage),
        )


def _sent(event: MessageEvent) -> bytes:
    kind = type(event).__struct_config__.tag
    assert isinstance(kind, str)
    return named_event(event, kind)
