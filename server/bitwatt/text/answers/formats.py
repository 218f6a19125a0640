"""How models write their thinking and their tool calls, and which of it a chat template says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from bitwatt.text.answers.call_parsers import BareCalls, TaggedCalls
from bitwatt.text.answers.pieces import CallParser

__all__ = [
    "CALL_FORMATS",
    "GENERIC_CALLS",
    "THINKING_FORMATS",
    "CallFormat",
    "ReasoningParser",
    "ThinkingFormat",
    "ToolCallParser",
    "call_format_of",
    "thinking_format_of",
]


ToolCallParser = Literal["auto", "none", "hermes", "llama3_json", "qwen3_coder"]
ReasoningParser = Literal["auto", "none", "think"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """A way to write tool calls.

    begin, arguments_key, end  what a grammar writes a forced call with, around its JSON
    between     and between two calls
    marks       texts that a parser looks for, though a tokenizer has special tokens for them
    said_by     a template that has one of these texts teaches the format
    new_parser  takes JSON schemas of parameters by tools' names, and whether the answer is calls
                and nothing else
    """

    name: str
    begin: str = ""
    end: str = ""
    between: str
    arguments_key: str
    marks: tuple[str, ...] = ()
    said_by: tuple[str, ...]
    new_parser: Callable[[Mapping[str, Mapping[str, Any]], bool], CallParser]


_TAGS: dict[str, Any] = {
    "begin": "<tool_call>\n",
    "end": "\n</tool_call>",
    "between": "\n",
    "arguments_key": "arguments",
    "marks": ("<tool_call>", "</tool_call>"),
}
CALL_FORMATS: dict[str, CallFormat] = {
    call_format.name: call_format
    for call_format in (
        CallFormat(
            name="qwen3_coder",
            said_by=("<function=",),
            new_parser=partial(TaggedCalls, bare_functions=True),
            **_TAGS,
        ),
        CallFormat(
            name="hermes",
            said_by=("<tool_call>",),
            new_parser=partial(TaggedCalls, bare_functions=False),
            **_TAGS,
        ),
        CallFormat(
            name="llama3_json",
            between="; ",
            arguments_key="parameters",
            marks=("<|python_tag|>",),
            said_by=("<|python_tag|>", '"parameters": dictionary of argument name'),
            new_parser=BareCalls,
        ),
    )
}
"""By vLLM's names, in the order in which a template is asked for them."""

GENERIC_CALLS = CallFormat(
    name="generic", between="\n", arguments_key="arguments", said_by=(), new_parser=BareCalls
)
"""How calls are forced on a model whose template knows no tools: an object each, line by line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingFormat:
    """The marks that a model thinks between."""

    name: str
    opening: str
    closing: str

    @property
    def marks(self) -> tuple[str, str]:
        """Both."""
        return self.opening, self.closing


THINKING_FORMATS: dict[str, ThinkingFormat] = {
    "think": ThinkingFormat(name="think", opening="<think>", closing="</think>")
}


def call_format_of(literals: str) -> CallFormat | None:
    """Return the format that a template's own texts teach; None where they teach none known."""
    formats = CALL_FORMATS.values()
    return next((f for f in formats if any(text in literals for text in f.said_by)), None)


def thinking_format_of(literals: str) -> ThinkingFormat | None:
    """Return the format that a template's own texts show; None where they show none known."""
    return next((f for f in THINKING_FORMATS.values() if f.closing in literals), None)
