"""What is asked of an answer besides its sampling: tools, thinking, and how its text is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitwatt.constraints.answer_shapes import AnswerShape, CallShape, CallsShape, ThinkingShape
from bitwatt.constraints.structured_outputs import GrammarSource
from bitwatt.engine.messages import Submit
from bitwatt.errors import InvalidRequestError
from bitwatt.serving.choice import ChoiceReader, ThinkingTokens
from bitwatt.text.answers.formats import GENERIC_CALLS, CallFormat
from bitwatt.text.answers.forms import AnswerForms
from bitwatt.text.answers.parser import AnswerParser
from bitwatt.text.answers.thinking import ThinkingPart
from bitwatt.text.codec import TextCodec

__all__ = ["AnswerOptions", "AnswerPlan", "Tool", "ToolUse", "new_reader", "plan_answer"]

_NO_PARAMETERS: Mapping[str, Any] = {"properties": {}, "additionalProperties": False}
_TAIL_TOKENS = 16  # of a prompt, among which a template's mark of thinking stands


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the caller runs.

    parameters  their JSON schema; None for a function without any
    is_strict   whether its arguments must go by the schema, though it isn't forced
    """

    name: str
    parameters: Mapping[str, Any] | None = None
    is_strict: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of its arguments."""
        return dict(_NO_PARAMETERS if self.parameters is None else self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of an answer, at least one.

    must_call    whether the answer is calls, of those tools; otherwise it may be
    only         the name of the one tool that must be called, and once
    is_parallel  whether there may be several calls
    """

    tools: Sequence[Tool]
    must_call: bool = False
    only: str | None = None
    is_parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How an answer is read, and what it must be.

    tools            None where it calls none
    thinking_budget  tokens of thinking at most; None for any number
    continued        the text that the prompt ends with and the answer goes on with, if any
    """

    tools: ToolUse | None = None
    thinking_budget: int | None = None
    continued: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPlan:
    """How the choices of one prompt are drawn and read.

    part       of the thinking, where they begin
    thinking   between tokens; None where there is none, or it has other marks
    grammar    what they go by; None for any text
    calls      how their calls are written; None where none is read
    must_call  whether they are calls and nothing else
    schemas    of the tools' parameters, by name
    max_calls  of each; None for any number
    """

    forms: AnswerForms
    part: ThinkingPart
    thinking: ThinkingShape | None
    grammar: GrammarSource | None
    calls: CallFormat | None = None
    must_call: bool = False
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_calls: int | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that a reader has to see."""
        of_thinking = self.forms.thinking.marks if self.forms.thinking else ()
        return (*of_thinking, *(self.calls.marks if self.calls else ()))

    def new_counter(self) -> ThinkingTokens | None:
        """Return what counts the tokens of one choice's thinking; None where it has no marks."""
        if self.thinking is None:
            return None
        return ThinkingTokens(self.thinking.opening_id, self.thinking.closing_id, self.part)

    def new_parser(self) -> AnswerParser | None:
        """Return a reader of one choice; None where all of it is content."""
        if self.calls is None and (self.part == "over" or self.forms.thinking is None):
            return None
        return self.forms.new_parser(
            self.part,
            self.calls,
            self.schemas,
            must_call=self.must_call,
            max_calls=self.max_calls,
        )


def new_reader(
    index: int,
    submit: Submit,
    text: TextCodec,
    stops: Sequence[str],
    plan: AnswerPlan | None,
    *,
    lists_stop_token: bool = False,
) -> ChoiceReader:
    """Return what reads one choice; without a plan all of it is content.

    index, lists_stop_token  as ChoiceReader has them
    """
    return ChoiceReader(
        index,
        submit,
        text.output(
            stops,
            min_tokens=submit.sampling.min_tokens,
            spelled=() if plan is None else plan.marks,
        ),
        lists_stop_token=lists_stop_token,
        parser=None if plan is None else plan.new_parser(),
        thinking=None if plan is None else plan.new_counter(),
    )


def plan_answer(
    options: AnswerOptions,
    text: TextCodec,
    prompt: Sequence[int],
    grammar: GrammarSource | None,
) -> AnswerPlan:
    """Return how answers to the prompt are drawn and read.

    grammar  what is asked of an answer that is no call

    Raises  InvalidRequestError for tools that the model's template doesn't know, and for a budget
            where the end of the model's thinking is no token
    """
    forms, use = text.forms, options.tools
    if options.continued is None:
        part = forms.part_after(text.decode(prompt[-_TAIL_TOKENS:]))
    else:
        part = forms.part_within(options.continued)
    calls = None if use is None else _call_format(use, forms)
    shape = AnswerShape(
        thinking=_thinking(options, text, part),
        calls=None if use is None or calls is None else _calls_shape(use, calls, text, grammar),
        answer=None if use is not None and use.must_call else grammar,
        marks=[] if calls is None else sorted(_mark_ids(calls, text).values()),
    )
    is_bound = grammar is not None or options.thinking_budget is not None
    if shape.calls is not None:
        source: GrammarSource | None = shape.source("tools")
    elif shape.thinking is not None and is_bound:
        source = shape.source("thinking_token_budget" if grammar is None else grammar.param)
    else:
        source = grammar
    if source is not None and shape.thinking is None:
        part = "over"  # the grammar holds from the first token, whatever the prompt leads into
    return AnswerPlan(
        forms=forms,
        part=part,
        thinking=shape.thinking,
        grammar=source,
        calls=calls,
        must_call=use is not None and use.must_call,
        schemas={} if use is None else {tool.name: tool.schema for tool in use.tools},
        max_calls=None if use is None or (use.is_parallel and use.only is None) else 1,
    )


def _call_format(use: ToolUse, forms: AnswerForms) -> CallFormat:
    """Return how the model is to write its calls."""
    if use.must_call:
        return forms.calls or GENERIC_CALLS
    if not forms.takes_tools:
        raise InvalidRequestError(
            "this model's chat template takes no tools, so the model would never see them; "
            'tool_choice "required", or one that names a function, forces a call all the same',
            param="tools",
        )
    if forms.calls is None:
        raise InvalidRequestError(
            "how this model writes tool calls can't be told from its chat template "
            '(--tool-call-parser); tool_choice "required", or one that names a function, forces a '
            "call all the same",
            param="tools",
        )
    return forms.calls


def _calls_shape(
    use: ToolUse, calls: CallFormat, text: TextCodec, grammar: GrammarSource | None
) -> CallsShape | None:
    """Return what calls go by; None where the model is free to write them as it likes."""
    is_strict = any(tool.is_strict for tool in use.tools)
    if not use.must_call and grammar is None and not is_strict:
        return None
    begin = _symbols(calls.begin, calls, text)
    if not use.must_call and grammar is None and begin[0] != "" and isinstance(begin[0], str):
        raise InvalidRequestError(
            "strict tools that the model may call or not need a token that begins a call, and "
            f"its tokenizer has none for {begin[0].strip()}; leave strict out, or force a call",
            param="tools",
        )
    return CallsShape(
        begin=begin,
        end=_symbols(calls.end, calls, text),
        between=calls.between,
        arguments_key=calls.arguments_key,
        calls=[
            CallShape(tool.name, tool.schema if use.must_call or tool.is_strict else {})
            for tool in use.tools
            if use.only in (None, tool.name)
        ],
        must_call=use.must_call,
        is_parallel=use.is_parallel and use.only is None,
    )


def _mark_ids(calls: CallFormat, text: TextCodec) -> dict[str, int]:
    known = text.vocabulary.mark_ids
    return {mark: known[mark] for mark in calls.marks if mark in known}


def _symbols(written: str, calls: CallFormat, text: TextCodec) -> list[str | int]:
    """Return the text with the ids of those marks in it that are tokens."""
    mark_ids = _mark_ids(calls, text)
    if not mark_ids:
        return [written]
    parts = re.split(f"({'|'.join(map(re.escape, mark_ids))})", written)
    return [mark_ids.get(part, part) for part in parts if part] or [""]


def _thinking(options: AnswerOptions, text: TextCodec, part: ThinkingPart) -> ThinkingShape | None:
    thinking, mark_ids = text.forms.thinking, text.vocabulary.mark_ids
    if thinking is None or part == "over":
        return None
    if thinking.opening not in mark_ids or thinking.closing not in mark_ids:
        if options.thinking_budget is not None:
            raise InvalidRequestError(
                f"this model's tokenizer has no token for {thinking.closing}, so its thinking "
                "can't be ended",
                param="thinking_token_budget",
            )
        return None
    return ThinkingShape(
        opening_id=mark_ids[thinking.opening],
        closing_id=mark_ids[thinking.closing],
        is_open=part == "open",
        max_tokens=options.thinking_budget,
    )
