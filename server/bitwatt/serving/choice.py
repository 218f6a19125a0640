"""One choice, from an engine's outputs: text that is certain, its tokens, and why it ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bitwatt.engine.messages import Submit, TokenLogprobs, TokenOutput
from bitwatt.errors import RequestFailedError
from bitwatt.scheduling.request import FinishReason
from bitwatt.text.answers.parser import AnswerParser
from bitwatt.text.answers.pieces import AnswerPiece, Content
from bitwatt.text.answers.thinking import ThinkingPart
from bitwatt.text.output import OutputText

__all__ = [
    "ChatFinishReason",
    "ChoiceReader",
    "Delta",
    "FinishReasonName",
    "ThinkingTokens",
    "chat_reason",
]

FinishReasonName = Literal["stop", "length"]
ChatFinishReason = FinishReasonName | Literal["tool_calls"]


def chat_reason(reason: FinishReasonName, *, has_called: bool) -> ChatFinishReason:
    """Return why an answer ended, as chat has it.

    has_called  whether some of it are calls, and all of these are whole: the caller runs them
    """
    return "tool_calls" if reason == "stop" and has_called else reason


@dataclass(slots=True)  # not frozen: that costs 0.5 µs a token (AMD EPYC, 2 cores shared)
class Delta:
    """What is new of a choice: text that is certain, and its tokens where they were asked for.

    Read-only.

    token_ids, logprobs  empty unless the request asked for log-probabilities
    finish_reason        with the choice's last delta
    stop_string          and the stop string that ended it, if one did
    pieces               what the text says, where it is read; None where all of it is content
    """

    index: int
    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: FinishReasonName | None = None
    stop_string: str | None = None
    pieces: Sequence[AnswerPiece] | None = None

    @property
    def told(self) -> Sequence[AnswerPiece]:
        """What the text says, read or not."""
        if self.pieces is None:
            return [Content(self.text)] if self.text else []
        return self.pieces


class ThinkingTokens:
    """Counts the tokens between two marks, and the marks.

    count  so far
    """

    __slots__ = ("_closing_id", "_opening_id", "_part", "count")

    def __init__(self, opening_id: int, closing_id: int, part: ThinkingPart) -> None:
        """Begin with the part that the prompt leads into."""
        self._opening_id, self._closing_id = opening_id, closing_id
        self._part = part
        self.count = 0

    def push(self, token_ids: Sequence[int]) -> None:
        """Count those of the next tokens."""
        for token_id in token_ids if self._part != "over" else ():
            if self._part == "may come" and token_id == self._opening_id:
                self._part = "open"
            self.count += self._part == "open"
            if token_id == self._closing_id:
                self._part = "over"


class ChoiceReader:
    """Reads the outputs of one choice, in order. Once it has finished, no more are to be read.

    num_tokens  generated so far; a stop token counts, tokens behind a stop string don't
    """

    __slots__ = (
        "_held_ids",
        "_held_logprobs",
        "_index",
        "_lists_stop_token",
        "_parser",
        "_stop_token_ids",
        "_text",
        "_thinking",
        "_wants_logprobs",
        "num_tokens",
    )

    def __init__(
        self,
        index: int,
        submit: Submit,
        text: OutputText,
        *,
        lists_stop_token: bool = False,
        parser: AnswerParser | None = None,
        thinking: ThinkingTokens | None = None,
    ) -> None:
        """Begin.

        lists_stop_token  whether the stop token that ends it is one of its deltas' tokens
        parser    tells what the text says; the choice ends where it is complete
        thinking  counts its tokens
        """
        self._parser = parser
        self._thinking = thinking
        self._index = index
        self._text = text
        self._stop_token_ids = submit.sampling.stop_token_ids
        self._lists_stop_token = lists_stop_token
        self._wants_logprobs = submit.sampling.logprobs is not None
        self._held_ids: list[int] = []  # with their logprobs: tokens that wait for their text
        self._held_logprobs: list[TokenLogprobs] = []
        self.num_tokens = 0

    @property
    def num_thinking_tokens(self) -> int:
        """Tokens of thinking so far, its marks with them; 0 where nobody counts them."""
        return 0 if self._thinking is None else self._thinking.count

    def read(self, output: TokenOutput) -> Delta | None:
        """Return what is new, or None while nothing is certain.

        A delta with a finish_reason is the last. A stop string ends the choice before the engine
        does: then the engine's request is to be aborted.

        Raises  RequestFailedError where the engine gave the request up
        """
        token_ids: Sequence[int] = output.token_ids
        num_tokens = len(token_ids)
        text, reason = self._text, output.finish_reason
        if reason is None:
            new = text.push(token_ids)
        else:
            if reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise RequestFailedError(output.error or "the engine gave the request up")
            token_ids = self._without_stop_token(token_ids, reason)
            new = text.push(token_ids) + text.finish()
            if self._lists_stop_token and not text.stopped:
                token_ids = output.token_ids
        finish: FinishReasonName | None = None
        if text.stopped:
            finish = "stop"
            token_ids = token_ids[: len(token_ids) - text.num_unused]
            num_tokens = len(token_ids)
        elif reason is not None:
            finish = "stop" if reason is FinishReason.STOP else "length"
        self.num_tokens += num_tokens
        if self._wants_logprobs:
            self._held_ids += token_ids
            self._held_logprobs += output.logprobs[: len(token_ids)]
        pieces: list[AnswerPiece] | None = None
        if self._parser is not None:
            pieces = self._parser.push(new)
            if finish is not None:
                pieces += self._parser.finish()
            elif self._parser.is_complete:
                finish = "stop"
        if self._thinking is not None:
            self._thinking.push(token_ids)
        if not new and finish is None and not self._may_tell_tokens():
            return None
        held = self._held_ids, self._held_logprobs
        stop_string = finish and text.stop_string
        delta = Delta(self._index, new, *held, finish, stop_string, pieces)
        if self._wants_logprobs:
            self._held_ids, self._held_logprobs = [], []
        return delta

    def _may_tell_tokens(self) -> bool:
        """Whether tokens were asked for and have no text that is held: special ones, as it goes."""
        return bool(self._held_ids) and self._parser is None and not self._text.holds_back

    def _without_stop_token(self, token_ids: Sequence[int], reason: FinishReason) -> Sequence[int]:
        """Return the tokens that are text: a stop token ends the text and is no part of it."""
        is_stopped = reason is FinishReason.STOP and token_ids
        return token_ids[:-1] if is_stopped and token_ids[-1] in self._stop_token_ids else token_ids
