"""The pieces of an answer, in the order in which the model wrote them, without any API's words."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

__all__ = [
    "Answer",
    "AnswerPiece",
    "Call",
    "CallArguments",
    "CallClosed",
    "CallOpened",
    "CallParser",
    "Content",
    "Reasoning",
    "whole_answer",
]


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's thinking, before its content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallOpened:
    """A tool call begins; calls count from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: JSON as the model wrote it, which nobody has checked."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallClosed:
    """No more comes of a call. Each call that was opened is closed, though the text was cut.

    is_cut  whether it was, before the arguments' end
    """

    index: int
    is_cut: bool = False


AnswerPiece = Content | Reasoning | CallOpened | CallArguments | CallClosed


class CallParser(Protocol):
    """Tells tool calls from content.

    The pieces of push and finish say the same, however the text was split.
    """

    def push(self, text: str) -> list[AnswerPiece]:
        """Return what is certain now."""

    def finish(self) -> list[AnswerPiece]:
        """Return the rest; no more text comes."""


@dataclass(slots=True)
class Call:
    """A tool call; its arguments are JSON, unless the model wrote none or was cut.

    is_cut  as CallClosed has it
    """

    name: str
    arguments: str = ""
    is_cut: bool = False


@dataclass(slots=True)
class Answer:
    """A whole answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @property
    def has_called(self) -> bool:
        """Whether there are calls, all of them whole: the last one alone may be cut."""
        return bool(self.calls) and not self.calls[-1].is_cut


def whole_answer(pieces: Iterable[AnswerPiece]) -> Answer:
    """Return the answer that the pieces make, which may be those of several pushes."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[Call] = []
    arguments: list[list[str]] = []
    for piece in pieces:
        match piece:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallOpened(_, name):
                calls.append(Call(name))
                arguments.append([])
            case CallArguments(index, text):
                arguments[index].append(text)
            case CallClosed(index, is_cut):
                calls[index].is_cut = is_cut
    for call, texts in zip(calls, arguments, strict=True):
        call.arguments = "".join(texts)
    return Answer("".join(content), "".join(reasoning), calls)
