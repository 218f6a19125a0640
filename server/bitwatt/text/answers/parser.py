"""Reads one answer's text as it comes: thinking first, then content and tool calls."""

from collections.abc import Iterable

from bitwatt.text.answers.pieces import (
    AnswerPiece,
    CallClosed,
    CallParser,
    Content,
    Reasoning,
)
from bitwatt.text.answers.thinking import ThinkingSplitter

__all__ = ["AnswerParser"]


class AnswerParser:
    """Tells the pieces of an answer. They are the same, however its text was split.

    is_complete  as many calls as may be have ended: no more is told of the answer
    num_calls    that have ended
    """

    __slots__ = ("_calls", "_max_calls", "_thinking", "is_complete", "num_calls")

    def __init__(
        self,
        thinking: ThinkingSplitter | None = None,
        calls: CallParser | None = None,
        *,
        max_calls: int | None = None,
    ) -> None:
        """Begin; without a part's own reader all is content."""
        self._thinking = thinking
        self._calls = calls
        self._max_calls = max_calls
        self.is_complete = False
        self.num_calls = 0

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends within the model's thinking."""
        return self._thinking is not None and self._thinking.part == "open"

    def push(self, text: str) -> list[AnswerPiece]:
        """Return what is certain now."""
        if self.is_complete:
            return []
        reasoning, content = ("", text) if self._thinking is None else self._thinking.push(text)
        return self._told(reasoning, self._read(content))

    def finish(self) -> list[AnswerPiece]:
        """Return the rest; no more text comes."""
        if self.is_complete:
            return []
        reasoning, content = ("", "") if self._thinking is None else self._thinking.finish()
        told = self._read(content)
        return self._told(reasoning, told + (self._calls.finish() if self._calls else []))

    def _read(self, content: str) -> list[AnswerPiece]:
        if not content:
            return []
        return [Content(content)] if self._calls is None else self._calls.push(content)

    def _told(self, reasoning: str, told: Iterable[AnswerPiece]) -> list[AnswerPiece]:
        pieces: list[AnswerPiece] = [Reasoning(reasoning)] if reasoning else []
        for piece in told:
            pieces.append(piece)
            if isinstance(piece, CallClosed):
                self.num_calls = piece.index + 1
                if self.num_calls == self._max_calls:
                    self.is_complete = True
                    break
        return pieces
