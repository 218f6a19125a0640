"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from secrets import token_hex

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from bitwatt.api.client_link import tied_to_client
from bitwatt.api.dependencies import KeySalt, MirrorWish, Models, SettingsOf, ShadowOf
from bitwatt.api.json_route import JsonRoute, json_response
from bitwatt.api.schemas.chat import (
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    ChatTopLogprob,
)
from bitwatt.api.schemas.common import Shape
from bitwatt.api.sse import EventStream, event
from bitwatt.serving.generation import Delta, Generation
from bitwatt.serving.models import ServedModel
from bitwatt.serving.planning import plan_generation
from bitwatt.text.vocabulary import Vocabulary

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatBody,
    request: Request,
    models: Models,
    settings: SettingsOf,
    shadow: ShadowOf,
    mirror_wish: MirrorWish,
    key_salt: KeySalt,
) -> Response:
    """Continue the conversation."""
    model = models.find(body.model)
    response_id = f"chatcmpl-{token_hex(12)}"

    async def plan(model: ServedModel) -> Generation:
        info = model.require_info()
        prompt = await model.text.encode_chat(
            [message.as_template_input() for message in body.messages],
            kwargs=body.chat_template_kwargs,
            max_tokens=info.max_model_len,
        )
        return plan_generation(
            body,
            model,
            info,
            [prompt],
            response_id=response_id,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            key_salt=key_salt,
            prompt_param="messages",
        )

    async with tied_to_client(request.receive, timeout_s=settings.request_timeout):
        generation = await plan(model)
        shadow.offer(mirror_wish, generation, plan)
        shape: Shape = {
            "id": response_id,
            "created": int(time.time()),
            "model": model.name,
        }
        if not body.stream:
            choices = [_choice(generation, delta) for delta in await generation.collect()]
            return json_response(ChatCompletion(**shape, choices=choices, usage=generation.usage))
    return EventStream(
        _events(generation, shape, include_usage=body.include_usage),
        keep_alive_s=settings.keep_alive,
        timeout_s=settings.request_timeout,
    )


def _choice(generation: Generation, delta: Delta) -> ChatChoice:
    assert delta.finish_reason is not None
    return ChatChoice(
        index=delta.index,
        message=ChatMessage(content=delta.text),
        logprobs=_logprobs(generation, delta),
        finish_reason=delta.finish_reason,
    )


async def _events(
    generation: Generation, shape: Shape, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    usage = None if include_usage else UNSET
    opened: set[int] = set()
    async with aclosing(generation.stream()) as deltas:
        async for delta in deltas:
            index = delta.index
            if index not in opened:
                opened.add(index)
                opening = ChatDelta(role="assistant", content="")
                first = ChatChunkChoice(index=index, delta=opening)
                yield event(ChatChunk(**shape, choices=[first], usage=usage))
            choice = ChatChunkChoice(
                index=index,
                delta=ChatDelta(content=delta.text) if delta.text else ChatDelta(),
                logprobs=_logprobs(generation, delta),
                finish_reason=delta.finish_reason,
            )
            yield event(ChatChunk(**shape, choices=[choice], usage=usage))
    if include_usage:
        yield event(ChatChunk(**shape, choices=[], usage=generation.usage))


def _logprobs(generation: Generation, delta: Delta) -> ChatLogprobs | None:
    if generation.submits[delta.index].sampling.logprobs is None:
        return None
    vocabulary = generation.model.text.vocabulary
    entries = []
    for token_id, logprobs in zip(delta.token_ids, delta.logprobs, strict=True):
        token, data = _spell(vocabulary, token_id)
        top = [
            ChatTopLogprob(spelled, value, spelled_bytes)
            for top_id, value in logprobs.top
            for spelled, spelled_bytes in [_spell(vocabulary, top_id)]
        ]
        entries.append(ChatTokenLogprob(token, logprobs.sampled, data, top))
    return ChatLogprobs(entries)


def _spell(vocabulary: Vocabulary, token_id: int) -> tuple[str, list[int]]:
    data = vocabulary.literal(token_id)
    return data.decode("utf-8", "replace"), list(data)
