"""The way of every route that generates: from what is asked to a response, whole or streamed."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Protocol, TypedDict

import msgspec
from fastapi import Depends, Request, Response

from bitwatt.api.client_link import tied_to_client
from bitwatt.api.dependencies import KeySalt, MirrorWish, Models, SettingsOf, ShadowOf
from bitwatt.api.json_route import json_response
from bitwatt.api.schemas.common import GenerationBody
from bitwatt.api.sse import EventStream, event
from bitwatt.errors import InvalidRequestError
from bitwatt.serving.choice import Delta
from bitwatt.serving.generation import Generation
from bitwatt.serving.request import GenerationRequest

__all__ = ["Answering", "ResponseHead", "ResponseWriter"]


class ResponseHead(TypedDict):
    """What a response and every chunk of it begin with."""

    id: str
    created: int
    model: str


class ResponseWriter(Protocol):
    """Puts one generation as a route's API has it."""

    def whole(self, choices: list[Delta]) -> msgspec.Struct:
        """Return the response with these choices, each whole."""

    def events(self, delta: Delta) -> bytes:
        """Return what is new, as one or more events of the stream."""

    def usage_chunk(self) -> msgspec.Struct:
        """Return the chunk that ends a stream whose caller wants its usage."""


NewWriter = Callable[[Generation, ResponseHead], Awaitable[ResponseWriter]]


@dataclass(frozen=True, slots=True)
class _Answering:
    request: Request
    models: Models
    settings: SettingsOf
    shadow: ShadowOf
    mirror_wish: MirrorWish
    key_salt: KeySalt

    async def __call__(
        self, body: GenerationBody, asked: GenerationRequest, new_writer: NewWriter
    ) -> Response:
        """Return the response to what the body asks; asked is the same without the wire.

        Raises  InvalidRequestError, EngineError, ClientDisconnectedError, RequestTimeoutError
        """
        if body.priority and not self.settings.allow_priority:
            raise InvalidRequestError(
                f"priority is {body.priority}; it is not taken from callers here "
                "(--allow-priority)",
                param="priority",
            )
        timeout_s = self.settings.request_timeout
        model = self.models.find(body.model)
        async with tied_to_client(self.request.receive, timeout_s=timeout_s):
            generation = await asked.for_model(model)
            self.shadow.offer(self.mirror_wish, asked, generation)
            head = ResponseHead(id=asked.request_id, created=int(time.time()), model=model.name)
            writer = await new_writer(generation, head)
            if not body.stream:
                return json_response(writer.whole(await generation.collect()))
        return EventStream(
            _events(generation, writer, include_usage=body.include_usage),
            keep_alive_s=self.settings.keep_alive,
            timeout_s=timeout_s,
        )


Answering = Annotated[_Answering, Depends(_Answering)]
"""Answers the request at hand: await answering(body, asked, new_writer)."""


async def _events(
    generation: Generation, writer: ResponseWriter, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    async with aclosing(generation.stream()) as deltas:
        async for delta in deltas:
            yield writer.events(delta)
    if include_usage:
        yield event(writer.usage_chunk())
