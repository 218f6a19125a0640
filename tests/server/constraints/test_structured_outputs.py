"""What may be asked of an answer, and what is refused, by field and limit."""

import json

import pytest
from bitwatt import StructuredOutputsParams
from bitwatt.constraints.compiling import compile_grammar, new_tokenizer, written_for_matcher
from bitwatt.errors import InvalidRequestError

from tests.server.constraints.tokens import VOCAB_SIZE, VOCABULARY, token_ids

TOKENIZER = new_tokenizer(VOCABULARY.for_grammars(), VOCAB_SIZE)
INTEGER = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAG = {
    "structures": [{"begin": "<f=w>", "schema": {"type": "object"}, "end": "</f>"}],
    "triggers": ["<f="],
}


def follows(text, **asked):
    source = StructuredOutputsParams(**asked).source()
    matcher = compile_grammar(written_for_matcher(source), TOKENIZER)
    ids = token_ids(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("asked", "text", "other"),
    [
        ({"regex": "ab*"}, "abb", "xab"),
        ({"regex": "^a/b\n$"}, "a/b\n", "a/b"),
        ({"choice": ["yes", 'no "or"\n\\n']}, 'no "or"\n\\n', "no"),
        ({"choice": ["日本🙂"]}, "日本🙂", "日本"),
        ({"grammar": 'root ::= "a" | "b" root'}, "bba", "b"),
        ({"grammar": '?start: "a" | "b" start'}, "bba", "b"),
        ({"json_object": True}, '{"a": [1, null]}', "[1]"),
        ({"json_object": True, "disable_any_whitespace": True}, '{"a":1}', '{"a": 1}'),
        ({"json_object": True, "whitespace_pattern": "\t"}, '{"a":\t1}', '{"a": 1}'),
        ({"json": INTEGER}, '{\n    "a": 1, "b": 2}', '{"a": 1.5}'),
        ({"json": json.dumps(INTEGER)}, '{"a": -1}', '{"a": "1"}'),
        ({"json": INTEGER, "disable_additional_properties": True}, "{}", '{"b": 2}'),
        ({"json": True}, "5", "five"),
        ({"structural_tag": TAG}, 'so <f=w>{"c": 3}</f> done', "so <f=w>three</f>"),
        ({"structural_tag": TAG}, "a <b> text", "<f=x>"),
    ],
)
def test_an_answer_is_what_was_asked_for_and_nothing_else(asked, text, other):
    assert follows(text, **asked)
    assert not follows(other, **asked)


def test_json_has_no_long_white_space_between_its_tokens():
    assert follows('{"a":\n' + " " * 20 + "1}", json_object=True)
    assert not follows('{"a":\n\n1}', json_object=True)
    assert not follows('{"a":   1}', json_object=True)


@pytest.mark.parametrize(
    ("asked", "param", "told"),
    [
        ({}, "structured_outputs", "it has none"),
        ({"json_object": False}, "structured_outputs", "it has none"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs", "it has regex and choice"),
        ({"regex": 5}, "structured_outputs.regex", "is 5; it must be a string"),
        ({"regex": "a" * 2049}, "structured_outputs.regex", "2049 characters; the limit is 2048"),
        ({"grammar": "a" * 16385}, "structured_outputs.grammar", "the limit is 16384"),
        ({"json": {"a": "a" * 65536}}, "structured_outputs.json", "the limit is 65536"),
        ({"json": [1]}, "structured_outputs.json", "it must be a JSON schema"),
        ({"json": {"a": float("nan")}}, "structured_outputs.json", "is no JSON"),
        ({"choice": []}, "structured_outputs.choice", "it must be texts, none of them empty"),
        (
            {"choice": ["a", ""]},
            "structured_outputs.choice",
            "it must be texts, none of them empty",
        ),
        ({"choice": ["a"] * 1001}, "structured_outputs.choice", "1001 texts; the limit is 1000"),
        ({"regex": "\ud800"}, "structured_outputs.regex", "lone surrogate"),
        ({"json_object": True, "disable_any_whitespace": 1}, None, "it must be true or false"),
    ],
)
def test_what_is_beyond_a_limit_is_refused_with_the_field_and_the_limit(asked, param, told):
    with pytest.raises(InvalidRequestError, match=told) as raised:
        StructuredOutputsParams(**asked)
    assert param is None or raised.value.param == param


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"json": "{"}, "Expecting property name"),
        ({"json": "[]"}, "a schema is an object"),
        ({"json": False}, "nothing is valid"),
        ({"structural_tag": {"structures": [{}], "triggers": ["<"]}}, "has a begin"),
        ({"structural_tag": {**TAG, "triggers": ["<g"]}}, "no trigger begins"),
        ({"structural_tag": {**TAG, "triggers": [""]}}, "none empty"),
        ({"grammar": '%llguidance {"a": 1}\nstart: "a"'}, "%llguidance"),
    ],
)
def test_what_is_no_grammar_is_refused_with_the_field_and_the_reason(asked, told):
    source = StructuredOutputsParams(**asked).source()
    with pytest.raises(InvalidRequestError, match=told) as raised:
        written_for_matcher(source)
    assert raised.value.param == source.param
    assert str(raised.value).startswith(f"{source.param} can't be followed: ")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"json": {"not": {}}}, r'Unimplemented keys: \["not"\]'),
        ({"json": {"type": "string", "minLength": 5, "maxLength": 3}}, "Unsatisfiable"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
    ],
)
def test_a_keyword_that_cant_be_followed_is_named_in_one_line(asked, told):
    grammar = written_for_matcher(StructuredOutputsParams(**asked).source())
    with pytest.raises(ValueError, match=told) as raised:
        compile_grammar(grammar, TOKENIZER)
    assert "\n" not in str(raised.value)
    assert "llguidance" not in str(raised.value)
