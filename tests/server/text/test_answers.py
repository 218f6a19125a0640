"""Answers told apart: thinking, content and tool calls, however their text was split."""

import json

import pytest
from bitwatt.text.answers.formats import CALL_FORMATS, GENERIC_CALLS, call_format_of
from bitwatt.text.answers.parser import AnswerParser
from bitwatt.text.answers.pieces import Call, CallClosed, CallOpened, whole_answer
from bitwatt.text.answers.thinking import ThinkingSplitter
from hypothesis import example, given
from hypothesis import strategies as st

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "exact": {"type": "boolean"},
        "places": {"type": "array", "items": {"type": "string"}},
        "unit": {"enum": ["C", "F"]},
        "note": {"type": ["string", "null"]},
    },
}
TOOLS = {"weather": WEATHER, "clock": {"type": "object", "properties": {}}}
FORMATS = {**CALL_FORMATS, "generic": GENERIC_CALLS}


def new_parser(name=None, *, part=None, max_calls=None, must_call=False):
    thinking = None if part is None else ThinkingSplitter("<think>", "</think>", part)
    calls = None if name is None else FORMATS[name].new_parser(TOOLS, must_call)
    return AnswerParser(thinking, calls, max_calls=max_calls)


def read(parser, texts):
    return [piece for text in texts for piece in parser.push(text)] + parser.finish()


def answer(text, name=None, **options):
    return whole_answer(read(new_parser(name, **options), [text]))


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln, \\"}"}}\n</tool_call>'
CODER = (
    '<tool_call>\n<function=weather>\n<parameter=city>\nNew\nYork "<b>"\n</parameter>\n'
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
LLAMA = '{"name": "weather", "parameters": {"city": "Köln"}}'


def test_a_call_between_marks_is_told_with_its_arguments_as_they_stand():
    told = answer(f"Let me look.\n{HERMES}\n", "hermes")
    assert told.content == "Let me look."
    assert told.calls == [Call("weather", '{"city": "Köln, \\"}"}')]


def test_calls_follow_one_another_and_text_between_them_is_content():
    told = answer(f"{HERMES}\n{HERMES} and \n{HERMES} done ", "hermes")
    assert [call.name for call in told.calls] == ["weather"] * 3
    assert told.content == "anddone "


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"arguments": {"city": "a"}, "name": "weather"}', '{"city": "a"}'),
        ('{"name": "weather", "parameters": {}}', "{}"),
        ('{"name": "weather"}', "{}"),
        ('{"name": "weather", "arguments": null}', "{}"),
        ('{"id": {"name": "x"}, "name": "weather", "arguments": {"days": [1]}}', '{"days": [1]}'),
        ('{"name": "weather", "arguments": "{\\"days\\": 3}"}', '{"days": 3}'),
        ('{"name": "weather", "arguments": {"days": 3}}}', '{"days": 3}'),
        ('{"name": "weather", "arguments": {"days": 3}, }', '{"days": 3}'),
        ('{"name": "weather", "arguments": {"a": [1, }}', '{"a": [1, }}'),
    ],
)
def test_json_that_models_write_in_other_ways_is_a_call_too(body, arguments):
    told = answer(f"<tool_call>{body}</tool_call>", "hermes")
    if arguments == '{"a": [1, }}':  # never closed: the rest is its arguments'
        assert told.calls[0].arguments.startswith(arguments)
    else:
        assert told.calls == [Call("weather", arguments)]
        assert told.content == ""


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>no call</tool_call>",
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        "<tool_call>",
        '<tool_call>\n{"name": ',
        '<tool_call>{"name": 3}',
        "a < b, <tool",
        "",
    ],
)
def test_what_only_looks_like_a_call_is_content(text):
    assert answer(text, "hermes").content == text
    assert answer(text, "hermes").calls == []


def test_a_cut_call_keeps_what_came_and_is_closed():
    pieces = read(new_parser("hermes"), [HERMES[: HERMES.index("ty")]])
    assert whole_answer(pieces).calls == [Call("weather", '{"ci', is_cut=True)]
    assert pieces[-1] == CallClosed(0, is_cut=True)
    pieces = read(new_parser("qwen3_coder"), [CODER[: CODER.index("York")]])
    assert whole_answer(pieces).calls[0].arguments == '{"city": "New'
    assert pieces[-1] == CallClosed(0, is_cut=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_forced_call_that_is_cut_is_one_from_its_name_on_and_never_content(name, size):
    form = FORMATS[name]
    arguments = '{"city": "Rome", "days": 3}'
    head = f'{form.begin}{{"name": "weather", '
    call = f'{head}"{form.arguments_key}": {arguments}}}{form.end}'
    text = f"{call}{form.between}{call}"
    for end in range(len(text) + 1):
        cut = [text[at : min(at + size, end)] for at in range(0, end, size)]
        told = whole_answer(read(new_parser(name, must_call=True), cut))
        assert told.content == ""
        second = len(call) + len(form.between)
        starts = [start for start in (0, second) if end > start + len(head) - 3]
        assert [one.name for one in told.calls] == ["weather"] * len(starts)
        for one, start in zip(told.calls, starts, strict=True):
            at = text.index(arguments, start)
            assert one.arguments == arguments[: max(0, end - at)]
            assert one.is_cut == (end < at + len(arguments))


def test_parameters_in_xml_become_json_by_their_schema():
    told = answer(
        "<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n12\n"
        '</parameter>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=places>\n["a"]\n'
        "</parameter>\n<parameter=unit>\nC\n</parameter>\n<parameter=note>\nnull\n</parameter>\n"
        "<parameter=other>\n5\n</parameter>\n</function>\n</tool_call>",
        "qwen3_coder",
    )
    [call] = told.calls
    assert json.loads(call.arguments) == {
        "city": "12",
        "days": 12,
        "exact": True,
        "places": ["a"],
        "unit": "C",
        "note": None,
        "other": "5",
    }


def test_text_in_xml_keeps_its_lines_and_quotes():
    [call] = answer(CODER, "qwen3_coder").calls
    assert json.loads(call.arguments) == {"city": 'New\nYork "<b>"', "days": 3}


def test_a_coder_may_write_json_and_leave_marks_out():
    assert answer(HERMES, "qwen3_coder").calls[0].name == "weather"
    text = "Now.\n<function=clock>\n</function>\n<tool_call>\n<function=clock></tool_call> end"
    told = answer(text, "qwen3_coder")
    assert told.calls == [Call("clock", "{}"), Call("clock", "{}")]
    assert told.content == "Now.end"


@pytest.mark.parametrize("between", ["; ", ";", "\n", ", ", ""])
def test_bare_calls_follow_one_another(between):
    told = answer(f"<|python_tag|>{LLAMA}{between}{LLAMA}\n", "llama3_json")
    assert told.calls == [Call("weather", '{"city": "Köln"}')] * 2
    assert told.content == ""


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "weather"}',
        '{"name": "unknown", "parameters": {}}',
        ' {"name": "Ada", "arguments": 3}',
        '{"a": 1}',
        "Look: " + LLAMA,
        "[1, 2]",
        " ",
        "<|python_tag|>print(1)",
    ],
)
def test_bare_json_is_a_call_only_of_a_known_tool_at_the_beginning(text):
    told = answer(text, "llama3_json")
    assert (told.content, told.calls) == (text, [])


def test_no_more_calls_are_told_than_may_be():
    parser = new_parser("hermes", max_calls=1)
    pieces = read(parser, [f"{HERMES}\n{HERMES}\nmore"])
    assert [piece for piece in pieces if isinstance(piece, CallOpened)] == [
        CallOpened(0, "weather")
    ]
    assert parser.is_complete
    assert whole_answer(pieces).content == ""


@pytest.mark.parametrize(
    ("part", "text", "reasoning", "content"),
    [
        ("may come", "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("may come", "\n<think></think>\n\nyes", "", "yes"),
        ("may come", "yes <think>no</think>", "", "yes <think>no</think>"),
        ("may come", "  yes", "", "  yes"),
        ("may come", "<thin", "", "<thin"),
        ("open", "hm\n\nhm </think>yes", "hm\n\nhm", "yes"),
        ("open", "hm </thi", "hm </thi", ""),
        ("open", "", "", ""),
        ("over", "<think>a</think>", "", "<think>a</think>"),
    ],
)
def test_thinking_is_told_from_the_answer(part, text, reasoning, content):
    told = answer(text, part=part)
    assert (told.reasoning, told.content) == (reasoning, content)


def test_calls_within_thinking_are_thought_and_not_made():
    told = answer(f"{HERMES}</think>{HERMES}", "hermes", part="open")
    assert told.reasoning == HERMES
    assert len(told.calls) == 1


WORDS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=", "weather", ">", "<parameter=", "city", "\n"),
        *("</parameter>", "</function>", "<think>", "</think>", "{", "}", '"name": ', '"weather"'),
        *('"arguments": ', '"', "\\", ",", ";", " ", "<|python_tag|>", "x", "é", "[", "]", "3"),
        *(HERMES, CODER, LLAMA, '{"name": "weather", '),
    ]
)


@given(
    st.sampled_from([None, *FORMATS]),
    st.sampled_from([None, "may come", "open", "over"]),
    st.lists(WORDS, max_size=12),
    st.integers(1, 7),
    st.sampled_from([None, 1]),
)
@example("hermes", "may come", ["<think>", "x", "</think>", " ", HERMES], 1, None)
def test_an_answer_is_the_same_however_its_text_was_split(name, part, words, size, max_calls):
    text = "".join(words)
    options = {"part": part, "max_calls": max_calls}
    whole = read(new_parser(name, **options), [text])
    split = [text[at : at + size] for at in range(0, len(text), size)]
    parts = read(new_parser(name, **options), split)
    assert whole_answer(whole) == whole_answer(parts) == answer(text, name, **options)
    opened = [piece.index for piece in parts if isinstance(piece, CallOpened)]
    assert opened == [piece.index for piece in parts if isinstance(piece, CallClosed)]
    assert opened == list(range(len(opened)))


@pytest.mark.parametrize(
    ("literals", "name"),
    [
        ("<|im_start|>\0<tool_call>\n", "hermes"),
        ("<tool_call>\0\n<function=example", "qwen3_coder"),
        (
            '{"name": function name, "parameters": dictionary of argument name and its value}.',
            "llama3_json",
        ),
        ("[TOOL_CALLS]", None),
    ],
)
def test_a_template_tells_the_format_that_it_teaches(literals, name):
    found = call_format_of(literals)
    assert (found and found.name) == name
