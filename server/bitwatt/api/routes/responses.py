"""POST /v1/responses: each request has the whole conversation, and nothing is kept of it."""

import time
from collections.abc import Iterator
from secrets import token_hex
from typing import Any

from fastapi import APIRouter, Response
from msgspec import UNSET
from msgspec.structs import replace

from bitwatt.api.answering import Answering, Chunks, ResponseHead
from bitwatt.api.chat_requests import as_chat
from bitwatt.api.dependencies import KeptItemsOf
from bitwatt.api.errors import describe
from bitwatt.api.json_route import JsonRoute
from bitwatt.api.kept_items import CallerItems
from bitwatt.api.response_items import ResponseItems
from bitwatt.api.schemas.response_events import (
    AnyResponseEvent,
    IncompleteDetails,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseText,
    TextDelta,
    response_usage,
)
from bitwatt.api.schemas.response_tools import namespaced
from bitwatt.api.schemas.responses import ResponsesBody
from bitwatt.api.sse import named_event, padded_event
from bitwatt.serving.choice import Delta
from bitwatt.serving.generation import Generation

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)

_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    ".function": "",
}


@router.post("/v1/responses")
async def create_response(body: ResponsesBody, answering: Answering, kept: KeptItemsOf) -> Response:
    """Answer the conversation."""
    asked, posted = as_chat(
        body.as_chat(kept.find),
        _NAMES,
        request_id=f"resp_{token_hex(24)}",
        key_salt=answering.key_salt,
    )

    async def new_writer(generation: Generation, head: ResponseHead, _: Chunks) -> _Writer:
        return _Writer(generation, head, body, kept)

    return await answering(body, asked, new_writer, posted=posted)


_TOOL = {"type": "function", "description": None, "parameters": None, "strict": False}
"""What a response says of a tool where its request said nothing."""


class _Writer:
    """Puts a generation as responses have it: items, in events that open and close them."""

    def __init__(
        self,
        generation: Generation,
        head: ResponseHead,
        body: ResponsesBody,
        kept: CallerItems,
    ) -> None:
        self._generation = generation
        self._kept = None if body.is_forgotten else kept
        self._pads = body.stream_options is not None and bool(
            body.stream_options.include_obfuscation
        )
        self._items = ResponseItems(namespaced(body.tools))
        self._has_begun = False
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
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning={
                "effort": None if body.reasoning is None else body.reasoning.effort,
                "summary": None,
            },
            temperature=temperature,
            text=ResponseText(_format_of(body)),
            tool_choice=body.tool_choice or "auto",
            tools=[
                tool if tool["type"] == "namespace" else _TOOL | tool for tool in body.tools or ()
            ],
            top_p=top_p,
            metadata=body.metadata or {},
        )
        self._ended = self._begun

    async def take_prompt(self, index: int) -> None:
        """Do nothing: no prompt is scored here."""

    def whole(self, choices: list[Delta]) -> ResponseObject:
        [delta] = choices
        for _ in self._new(delta):
            pass  # an answer that isn't streamed has no events
        return self._ended

    def events(self, delta: Delta) -> bytes:
        events: list[AnyResponseEvent] = []
        if not self._has_begun:
            self._has_begun = True
            events += [
                ResponseEvent(**self._items.numbered(kind), response=self._begun)
                for kind in ("response.created", "response.in_progress")
            ]
        return b"".join(map(self._sent, [*events, *self._new(delta)]))

    def ending(self) -> bytes:
        ended = replace(self._ended, usage=response_usage(self._generation.usage))
        numbered = self._items.numbered(f"response.{ended.status}")
        return self._sent(ResponseEvent(**numbered, response=ended))

    def failure(self, error: BaseException) -> bytes:
        failed = replace(
            self._begun,
            status="failed",
            error=ResponseError("server_error", describe(error).body.error.message),
            output=self._items.so_far(),
            usage=response_usage(self._generation.usage),
        )
        numbered = self._items.numbered("response.failed")
        return self._sent(ResponseEvent(**numbered, response=failed))

    def _new(self, delta: Delta) -> Iterator[AnyResponseEvent]:
        """Yield the events of a delta; with the last one, the response is whole."""
        is_cut = delta.finish_reason == "length"
        yield from self._items.push(delta.told)
        if delta.finish_reason is None:
            return
        yield from self._items.finish(is_cut=is_cut)
        if self._kept is not None:
            self._kept.keep(self._items.so_far())
        self._ended = replace(
            self._begun,
            status="incomplete" if is_cut else "completed",
            incomplete_details=IncompleteDetails("max_output_tokens") if is_cut else None,
            completed_at=UNSET if is_cut else int(time.time()),
            output=self._items.so_far(),
            usage=response_usage(self._generation.usage),
        )

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
