"""POST /v1/completions."""

import sys
from secrets import token_hex

from fastapi import APIRouter, Response
from msgspec import UNSET

from bitwatt.api.answering import NO_OPTIONS, Answering, Chunks, ResponseHead
from bitwatt.api.json_route import JsonRoute
from bitwatt.api.prompt_logprobs import PromptEntries, echoed_logprobs, likely, prompt_entries
from bitwatt.api.schemas.completions import (
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
    PromptItem,
)
from bitwatt.engine.messages import EngineInfo
from bitwatt.serving.choice import Delta
from bitwatt.serving.generation import Generation
from bitwatt.serving.planning import seed_of
from bitwatt.serving.request import GenerationRequest
from bitwatt.serving.sampling_params import DEFAULT_MAX_TOKENS
from bitwatt.text.detokenizer import TextOffsets
from bitwatt.text.processor import TextProcessor

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, answering: Answering) -> Response:
    """Continue each prompt."""

    async def encode(text: TextProcessor, info: EngineInfo) -> list[list[int]]:
        async def ids_of(prompt: PromptItem) -> list[int]:
            if prompt is None:  # a text's beginning: BOS, or what ends the text before
                return await text.encode("") or info.eos_token_ids[:1]
            if not isinstance(prompt, str):
                return prompt
            return await text.encode(
                prompt,
                max_tokens=info.max_model_len,
                add_special_tokens=body.add_special_tokens is not False,
            )

        return [await ids_of(prompt) for prompt in body.prompt]

    params = body.sampling_params()
    asked = GenerationRequest(
        request_id=f"cmpl-{token_hex(12)}",
        params=params,
        seed=seed_of(params),
        encode=encode,
        silent=body.silent,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        key_salt=answering.key_salt,
        # Those who have a prompt scored count on an entry for each token, text or not.
        lists_stop_tokens=bool(body.echo),
        has_id_prompts=any(isinstance(prompt, list) for prompt in body.prompt),
    )

    async def new_writer(generation: Generation, head: ResponseHead, chunks: Chunks) -> _Writer:
        echoes = await _echoes(body, generation.model.text)
        return _Writer(generation, head, chunks, body, echoes)

    return await answering(body, asked, new_writer, options=body.stream_options or NO_OPTIONS)


async def _echoes(body: CompletionBody, text: TextProcessor) -> list[str]:
    """Return what each choice's text begins with."""
    num_choices = body.n or 1
    if not body.echo:
        return [""] * (len(body.prompt) * num_choices)
    prompts = [
        prompt if isinstance(prompt, str) else await text.decode(prompt or [])
        for prompt in body.prompt
    ]
    return [prompt for prompt in prompts for _ in range(num_choices)]


class _Writer:
    """Puts a generation as completions have it; a choice's echo comes first."""

    def __init__(
        self,
        generation: Generation,
        head: ResponseHead,
        chunks: Chunks,
        body: CompletionBody,
        echoes: list[str],
    ) -> None:
        self._generation = generation
        self._head = head
        self._chunks = chunks
        self._body = body
        self._echoes = echoes
        self._prompt_entries: dict[int, PromptEntries] = {}
        self._echoed: dict[int, CompletionLogprobs] = {}  # of choices that have not begun
        self._taken: set[int] = set()
        self._num_chars = [len(echo) for echo in echoes]  # sent so far of each choice
        vocabulary = generation.model.text.vocabulary
        self._offsets = [TextOffsets(vocabulary, len(echo)) for echo in echoes]

    async def take_prompt(self, index: int) -> None:
        if index in self._taken:
            return
        self._taken.add(index)
        body = self._body
        if body.prompt_logprobs is not None:
            self._prompt_entries[index] = await prompt_entries(self._generation, index)
        if body.echo and body.logprobs is not None:
            self._echoed[index] = await echoed_logprobs(
                self._generation, index, self._echoes[index], body.logprobs
            )

    def whole(self, choices: list[Delta]) -> Completion:
        return Completion(
            **self._head,
            choices=[self._choice(delta) for delta in choices],
            usage=self._generation.usage,
        )

    def events(self, delta: Delta) -> bytes:
        usage = self._chunks.usage_of(delta.index)
        has_logprobs = bool(delta.token_ids) or delta.index in self._echoed
        choice = self._choice(delta, has_logprobs=has_logprobs)
        return self._chunks.event(Completion(**self._head, choices=[choice], usage=usage))

    def ending(self) -> bytes:
        return self._chunks.ending(
            Completion(**self._head, choices=[], usage=self._generation.usage)
        )

    def failure(self, error: BaseException) -> bytes:
        return self._chunks.failure(error)

    def _choice(self, delta: Delta, *, has_logprobs: bool = True) -> CompletionChoice:
        index = delta.index
        echo, self._echoes[index] = self._echoes[index], ""
        self._num_chars[index] += len(delta.text)
        return CompletionChoice(
            index=index,
            text=echo + delta.text,
            logprobs=self._logprobs(delta) if has_logprobs else None,
            finish_reason=delta.finish_reason,
            prompt_logprobs=self._prompt_entries.get(index, UNSET),
        )

    def _logprobs(self, delta: Delta) -> CompletionLogprobs | None:
        if self._generation.submits[delta.index].sampling.logprobs is None:
            return None
        vocabulary = self._generation.model.text.vocabulary
        offsets = self._offsets[delta.index]
        # Past the text is what a stop string that ends it left of its tokens.
        past = self._num_chars[delta.index] if delta.finish_reason else sys.maxsize
        entries = self._echoed.pop(delta.index, None) or CompletionLogprobs([], [], [], [])
        for token_id, logprobs in zip(delta.token_ids, delta.logprobs, strict=True):
            token = vocabulary.spell(token_id)
            entries.tokens.append(token)
            entries.token_logprobs.append(logprobs.sampled)
            entries.top_logprobs.append(likely(vocabulary, token, logprobs.sampled, logprobs.top))
            entries.text_offset.append(min(offsets.push(token_id), past))
        return entries
