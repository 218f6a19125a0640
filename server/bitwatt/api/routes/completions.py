"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from secrets import token_hex

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from bitwatt.api.client_link import tied_to_client
from bitwatt.api.dependencies import KeySalt, MirrorWish, Models, SettingsOf, ShadowOf
from bitwatt.api.json_route import JsonRoute, json_response
from bitwatt.api.schemas.common import Shape
from bitwatt.api.schemas.completions import (
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
    PromptItem,
)
from bitwatt.api.sse import EventStream, event
from bitwatt.engine.messages import EngineInfo
from bitwatt.serving.generation import Delta, Generation
from bitwatt.serving.models import ServedModel
from bitwatt.serving.planning import plan_generation

__all__ = ["router"]

DEFAULT_MAX_TOKENS = 16  # OpenAI's

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions")
async def create_completion(
    body: CompletionBody,
    request: Request,
    models: Models,
    settings: SettingsOf,
    shadow: ShadowOf,
    mirror_wish: MirrorWish,
    key_salt: KeySalt,
) -> Response:
    """Continue each prompt."""
    model = models.find(body.model)
    response_id = f"cmpl-{token_hex(12)}"

    async def plan(model: ServedModel) -> Generation:
        info = model.require_info()
        return plan_generation(
            body,
            model,
            info,
            [await _encode(prompt, model, info) for prompt in body.prompt],
            response_id=response_id,
            max_tokens=body.max_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            logprobs=body.logprobs,
            key_salt=key_salt,
        )

    async with tied_to_client(request.receive, timeout_s=settings.request_timeout):
        generation = await plan(model)
        shadow.offer(mirror_wish, generation, plan)
        writers = [
            _ChoiceWriter(generation, index, echo)
            for index, echo in enumerate(await _echoes(body, model))
        ]
        shape = Shape(id=response_id, created=int(time.time()), model=model.name)
        if not body.stream:
            choices = [writers[delta.index].write(delta) for delta in await generation.collect()]
            return json_response(Completion(**shape, choices=choices, usage=generation.usage))
    return EventStream(
        _events(generation, writers, shape, include_usage=body.include_usage),
        keep_alive_s=settings.keep_alive,
        timeout_s=settings.request_timeout,
    )


async def _encode(prompt: PromptItem, model: ServedModel, info: EngineInfo) -> list[int]:
    if isinstance(prompt, str):
        return await model.text.encode(prompt, max_tokens=info.max_model_len)
    return prompt


async def _echoes(body: CompletionBody, model: ServedModel) -> list[str]:
    """Return what each choice's text begins with."""
    if not body.echo:
        return [""] * (len(body.prompt) * (body.n or 1))
    texts = [
        prompt if isinstance(prompt, str) else await model.text.decode(prompt)
        for prompt in body.prompt
    ]
    return [text for text in texts for _ in range(body.n or 1)]


class _ChoiceWriter:
    """Puts one choice as the API has it, whole or piece by piece; echo comes first."""

    def __init__(self, generation: Generation, index: int, echo: str) -> None:
        self._wants_logprobs = generation.submits[index].sampling.logprobs is not None
        self._literal = generation.model.text.vocabulary.literal
        self._echo = echo
        self._offset = len(echo)

    def write(self, delta: Delta) -> CompletionChoice:
        echo, self._echo = self._echo, ""
        return CompletionChoice(
            index=delta.index,
            text=echo + delta.text,
            logprobs=self._logprobs(delta) if self._wants_logprobs else None,
            finish_reason=delta.finish_reason,
        )

    def _logprobs(self, delta: Delta) -> CompletionLogprobs:
        entries = CompletionLogprobs([], [], [], [])
        for token_id, logprobs in zip(delta.token_ids, delta.logprobs, strict=True):
            token = self._spell(token_id)
            top = {self._spell(top_id): value for top_id, value in logprobs.top}
            entries.tokens.append(token)
            entries.token_logprobs.append(logprobs.sampled)
            entries.top_logprobs.append(top | {token: logprobs.sampled})
            entries.text_offset.append(self._offset)
            self._offset += len(token)
        return entries

    def _spell(self, token_id: int) -> str:
        return self._literal(token_id).decode("utf-8", "replace")


async def _events(
    generation: Generation,
    writers: list[_ChoiceWriter],
    shape: Shape,
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    usage = None if include_usage else UNSET
    async with aclosing(generation.stream()) as deltas:
        async for delta in deltas:
            choice = writers[delta.index].write(delta)
            yield event(Completion(**shape, choices=[choice], usage=usage))
    if include_usage:
        yield event(Completion(**shape, choices=[], usage=generation.usage))
