"""POST /v1/chat/completions."""

from secrets import token_hex

from fastapi import APIRouter, Response
from msgspec import UNSET, UnsetType

from bitwatt.api.answering import NO_OPTIONS, Answering, Chunks, ResponseHead
from bitwatt.api.chat_requests import chat_request
from bitwatt.api.json_route import JsonRoute
from bitwatt.api.prompt_logprobs import PromptEntries, prompt_entries
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
from bitwatt.serving.choice import Delta
from bitwatt.serving.generation import Generation

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, answering: Answering) -> Response:
    """Continue the conversation."""

    asked = chat_request(body, request_id=f"chatcmpl-{token_hex(12)}", key_salt=answering.key_salt)

    async def new_writer(generation: Generation, head: ResponseHead, chunks: Chunks) -> _Writer:
        return _Writer(generation, head, chunks)

    return await answering(body, asked, new_writer, options=body.stream_options or NO_OPTIONS)


class _Writer:
    """Puts a generation as chat completions have it."""

    def __init__(self, generation: Generation, head: ResponseHead, chunks: Chunks) -> None:
        self._generation = generation
        self._head = head
        self._chunks = chunks
        self._opened: set[int] = set()
        self._prompt_entries: PromptEntries | UnsetType = UNSET

    async def take_prompt(self, index: int) -> None:
        if self._prompt_entries is UNSET:
            self._prompt_entries = await prompt_entries(self._generation, index)

    def whole(self, choices: list[Delta]) -> ChatCompletion:
        return ChatCompletion(
            **self._head,
            choices=[self._choice(delta) for delta in choices],
            usage=self._generation.usage,
            prompt_logprobs=self._prompt_entries,
        )

    def events(self, delta: Delta) -> bytes:
        chunk = self._chunk(
            ChatChunkChoice(
                index=delta.index,
                delta=ChatDelta(content=delta.text) if delta.text else ChatDelta(),
                logprobs=self._logprobs(delta) if delta.token_ids else None,
                finish_reason=delta.finish_reason,
            )
        )
        if delta.index in self._opened:
            return chunk
        self._opened.add(delta.index)
        opening = ChatDelta(role="assistant", content="")
        opening_chunk = self._chunk(
            ChatChunkChoice(index=delta.index, delta=opening), is_opening=True
        )
        return opening_chunk + chunk

    def ending(self) -> bytes:
        return self._chunks.ending(
            ChatChunk(**self._head, choices=[], usage=self._generation.usage)
        )

    def failure(self, error: BaseException) -> bytes:
        return self._chunks.failure(error)

    def _chunk(self, choice: ChatChunkChoice, *, is_opening: bool = False) -> bytes:
        usage = self._chunks.usage_of(choice.index, is_opening=is_opening)
        return self._chunks.event(ChatChunk(**self._head, choices=[choice], usage=usage))

    def _choice(self, delta: Delta) -> ChatChoice:
        assert delta.finish_reason is not None
        return ChatChoice(
            index=delta.index,
            message=ChatMessage(content=delta.text),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
        )

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if self._generation.submits[delta.index].sampling.logprobs is None:
            return None
        vocabulary = self._generation.model.text.vocabulary
        spell, literal = vocabulary.spell, vocabulary.literal
        return ChatLogprobs(
            [
                ChatTokenLogprob(
                    spell(token_id),
                    logprobs.sampled,
                    list(literal(token_id)),
                    [
                        ChatTopLogprob(spell(top_id), value, list(literal(top_id)))
                        for top_id, value in logprobs.top
                    ],
                )
                for token_id, logprobs in zip(delta.token_ids, delta.logprobs, strict=True)
            ]
        )
