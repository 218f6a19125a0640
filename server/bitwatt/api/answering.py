"""The way of every route that generates: from what is asked to a response, whole or streamed."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Protocol, TypedDict

import msgspec
from fastapi import Depends, Request, Response
from msgspec import UNSET, UnsetType

from bitwatt.api.client_link import tied_to_client
from bitwatt.api.dependencies import (
    ChargeOf,
    KeySalt,
    MirrorWish,
    Models,
    SettingsOf,
    ShadowOf,
    WantsEnergy,
    name_ignored_fields,
    refuse_priority,
)
from bitwatt.api.energy_forms import EnergyForms
from bitwatt.api.json_route import json_response
from bitwatt.api.schemas.common import SamplingBody, StreamOptions
from bitwatt.api.sse import DONE, EventStream, error_event, event, padded_event
from bitwatt.serving.choice import Delta
from bitwatt.serving.generation import Generation
from bitwatt.serving.request import GenerationRequest
from bitwatt.serving.twins import Posted
from bitwatt.serving.usage import Usage

__all__ = ["Answering", "Chunks", "ResponseHead", "ResponseWriter"]


class ResponseHead(TypedDict):
    """What a response and every chunk of it begin with."""

    id: str
    created: int
    model: str


NO_OPTIONS = StreamOptions.model_validate({})


class Chunks:
    """How the chunks of a stream are sent, as its caller wants them.

    event  returns a chunk as it goes over the wire
    """

    def __init__(self, options: StreamOptions, generation: Generation) -> None:
        self._ends_in_usage = bool(options.include_usage)
        self.event = padded_event if options.include_obfuscation else event
        self._usage = None if options.include_usage else UNSET
        is_continuous = options.include_usage and options.continuous_usage_stats
        self._usage_so_far = generation.usage_of if is_continuous else None

    def ending(self, usage_chunk: msgspec.Struct) -> bytes:
        """Return what ends a stream: the chunk where its caller wants usage, and `[DONE]`."""
        return event(usage_chunk) + DONE if self._ends_in_usage else DONE

    def failure(self, error: BaseException) -> bytes:
        """Return what ends a stream that failed."""
        return error_event(error)

    def usage_of(self, index: int, *, is_opening: bool = False) -> Usage | UnsetType | None:
        """Return the usage of a chunk of the choice: null where it comes in the last one."""
        if self._usage_so_far is None:
            return self._usage
        return self._usage_so_far(index, is_opening=is_opening)


class ResponseWriter(Protocol):
    """Puts one generation as a route's API has it."""

    async def take_prompt(self, index: int) -> None:
        """Put what was scored of a choice's prompt; called before any other, if it was."""

    def whole(self, choices: list[Delta]) -> msgspec.Struct:
        """Return the response with these choices, each whole."""

    def events(self, delta: Delta) -> bytes:
        """Return what is new, as events of the stream; none where it tells nothing yet."""

    def ending(self) -> bytes:
        """Return what ends a stream that did not fail."""

    def failure(self, error: BaseException) -> bytes:
        """Return what ends a stream that failed."""


NewWriter = Callable[[Generation, ResponseHead, Chunks], Awaitable[ResponseWriter]]


@dataclass(frozen=True, slots=True)
class _Answering:
    request: Request
    models: Models
    settings: SettingsOf
    shadow: ShadowOf
    mirror_wish: MirrorWish
    key_salt: KeySalt
    charge: ChargeOf
    wants_energy: WantsEnergy

    async def __call__(
        self,
        body: SamplingBody,
        asked: GenerationRequest,
        new_writer: NewWriter,
        *,
        options: StreamOptions = NO_OPTIONS,
        posted: Posted | None = None,
    ) -> Response:
        """Return the response to what the body asks; asked is the same without the wire.

        options  how a stream is sent
        posted   the same for another server; None for the request as it came

        Raises  InvalidRequestError, EngineError, ClientDisconnectedError, RequestTimeoutError
        """
        refuse_priority(body.priority, self.settings)
        headers = name_ignored_fields(self.request, body)
        timeout_s = self.settings.request_timeout
        model = self.models.find(body.model)
        async with tied_to_client(self.request.receive, timeout_s=timeout_s):
            generation = await asked.for_model(model)
            if posted is None:
                posted = Posted(self.request.scope["path"], await self.request.body())
            self.shadow.offer(self.mirror_wish, asked, generation, posted)
            head = ResponseHead(id=asked.request_id, created=int(time.time()), model=model.name)
            writer = await new_writer(generation, head, Chunks(options, generation))
            if not body.stream:
                with self.charge(generation):
                    choices = await generation.collect()
                if generation.wants_prompt_logprobs:
                    for choice in choices:
                        await writer.take_prompt(choice.index)
                whole = writer.whole(choices)
                if not self.wants_energy:
                    return json_response(whole, headers=headers)
                forms = EnergyForms(generation.usage.bitwatt, self.settings.prices)
                return json_response(forms.within(whole), headers=headers | forms.headers())
        return EventStream(
            self._events(generation, writer),
            keep_alive_s=self.settings.keep_alive,
            timeout_s=timeout_s,
            headers=headers,
            ending=partial(self._ending, generation, writer),
            failure=writer.failure,
        )

    async def _events(
        self, generation: Generation, writer: ResponseWriter
    ) -> AsyncGenerator[bytes, None]:
        is_scored = generation.wants_prompt_logprobs
        with self.charge(generation):
            async with aclosing(generation.stream()) as deltas:
                async for delta in deltas:
                    if is_scored:
                        await writer.take_prompt(delta.index)
                    if events := writer.events(delta):
                        yield events

    def _ending(self, generation: Generation, writer: ResponseWriter) -> bytes:
        """Return what ends a stream, with energy's comments before `[DONE]` where it has one."""
        ending = writer.ending()
        if not self.wants_energy:
            return ending
        comments = EnergyForms(generation.usage.bitwatt, self.settings.prices).comments()
        done = DONE if ending.endswith(DONE) else b""
        return ending.removesuffix(DONE) + comments + done


async def _answering(
    request: Request,
    models: Models,
    settings: SettingsOf,
    shadow: ShadowOf,
    mirror_wish: MirrorWish,
    key_salt: KeySalt,
    charge: ChargeOf,
    wants_energy: WantsEnergy,
) -> _Answering:
    return _Answering(
        request, models, settings, shadow, mirror_wish, key_salt, charge, wants_energy
    )


Answering = Annotated[_Answering, Depends(_answering)]
"""Answers the request at hand: await answering(body, asked, new_writer)."""
