"""POST /v1/responses: each request has the whole conversation, and nothing is kept of it."""

import time
from collections.abc import Iterator
from secrets import token_hex
from typing import Any

from fastapi import APIRouter, Response
from msgspec.structs import replace

from bitwatt.api.answering import Answering, Chunks, ResponseHead
from bitwatt.api.chat_requests import as_chat
from bitwatt.api.errors import describe
from bitwatt.api.json_route import JsonRoute
from bitwatt.api.schemas.response_events import (
    AnyResponseEvent,
    ContentPartEvent,
    IncompleteDetails,
    ItemEvent,
    OutputMessage,
    OutputText,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseText,
    TextDelta,
    TextDone,
    response_usage,
)
from bitwatt.api.schemas.responses import ResponsesBody
from bitwatt.api.sse import named_event, padded_event
from bitwatt.serving.choice import Delta
from bitwatt.serving.generation import Generation

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)

_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}


@router.post("/v1/responses")
async def create_response(body: ResponsesBody, answering: Answering) -> Response:
    """Answer the conversation."""
    asked, posted = as_chat(
        body.as_chat(),
        _NAMES,
        request_id=f"resp_{token_hex(24)}",
        key_salt=answering.key_salt,
    )

    async def new_writer(generation: Generation, head: ResponseHead, _: Chunks) -> _Writer:
        return _Writer(generation, head, body)

    return await answering(body, asked, new_writer, posted=posted)


class _Writer:
    """Puts a generation as responses have it: one message, in events that open and close it."""

    def __init__(self, generation: Generation, head: ResponseHead, body: ResponsesBody) -> None:
        self._generation = generation
        self._pads = body.stream_options is not None and bool(
            body.stream_options.include_obfuscation
        )
        self._text = ""
        self._num_events = 0
        defaults = generation.model.sampling_defaults
        temperature, top_p = (
            defaults.get(name, 1.0) if given is None else given
            for name, given in (("temperature", body.temperature), ("top_p", body.top_p))
        )
        self._begun = ResponseObject(
            id=head["id"],
            created_at=head["created"],
            status="in_progress",
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=head["model"],
            output=[],
            reasoning={
                "effort": None if body.reasoning is None else body.reasoning.effort,
                "summary": None,
            },
            temperature=temperature,
            text=ResponseText(_format_of(body)),
            top_p=top_p,
            metadata=body.metadata or {},
        )
        self._ended = self._begun
        self._part: dict[str, Any] = {
            "item_id": f"msg_{token_hex(24)}",
            "output_index": 0,
            "content_index": 0,
        }

    async def take_prompt(self, index: int) -> None:
        """Do nothing: no prompt is scored here."""

    def whole(self, choices: list[Delta]) -> ResponseObject:
        [delta] = choices
        self._text = delta.text
        return self._end(delta)

    def events(self, delta: Delta) -> bytes:
        return b"".join(map(self._sent, self._events(delta)))

    def ending(self) -> bytes:
        ended = replace(self._ended, usage=response_usage(self._generation.usage))
        kind = f"response.{ended.status}"
        return self._sent(ResponseEvent(**self._next(kind), response=ended))

    def failure(self, error: BaseException) -> bytes:
        detail = describe(error).body.error
        failed = replace(
            self._begun,
            status="failed",
            error=ResponseError("server_error", detail.message),
            output=[self._message("incomplete", self._text)] if self._num_events else [],
            usage=response_usage(self._generation.usage),
        )
        return self._sent(ResponseEvent(**self._next("response.failed"), response=failed))

    def _events(self, delta: Delta) -> Iterator[AnyResponseEvent]:
        place: dict[str, Any] = {"output_index": 0}
        part = self._part
        if not self._num_events:
            for kind in ("response.created", "response.in_progress"):
                yield ResponseEvent(**self._next(kind), response=self._begun)
            opened = self._message("in_progress")
            yield ItemEvent(**self._next("response.output_item.added"), **place, item=opened)
            yield ContentPartEvent(
                **self._next("response.content_part.added"), **part, part=OutputText(text="")
            )
        if delta.text:
            self._text += delta.text
            yield TextDelta(**self._next("response.output_text.delta"), **part, delta=delta.text)
        if delta.finish_reason is None:
            return
        self._ended = self._end(delta)
        [message] = self._ended.output
        [text] = message.content
        yield TextDone(**self._next("response.output_text.done"), **part, text=text.text)
        yield ContentPartEvent(**self._next("response.content_part.done"), **part, part=text)
        yield ItemEvent(**self._next("response.output_item.done"), **place, item=message)

    def _end(self, delta: Delta) -> ResponseObject:
        """Return the whole response; its joules are known once the generation is closed."""
        is_cut = delta.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        ended = replace(
            self._begun,
            status=status,
            incomplete_details=IncompleteDetails("max_output_tokens") if is_cut else None,
            output=[self._message(status, self._text)],
            usage=response_usage(self._generation.usage),
        )
        return ended if is_cut else replace(ended, completed_at=int(time.time()))

    def _message(self, status: Any, text: str | None = None) -> OutputMessage:
        content = [] if text is None else [OutputText(text=text)]
        return OutputMessage(id=self._part["item_id"], status=status, content=content)

    def _next(self, kind: str) -> dict[str, Any]:
        """Return what every event has: its type, and its number in the stream."""
        number, self._num_events = self._num_events, self._num_events + 1
        return {"type": kind, "sequence_number": number}

    def _sent(self, event: AnyResponseEvent) -> bytes:
        if self._pads and isinstance(event, TextDelta):
            return f"event: {event.type}\n".encode() + padded_event(event)
        return named_event(event, event.type)


def _format_of(body: ResponsesBody) -> dict[str, Any]:
    given = None if body.text is None else body.text.format
    if given is None:
        return {"type": "text"}
    known = ("type", "name", "description", "schema", "strict")
    return {name: given[name] for name in known if given.get(name) is not None}
