"""The shape of a whole answer: thinking up to a budget, then tool calls or what else is asked.

What is asked of an answer holds behind its thinking, which is free. A budget of tokens ends the
thinking by allowing nothing but its closing mark.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from bitwatt.constraints.structured_outputs import MAX_SCHEMA_CHARS, GrammarSource
from bitwatt.errors import InvalidRequestError

__all__ = ["ANSWER", "AnswerShape", "CallShape", "CallsShape", "ThinkingShape"]

ANSWER = "answer"
"""The name of the grammar that a shape's answer goes by."""

WriteSchema = Callable[[Any], str]


class ThinkingShape(msgspec.Struct, frozen=True, kw_only=True):
    """Thinking between two marks that are tokens.

    is_open     whether the prompt ends within it; else the model may begin it, or not
    max_tokens  it may have; None for any
    """

    opening_id: int
    closing_id: int
    is_open: bool
    max_tokens: int | None = None


class CallShape(msgspec.Struct, frozen=True):
    """A call of one tool, whose arguments go by the schema."""

    name: str
    schema: dict[str, Any]


class CallsShape(msgspec.Struct, frozen=True, kw_only=True):
    """Calls as a model's format writes them, around their JSON.

    begin, end  texts, and ids of special tokens
    must_call    whether the answer is calls and nothing else; otherwise it may be what else is
                 asked, or any text: then begin is a token, or empty for JSON at the very beginning
    is_parallel  whether there may be several, where they must be or an answer is asked
    """

    begin: Sequence[str | int]
    end: Sequence[str | int]
    between: str
    arguments_key: str
    calls: Sequence[CallShape]
    must_call: bool
    is_parallel: bool


class AnswerShape(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer consists of.

    answer  what it goes by where it is no call; None for any text
    marks   special tokens that may stand in such a text
    """

    thinking: ThinkingShape | None = None
    calls: CallsShape | None = None
    answer: GrammarSource | None = None
    marks: Sequence[int] = ()

    def source(self, param: str) -> GrammarSource:
        """Return it as a grammar; errors name the request's field param.

        Raises  InvalidRequestError where the tools' schemas are too long
        """
        if self.calls is not None:
            num_chars = len(json.dumps([call.schema for call in self.calls.calls]))
            if num_chars > MAX_SCHEMA_CHARS:
                raise InvalidRequestError(
                    f"tools have {num_chars} characters of schemas; the limit is "
                    f"{MAX_SCHEMA_CHARS} where calls go by them",
                    param="tools",
                )
        return GrammarSource("shape", msgspec.json.encode(self).decode(), param)

    def lark(self, write_schema: WriteSchema) -> str:
        """Return the grammar in Lark, in which @answer is what the answer goes by."""
        rules = [
            f"start: {self._thinking()} body",
            "TEXT: /(?s:.*)/",
            r"GAP: /\n{1,2}/",
            *self._thought(),
            *self._body(write_schema),
        ]
        return "\n".join(rules)

    def _thinking(self) -> str:
        thinking = self.thinking
        if thinking is None:
            return ""
        close = f"<[{thinking.closing_id}]> GAP?"
        if thinking.max_tokens == 0:
            return close if thinking.is_open else ""
        return f"thought {close}" if thinking.is_open else f"(opened thought {close})?"

    def _thought(self) -> list[str]:
        thinking = self.thinking
        if thinking is None or thinking.max_tokens == 0:
            return []
        limit = "" if thinking.max_tokens is None else f"[max_tokens={thinking.max_tokens}]"
        rules = [f"thought{limit}: TEXT"]
        return rules if thinking.is_open else [*rules, f"opened: <[{thinking.opening_id}]>"]

    def _body(self, write_schema: WriteSchema) -> list[str]:
        calls = self.calls
        marks = "".join(f" | <[{mark}]>" for mark in self.marks)
        free = f"@{ANSWER}" if self.answer is not None else f"(TEXT{marks})*"
        if calls is None:
            return [f"body: {free}"]
        begin, end = _symbols(calls.begin), _symbols(calls.end)
        more = f" ({json.dumps(calls.between)} call)*" if calls.is_parallel else ""
        if calls.must_call:
            body = "calls"
        elif self.answer is not None:
            body = f"calls | {free}"
        elif isinstance(calls.begin[0], int):
            body = "(TEXT | call)*"
        else:
            body = "(calls | OTHER)?"
        rules = [f"body: {body}", f"calls: call{more}", r"OTHER: /[^\s{](?s:.*)/"]
        for number, call in enumerate(calls.calls):
            opening = f'{{"name": {json.dumps(call.name)}, "{calls.arguments_key}": '
            schema = write_schema({"type": "object", **call.schema})
            rules.append(f'call{number}: {json.dumps(opening)} %json {schema} "}}"')
        choices = " | ".join(f"call{number}" for number in range(len(calls.calls)))
        return [*rules, f"call: {begin} ({choices}) {end}"]


def _symbols(parts: Sequence[str | int]) -> str:
    return " ".join(
        f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part != ""
    )
