"""How one model's answers are written, and a reader for each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwatt.text.answers.formats import (
    CALL_FORMATS,
    THINKING_FORMATS,
    CallFormat,
    ReasoningParser,
    ThinkingFormat,
    ToolCallParser,
    call_format_of,
    thinking_format_of,
)
from bitwatt.text.answers.parser import AnswerParser
from bitwatt.text.answers.thinking import ThinkingPart, ThinkingSplitter

__all__ = ["AnswerForms", "forms_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForms:
    """What is known of a model's answers.

    calls        how it writes tool calls; None where that isn't known
    thinking     how it writes its thinking; None where it doesn't think
    takes_tools  whether its chat template tells the model of tools
    """

    calls: CallFormat | None = None
    thinking: ThinkingFormat | None = None
    takes_tools: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts between which the parts of an answer stand."""
        of_thinking = self.thinking.marks if self.thinking else ()
        return (*of_thinking, *(self.calls.marks if self.calls else ()))

    def part_after(self, text: str) -> ThinkingPart:
        """Return where an answer begins that follows this text, the end of a prompt."""
        thinking = self.thinking
        if thinking is None:
            return "over"
        if text.rstrip().endswith(thinking.opening):
            return "open"
        return "over" if text.rstrip().endswith(thinking.closing) else "may come"

    def part_within(self, text: str) -> ThinkingPart:
        """Return where an answer goes on that begins with this text."""
        thinking = self.thinking
        if thinking is not None and text.rfind(thinking.opening) > text.rfind(thinking.closing):
            return "open"
        return "over"

    def new_parser(
        self,
        part: ThinkingPart,
        calls: CallFormat | None = None,
        tools: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        must_call: bool = False,
        max_calls: int | None = None,
    ) -> AnswerParser:
        """Return a reader of one answer.

        part   where it begins
        calls  how its calls are written; None reads none
        tools  JSON schemas of parameters by name
        must_call  whether the answer is calls and nothing else, behind its thinking
        """
        thinking = self.thinking
        splitter = None
        if thinking is not None and part != "over":
            splitter = ThinkingSplitter(thinking.opening, thinking.closing, part)
        parser = None if calls is None else calls.new_parser(tools or {}, must_call)
        return AnswerParser(splitter, parser, max_calls=max_calls)


def forms_of(
    literals: str,
    *,
    takes_tools: bool,
    call_format: ToolCallParser = "auto",
    thinking_format: ReasoningParser = "auto",
) -> AnswerForms:
    """Return the forms that the templates' own texts show.

    call_format, thinking_format  names that say otherwise; "none" for neither
    """
    calls = call_format_of(literals) if call_format == "auto" else CALL_FORMATS.get(call_format)
    by_name = THINKING_FORMATS.get(thinking_format)
    thinking = thinking_format_of(literals) if thinking_format == "auto" else by_name
    return AnswerForms(calls=calls, thinking=thinking, takes_tools=takes_tools)
