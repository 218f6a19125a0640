"""POST /v1/completions."""

from secrets import token_hex

from fastapi import APIRouter, Response
from msgspec import UNSET

from bitwatt.api.answering import Answering, ResponseHead
from bitwatt.api.json_route import JsonRoute
from bitwatt.api.schemas.completions import (
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
)
from bitwatt.api.sse import event
from bitwatt.engine.messages import EngineInfo
from bitwatt.serving.choice import Delta
from bitwatt.serving.generation import Generation
from bitwatt.serving.planning import seed_of
from bitwatt.serving.request import GenerationRequest
from bitwatt.serving.sampling_params import DEFAULT_MAX_TOKENS
from bitwatt.text.processor import TextProcessor

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, answering: Answering) -> Response:
    """Continue each prompt."""

    async def encode(text: TextProcessor, info: EngineInfo) -> list[list[int]]:
        return [
            await text.encode(prompt, max_tokens=info.max_model_len)
            if isinstance(prompt, str)
            else prompt
            for prompt in body.prompt
        ]

    params = body.sampling_params()
    asked = GenerationRequest(
        request_id=f"cmpl-{token_hex(12)}",
        params=params,
        seed=seed_of(params),
        encode=encode,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        key_salt=answering.key_salt,
    )

    async def new_writer(generation: Generation, head: ResponseHead) -> _Writer:
        echoes = await _echoes(body, generation.model.text)
        return _Writer(generation, head, echoes, include_usage=body.include_usage)

    return await answering(body, asked, new_writer)


async def _echoes(body: CompletionBody, text: TextProcessor) -> list[str]:
    """Return what each choice's text begins with."""
    num_choices = body.n or 1
    if not body.echo:
        return [""] * (len(body.prompt) * num_choices)
    prompts = [
        prompt if isinstance(prompt, str) else await text.decode(prompt) for prompt in body.prompt
    ]
    return [prompt for prompt in prompts for _ in range(num_choices)]


class _Writer:
    """Puts a generation as completions have it; a choice's echo comes first."""

    def __init__(
        self,
        generation: Generation,
        head: ResponseHead,
        echoes: list[str],
        *,
        include_usage: bool,
    ) -> None:
        self._generation = generation
        self._head = head
        self._usage = None if include_usage else UNSET
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]  # of the next token, in characters

    def whole(self, choices: list[Delta]) -> Completion:
        return Completion(
            **self._head,
            choices=[self._choice(delta) for delta in choices],
            usage=self._generation.usage,
        )

    def events(self, delta: Delta) -> bytes:
        return event(Completion(**self._head, choices=[self._choice(delta)], usage=self._usage))

    def usage_chunk(self) -> Completion:
        return Completion(**self._head, choices=[], usage=self._generation.usage)

    def _choice(self, delta: Delta) -> CompletionChoice:
        index = delta.index
        echo, self._echoes[index] = self._echoes[index], ""
        return CompletionChoice(
            index=index,
            text=echo + delta.text,
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
        )

    def _logprobs(self, delta: Delta) -> CompletionLogprobs | None:
        if self._generation.submits[delta.index].sampling.logprobs is None:
            return None
        spell = self._generation.model.text.vocabulary.spell
        entries = CompletionLogprobs([], [], [], [])
        for token_id, logprobs in zip(delta.token_ids, delta.logprobs, strict=True):
            token = spell(token_id)
            top = {spell(top_id): value for top_id, value in logprobs.top}
            entries.tokens.append(token)
            entries.token_logprobs.append(logprobs.sampled)
            entries.top_logprobs.append(top | {token: logprobs.sampled})
            entries.text_offset.append(self._offsets[delta.index])
            self._offsets[delta.index] += len(token)
        return entries
