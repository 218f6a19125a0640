"""Whole answers by grammar: thinking within a budget, then calls or what else is asked."""

import json

import pytest
from bitwatt.constraints.answer_shapes import (
    AnswerShape,
    CallShape,
    CallsShape,
    ThinkingShape,
)
from bitwatt.constraints.compiling import (
    TokenBytes,
    compile_grammar,
    new_tokenizer,
    written_for_matcher,
)
from bitwatt.constraints.structured_outputs import MAX_SCHEMA_CHARS, StructuredOutputsParams
from bitwatt.errors import InvalidRequestError

TOKENS = [*(bytes([i]) for i in range(256)), b"<think>", b"</think>", b"<call>"]
OPEN, CLOSE, CALL = 256, 257, 258
TOKENIZER = new_tokenizer(TokenBytes(TOKENS, [OPEN, CLOSE, CALL]), len(TOKENS))
CITY = {
    "$defs": {"city": {"type": "string", "maxLength": 9}},
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
}


def thinking(**options):
    return ThinkingShape(opening_id=OPEN, closing_id=CLOSE, **options)


def calls(*, begin=("<tool_call>\n",), must_call=True, is_parallel=True):
    return CallsShape(
        begin=begin,
        end=("\n</tool_call>",),
        between="\n",
        arguments_key="arguments",
        calls=[CallShape("weather", CITY), CallShape("clock", {"additionalProperties": False})],
        must_call=must_call,
        is_parallel=is_parallel,
    )


def takes(shape, *parts):
    """Return whether an answer of these texts and tokens is whole by the shape."""
    matcher = compile_grammar(written_for_matcher(shape.source("tools")), TOKENIZER)
    tokens = [t for part in parts for t in ([part] if isinstance(part, int) else part.encode())]
    return all(matcher.consume_token(token) for token in tokens) and matcher.is_accepting()


WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


BARE = {"begin": ("",), "end": ("",), "arguments_key": "parameters"}


def test_forced_calls_go_by_their_schemas_each_its_own():
    shape = AnswerShape(calls=calls())
    assert takes(shape, WEATHER)
    assert takes(shape, f"{WEATHER}\n{CLOCK}\n{WEATHER}")
    assert not takes(shape, WEATHER.replace("Rome", "Constantinople"))
    assert not takes(shape, WEATHER.replace("weather", "clock"))
    assert not takes(shape, "")
    assert not takes(shape, f"Well: {WEATHER}")


def test_one_call_at_most_where_they_are_not_parallel():
    shape = AnswerShape(calls=calls(is_parallel=False))
    assert takes(shape, CLOCK)
    assert not takes(shape, f"{CLOCK}\n{CLOCK}")


def test_a_mark_that_is_a_special_token_is_that_token():
    shape = AnswerShape(calls=calls(begin=(CALL, "\n")))
    assert takes(shape, CALL, CLOCK.removeprefix("<tool_call>"))
    assert not takes(shape, CLOCK)


def test_an_answer_that_may_call_is_calls_or_what_is_asked():
    answer = StructuredOutputsParams(choice=["yes", "no"]).source()
    shape = AnswerShape(calls=calls(must_call=False), answer=answer)
    assert takes(shape, CLOCK)
    assert takes(shape, "yes")
    assert not takes(shape, "yes" + CLOCK)


@pytest.mark.parametrize("is_open", [True, False])
def test_what_is_asked_of_an_answer_holds_behind_its_thinking(is_open):
    answer = StructuredOutputsParams(json={"type": "integer"}).source()
    shape = AnswerShape(thinking=thinking(is_open=is_open), answer=answer)
    thought = (() if is_open else (OPEN,)) + ("\nlet me see {\n", CLOSE)
    assert takes(shape, *thought, "12")
    assert takes(shape, *thought, "\n\n12")
    assert not takes(shape, *thought, "twelve")
    assert takes(shape, "12") is not is_open
    assert not takes(shape, *thought, "12", OPEN)


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_thinking_ends_at_its_budget(is_open, budget):
    shape = AnswerShape(thinking=thinking(is_open=is_open, max_tokens=budget))
    opening = () if is_open else (OPEN,)
    if budget or is_open:
        assert takes(shape, *opening, "x" * budget, CLOSE, "and an answer of any length")
    assert not takes(shape, *opening, "x" * (budget + 1), CLOSE, "yes")
    assert takes(shape, "no thought") is not is_open


def test_an_answer_without_thinking_may_have_the_marks_of_calls():
    shape = AnswerShape(thinking=thinking(is_open=True, max_tokens=3), marks=[CALL])
    assert takes(shape, CLOSE, "text ", CALL, " text")
    assert not takes(AnswerShape(thinking=thinking(is_open=True)), CLOSE, "text ", CALL)


def test_calls_that_may_come_go_by_their_schemas_wherever_they_stand():
    shape = AnswerShape(calls=calls(begin=(CALL, "\n"), must_call=False))
    call = WEATHER.removeprefix("<tool_call>")
    assert takes(shape, "I look. ", CALL, call, " and ", CALL, call)
    assert takes(shape, "no call")
    assert takes(shape, "")
    assert not takes(shape, CALL, call.replace("Rome", "Constantinople"))


def test_bare_calls_that_may_come_go_by_their_schemas_at_the_beginning():
    shape = AnswerShape(calls=CallsShape(**{**_fields(calls(must_call=False)), **BARE}))
    call = '{"name": "weather", "parameters": {"city": "Rome"}}'
    assert takes(shape, call)
    assert takes(shape, "Well, {")
    assert takes(shape, "")
    assert not takes(shape, '{"a": 1}')
    assert not takes(shape, call.replace("Rome", "Constantinople"))


def test_schemas_that_are_too_long_or_cannot_be_followed_are_refused_as_the_tools():
    long = CallsShape(
        begin=(),
        end=(),
        between="",
        arguments_key="arguments",
        calls=[CallShape("f", {"description": "x" * MAX_SCHEMA_CHARS})],
        must_call=True,
        is_parallel=True,
    )
    with pytest.raises(InvalidRequestError, match=str(MAX_SCHEMA_CHARS)) as raised:
        AnswerShape(calls=long).source("tools")
    assert raised.value.param == "tools"
    odd = json.loads('{"properties": {"a": {"type": "colour"}}}')
    shape = AnswerShape(calls=CallsShape(**{**_fields(long), "calls": [CallShape("f", odd)]}))
    with pytest.raises((InvalidRequestError, ValueError)):
        compile_grammar(written_for_matcher(shape.source("tools")), TOKENIZER)


def _fields(shape):
    return {name: getattr(shape, name) for name in shape.__struct_fields__}
