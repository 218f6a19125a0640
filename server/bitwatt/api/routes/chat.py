"""POST /v1/chat/completions."""

from secrets import token_hex

from fastapi import APIRouter, Response
from msgspec import UNSET, UnsetType

from bitwatt.api.answering import NO_OPTIONS, Answering, Chunks, ResponseHead
from bitwatt.api.chat_requests import chat_request
from bitwatt.api.json_route import JsonRoute
from bitwatt.api.prompt_logprobs import PromptEntries, prompt_entries
from bitwatt.api.schemas.chat import ChatBody
from bitwatt.api.schemas.chat_events import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFunction,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    ChatToolCall,
    ChatTopLogprob,
)
from bitwatt.serving.choice import ChatFinishReason, Delta, chat_reason
from bitwatt.serving.generation import Generation
from bitwatt.text.answers.pieces import (
    AnswerPiece,
    CallArguments,
    CallClosed,
    CallOpened,
    Content,
    Reasoning,
    whole_answer,
)

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, answering: Answering) -> Response:
    """Continue the conversation."""

    asked = chat_request(body, request_id=f"chatcmpl-{token_hex(12)}", key_salt=answering.key_salt)

    async def new_writer(generation: Generation, head: ResponseHead, chunks: Chunks) -> _Writer:
        tells_reasoning = body.include_reasoning is not False
        return _Writer(generation, head, chunks, tells_reasoning=tells_reasoning)

    return await answering(body, asked, new_writer, options=body.stream_options or NO_OPTIONS)


class _Writer:
    """Puts a generation as chat completions have it."""

    def __init__(
        self,
        generation: Generation,
        head: ResponseHead,
        chunks: Chunks,
        *,
        tells_reasoning: bool,
    ) -> None:
        self._generation = generation
        self._tells_reasoning = tells_reasoning
        self._calling: set[int] = set()  # choices that have called, and whose calls are whole
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
        index = delta.index
        if delta.pieces is None:  # the usual way, which every token of every stream goes
            new = ChatDelta(content=delta.text) if delta.text else ChatDelta()
            events = self._event(delta, new, delta.finish_reason)
        else:
            told = [one for piece in delta.pieces if (one := self._delta(index, piece))]
            if not told and (delta.finish_reason is not None or delta.token_ids):
                told = [ChatDelta()]
            reasons = [*[None] * (len(told) - 1), self._reason(delta)]
            events = b"".join(
                self._event(delta, one, reason, has_logprobs=not at)
                for at, (one, reason) in enumerate(zip(told, reasons, strict=False))
            )
        if index in self._opened:
            return events
        self._opened.add(index)
        opened = ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
        return self._chunk(opened, is_opening=True) + events

    def _event(
        self,
        delta: Delta,
        new: ChatDelta,
        reason: ChatFinishReason | None,
        *,
        has_logprobs: bool = True,
    ) -> bytes:
        return self._chunk(
            ChatChunkChoice(
                index=delta.index,
                delta=new,
                logprobs=self._logprobs(delta) if has_logprobs and delta.token_ids else None,
                finish_reason=reason,
            )
        )

    def _delta(self, index: int, piece: AnswerPiece) -> ChatDelta | None:
        """Return a piece as a stream has it; None for what it doesn't tell."""
        match piece:
            case Content(text):
                return ChatDelta(content=text)
            case Reasoning(text):
                return ChatDelta(reasoning_content=text) if self._tells_reasoning else None
            case CallOpened(call, name):
                function = ChatFunction(name=name, arguments="")
                opened = ChatToolCall(index=call, id=_call_id(), type="function", function=function)
                return ChatDelta(tool_calls=[opened])
            case CallArguments(call, text):
                more = ChatToolCall(index=call, function=ChatFunction(arguments=text))
                return ChatDelta(tool_calls=[more])
            case CallClosed(_, is_cut):  # of which a stream tells nothing
                (self._calling.discard if is_cut else self._calling.add)(index)
                return None

    def _reason(self, delta: Delta) -> ChatFinishReason | None:
        if delta.finish_reason is None:
            return None
        return chat_reason(delta.finish_reason, has_called=delta.index in self._calling)

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
        answer = whole_answer(delta.told)
        calls = [
            ChatToolCall(
                id=_call_id(),
                type="function",
                function=ChatFunction(name=call.name, arguments=call.arguments),
            )
            for call in answer.calls
        ]
        assert delta.finish_reason is not None
        return ChatChoice(
            index=delta.index,
            message=ChatMessage(
                content=None if calls and not answer.content else answer.content,
                reasoning_content=answer.reasoning
                if answer.reasoning and self._tells_reasoning
                else UNSET,
                tool_calls=calls or UNSET,
            ),
            logprobs=self._logprobs(delta),
            finish_reason=chat_reason(delta.finish_reason, has_called=answer.has_called),
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


def _call_id() -> str:
    return f"call_{token_hex(12)}"
