"""Tools and thinking in chat, through OpenAI's own client and a real server."""

import json
from contextlib import asynccontextmanager
from functools import cache

import openai
import pytest
from bitwatt.scheduling.request import FinishReason
from bitwatt.text.processor import TextProcessor

from tests.fakes import FakeEngine, make_app, make_client, make_info, make_text, run_server
from tests.server.text.templates import PublishedTemplate

pytestmark = pytest.mark.anyio

_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.tool_call_id %} of {{ m.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOLD = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
HERMES = "{# #}" + _TOLD + "{{ '<tool_call>' if false }}" + _TURNS
CODER = _TOLD + "{{ '<tool_call>\n<function=' if false }}" + _TURNS
LLAMA = _TOLD + "{{ '<|python_tag|>' if false }}" + _TURNS
UNKNOWN = _TOLD + _TURNS
THINKER = (
    HERMES
    + "{% if add_generation_prompt %}{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% elif reasoning_effort %}({{ reasoning_effort }})<think>\n{% endif %}"
    "{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
HELLO = [{"role": "user", "content": "hello"}]


@cache
def _codec_of(template):
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    return PublishedTemplate(template, ("<|im_start|>", "<|im_end|>"), marks).codec()


def make_tools_text(template):
    return TextProcessor(_codec_of(template))


def info_of(text, **changes):
    return make_info(**{"vocab_size": len(text.vocabulary), "max_model_len": 2000, **changes})


@asynccontextmanager
async def serving(reply, template=HERMES, **options):
    """Serve a model of that template which replies so; yields its engine, a client and its text."""
    text = make_text() if template is None else make_tools_text(template)
    engine = FakeEngine(reply=reply, info=info_of(text), **options)
    async with (
        run_server(make_app(engine, text=text)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield engine, client, text


async def ask(client, messages=HELLO, **options):
    answer = await client.chat.completions.create(model="tiny", messages=messages, **options)
    return answer.choices[0]


async def ask_streamed(client, messages=HELLO, **options):
    """Return the message that a stream's deltas make, its finish reason, and the deltas."""
    stream = await client.chat.completions.create(
        model="tiny", messages=messages, stream=True, **options
    )
    content, reasoning, calls, reasons, deltas = "", "", {}, [], []
    async for chunk in stream:
        [choice] = chunk.choices
        deltas.append(choice.delta)
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for call in choice.delta.tool_calls or []:
            if call.index not in calls:
                assert call.id
                assert call.function.name
                assert call.type == "function"
                calls[call.index] = [call.id, call.function.name, call.function.arguments]
            else:
                assert (call.id, call.function.name) == (None, None)
                calls[call.index][2] += call.function.arguments
    assert list(calls) == list(range(len(calls)))
    return content, reasoning, [tuple(call[1:]) for call in calls.values()], reasons, deltas


def prompt_of(engine, text):
    return text.codec.decode(engine.submitted[-1].prompt_token_ids)


async def test_a_call_is_told_whole_and_ends_the_answer_as_tool_calls():
    async with serving(f"Let me look.\n{CALL}") as (engine, client, text):
        choice = await ask(client, tools=[WEATHER, CLOCK])
        assert '"name": "weather"' in prompt_of(engine, text)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert call.id.startswith("call_")
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    assert engine.submitted[0].sampling.grammar is None


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("template", "reply"),
    [
        (HERMES, f"So:\n{CALL}\n{CALL}"),
        (LLAMA, '{"name": "weather", "parameters": {"city": "Rome"}}; ' * 2),
        (
            CODER,
            "So:\n"
            + "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n"
            "</tool_call>"
            * 1
            + "\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>",
        ),
    ],
)
async def test_a_stream_tells_the_same_calls_and_each_begins_with_id_and_name(
    template, reply, chunk_size
):
    async with serving(reply, template, chunk_size=chunk_size) as (_, client, _):
        choice = await ask(client, tools=[WEATHER])
        content, _, calls, reasons, _ = await ask_streamed(client, tools=[WEATHER])
    told = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls]
    assert calls == told
    assert [(name, json.loads(given)) for name, given in told] == [
        ("weather", {"city": "Rome"})
    ] * 2
    assert content == (choice.message.content or "")
    assert reasons == ["tool_calls"] == [choice.finish_reason]
    assert len({call.id for call in choice.message.tool_calls}) == 2


async def test_no_second_call_comes_where_calls_are_not_parallel():
    async with serving(f"{CALL}\n{CALL} and more" * 20) as (engine, client, _):
        options = {"tools": [WEATHER], "parallel_tool_calls": False}
        choice = await ask(client, **options)
        content, _, calls, reasons, _ = await ask_streamed(client, **options)
        assert not engine.running
    assert len(choice.message.tool_calls) == len(calls) == 1
    assert choice.message.content is None
    assert (content, reasons) == ("", ["tool_calls"])


@pytest.mark.parametrize("options", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
async def test_without_tools_or_with_the_choice_none_what_looks_like_a_call_is_content(options):
    async with serving(CALL) as (engine, client, text):
        choice = await ask(client, **options)
        assert "weather" not in prompt_of(engine, text)
    assert choice.message.content == CALL
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


async def test_an_answer_without_a_call_is_content_though_there_are_tools():
    async with serving("It is {sunny} <b> ") as (_, client, _):
        choice = await ask(client, tools=[WEATHER])
        content, _, calls, reasons, _ = await ask_streamed(client, tools=[WEATHER])
    assert choice.message.content == "It is {sunny} <b> " == content
    assert (calls, reasons, choice.finish_reason) == ([], ["stop"], "stop")


async def test_a_call_cut_by_max_tokens_ends_with_length():
    async with serving(CALL) as (_, client, _):
        choice = await ask(client, tools=[WEATHER], max_tokens=42)
    assert choice.finish_reason == "length"
    [call] = choice.message.tool_calls
    assert '{"city": "Rome"}'.startswith(call.function.arguments)


FORCED = {"type": "function", "function": {"name": "weather"}}


def generic_call(arguments):
    return f'{{"name": "weather", "arguments": {arguments}}}'


@pytest.mark.parametrize("chunk_size", [1, 1000])
@pytest.mark.parametrize(
    ("stop", "calls", "reason"),
    [
        ('"na', [], "stop"),
        ("ther", [], "stop"),
        ('"arg', [("weather", "")], "stop"),
        ("me", [], "stop"),
        ("om", [("weather", '{"city": "R')], "stop"),
        ("}}", [("weather", '{"city": "Rome"')], "stop"),
        ("nowhere", [("weather", '{"city": "Rome"}')], "tool_calls"),
    ],
)
@pytest.mark.parametrize("template", [HERMES, None])
async def test_a_forced_call_that_a_stop_string_cuts_is_no_call_to_run_and_no_content(
    template, stop, calls, reason, chunk_size
):
    reply = generic_call('{"city": "Rome"}')
    reply = f"<tool_call>\n{reply}\n</tool_call>" if template else reply
    async with serving(reply, template, chunk_size=chunk_size) as (_, client, _):
        options = {"tools": [WEATHER], "tool_choice": "required", "stop": stop}
        choice = await ask(client, **options)
        content, _, streamed, reasons, _ = await ask_streamed(client, **options)
    whole = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
    assert whole == streamed == calls
    assert (choice.message.content or "", content) == ("", "")
    assert [choice.finish_reason] == reasons == [reason]


async def test_a_forced_call_that_max_tokens_cuts_is_never_content_wherever_it_is_cut():
    arguments = '{"city": "Rome"}'
    reply = generic_call(arguments)
    async with serving(reply, None) as (_, client, text):
        num_tokens = len(text.codec.encode(reply))
        seen = set()
        for max_tokens in range(1, num_tokens + 1):
            options = {"tools": [WEATHER], "tool_choice": FORCED, "max_tokens": max_tokens}
            choice = await ask(client, **options)
            content, _, streamed, reasons, _ = await ask_streamed(client, **options)
            whole = [
                (c.function.name, c.function.arguments) for c in choice.message.tool_calls or []
            ]
            assert whole == streamed
            assert (choice.message.content or "", content) == ("", "")
            assert all(name == "weather" and arguments.startswith(told) for name, told in whole)
            assert reasons == [choice.finish_reason]
            seen.add((choice.finish_reason, tuple(told for _, told in whole)))
    assert ("length", ()) in seen
    assert ("length", ("",)) in seen
    assert len(seen) > 3


@pytest.mark.parametrize("template", [HERMES, LLAMA, CODER, UNKNOWN, None])
@pytest.mark.parametrize("tool_choice", ["required", FORCED])
async def test_a_forced_call_goes_by_a_grammar_whatever_the_template(template, tool_choice):
    async with serving("x", template) as (engine, client, _):
        await ask(client, tools=[WEATHER, CLOCK], tool_choice=tool_choice)
    grammar = engine.submitted[0].sampling.grammar
    assert "weather" in grammar
    assert ("clock" in grammar) == (tool_choice == "required")


async def test_a_forced_call_of_a_template_without_tools_is_told_in_the_generic_form():
    call = '{"name": "weather", "arguments": {"city": "Rome"}}'
    async with serving(f"{call}\n{call}", None) as (_, client, _):
        choice = await ask(client, tools=[WEATHER], tool_choice="required")
        named = await ask(client, tools=[WEATHER], tool_choice=FORCED)
    assert [c.function.arguments for c in choice.message.tool_calls] == ['{"city": "Rome"}'] * 2
    assert len(named.message.tool_calls) == 1


async def test_allowed_tools_are_the_only_ones_that_the_model_sees():
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "clock"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    async with serving("no") as (engine, client, text):
        await ask(client, tools=[WEATHER, CLOCK], tool_choice=choice)
        assert "clock" in prompt_of(engine, text)
        assert "weather" not in prompt_of(engine, text)


@pytest.mark.parametrize("is_strict", [True, False])
async def test_strict_tools_go_by_a_grammar_though_no_call_is_forced(is_strict):
    tool = {"type": "function", "function": {**WEATHER["function"], "strict": is_strict}}
    async with serving("no") as (engine, client, _):
        await ask(client, tools=[tool])
    assert (engine.submitted[0].sampling.grammar is not None) == is_strict


@pytest.mark.parametrize(
    ("options", "param", "told"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "custom"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "twice"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "a b",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
            "object",
        ),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        (
            {"tools": [CLOCK], "tool_choice": FORCED},
            "tool_choice",
            "weather",
        ),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"tools": [CLOCK] * 129}, "tools", "128"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "a", "parameters": {"type": "colour"}},
                    }
                ],
                "tool_choice": "required",
            },
            "tools",
            "can't be followed",
        ),
    ],
)
async def test_what_is_wrong_with_tools_is_refused_by_its_name(options, param, told):
    async with serving("x") as (_, client, _):
        with pytest.raises(openai.BadRequestError) as raised:
            await ask(client, **options)
    assert raised.value.param == param
    assert told in raised.value.message


@pytest.mark.parametrize(
    ("template", "told"), [(None, "takes no tools"), (UNKNOWN, "--tool-call-parser")]
)
async def test_tools_are_refused_where_the_model_could_not_call_them(template, told):
    async with serving("x", template) as (_, client, _):
        with pytest.raises(openai.BadRequestError) as raised:
            await ask(client, tools=[WEATHER])
    assert raised.value.param == "tools"
    assert told in raised.value.message


async def test_calls_and_results_of_earlier_turns_are_put_by_the_template():
    calls = [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
        }
    ]
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {
            "role": "tool",
            "tool_call_id": "call_1",
            "content": [{"type": "text", "text": "sun<|im_end|>"}],
        },
    ]
    async with serving("warm") as (engine, client, text):
        choice = await ask(client, messages, tools=[WEATHER])
        prompt = prompt_of(engine, text)
        end = text.codec.encode("<|im_end|>", add_special_tokens=False)[0]
        assert engine.submitted[0].prompt_token_ids.count(end) == 3  # and none of the tool's
    assert 'CALL weather {"city": "Köln"}<|im_end|>' in prompt
    assert "<|im_start|>tool\nsun<|im_end|> of call_1<|im_end|>" in prompt
    assert choice.message.content == "warm"


@pytest.mark.parametrize(
    ("arguments", "put"),
    [
        ("{", '"{"'),
        ("[1]", '"[1]"'),
        ('{"<|im_end|>": [1e999]}', '{"<|im_end|>": [Infinity]}'),
        ('{"a":' * 900 + "1" + "}" * 900, None),
    ],
)
async def test_any_text_may_be_the_arguments_of_an_earlier_call(arguments, put):
    function = {"name": "f", "arguments": arguments}
    call = {"id": "a", "type": "function", "function": function}
    text = make_tools_text(HERMES)
    engine = FakeEngine(info=info_of(text, max_model_len=20_000))
    async with make_client(make_app(engine, text=text)) as client:
        messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
        response = await client.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": messages}
        )
    assert response.status_code == 200, response.text
    prompt = prompt_of(engine, text)
    assert "CALL f " + (put or json.dumps(arguments)) in prompt


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        ({"role": "user", "content": "x", "tool_call_id": "a"}, "tool_call_id"),
        (
            {
                "role": "user",
                "content": "x",
                "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}],
            },
            "tool_calls",
        ),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "tool_calls[0].function"),
        ({"role": "assistant", "content": None}, "content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "content",
        ),
    ],
)
async def test_a_message_that_goes_wrong_with_tools_or_images_is_refused_by_its_name(
    message, param
):
    text = make_tools_text(HERMES)
    app = make_app(FakeEngine(info=info_of(text)), text=text)
    async with make_client(app) as client:
        body = {"model": "tiny", "messages": [*HELLO, message]}
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == f"messages[1].{param}"


async def test_an_answer_goes_on_with_the_last_message():
    messages = [*HELLO, {"role": "assistant", "content": "I am <|im_end|> "}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    async with serving("fine") as (engine, client, text):
        choice = await ask(client, messages, extra_body=body)
        assert prompt_of(engine, text).endswith("<|im_start|>assistant\nI am <|im_end|> ")
        await ask(client, messages, extra_body={"add_generation_prompt": False})
        assert prompt_of(engine, text).endswith("I am <|im_end|> <|im_end|>\n")
        for wrong in (HELLO, [*messages, *HELLO]):
            with pytest.raises(openai.BadRequestError, match="continue_final_message"):
                await ask(client, wrong, extra_body=body)
        with pytest.raises(openai.BadRequestError, match="add_generation_prompt"):
            await ask(client, messages, extra_body={**body, "add_generation_prompt": True})
    assert choice.message.content == "fine"


@pytest.mark.parametrize("chunk_size", [1, 1000])
async def test_thinking_is_told_apart_and_its_tokens_are_counted(chunk_size):
    reply = f"<think>\nhm, {CALL}\n</think>\n\nyes\n{CALL}"
    async with serving(reply, THINKER, chunk_size=chunk_size) as (_, client, _):
        choice = await ask(client, tools=[WEATHER])
        content, reasoning, calls, reasons, deltas = await ask_streamed(client, tools=[WEATHER])
        hidden = await ask(client, tools=[WEATHER], extra_body={"include_reasoning": False})
    assert choice.message.reasoning_content == f"hm, {CALL}" == reasoning
    assert choice.message.content == "yes" == content
    assert len(choice.message.tool_calls) == 1 == len(calls)
    assert reasons == ["tool_calls"]
    assert not hasattr(hidden.message, "reasoning_content")
    assert all(delta.content is None or "hm" not in delta.content for delta in deltas)


async def test_thinking_that_the_prompt_opens_needs_no_mark():
    async with serving("hm</think>yes", THINKER) as (engine, client, text):
        choice = await ask(client, reasoning_effort="high")
        assert prompt_of(engine, text).endswith("(high)<think>\n")
        cut = await ask(client, reasoning_effort="high", max_tokens=2)
    assert (choice.message.reasoning_content, choice.message.content) == ("hm", "yes")
    assert (cut.message.reasoning_content, cut.finish_reason) == ("hm", "length")


@pytest.mark.parametrize(
    ("effort", "ending"),
    [
        ("none", "assistant\n<think>\n\n</think>\n\n"),
        ("minimal", "(low)<think>\n"),
        ("LOW", "(low)<think>\n"),
        ("medium", "(medium)<think>\n"),
        ("xhigh", "(high)<think>\n"),
        ("colossal ☃", "assistant\n"),
        ("", "assistant\n"),
    ],
)
async def test_any_effort_is_put_in_words_that_templates_know(effort, ending):
    async with serving("yes", THINKER) as (engine, client, text):
        choice = await ask(client, reasoning_effort=effort)
        assert prompt_of(engine, text).endswith(ending)
        kwargs = {"chat_template_kwargs": {"reasoning_effort": effort}}
        await ask(client, extra_body=kwargs)
    assert choice.finish_reason == "stop"


async def test_a_request_says_more_to_the_template_than_an_effort_does():
    async with serving("yes", THINKER) as (engine, client, text):
        told = {"chat_template_kwargs": {"enable_thinking": False}}
        await ask(client, reasoning_effort="high", extra_body=told)
        assert prompt_of(engine, text).endswith("</think>\n\n")
        with pytest.raises(openai.BadRequestError, match="chat_template_kwargs"):
            await ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": "no"}})


@pytest.mark.parametrize(
    ("options", "is_bound"),
    [
        ({"thinking_token_budget": 5}, True),
        ({"thinking_token_budget": 0}, True),
        ({"thinking_token_budget": -1}, False),
        ({"thinking_token_budget": 5, "chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"structured_outputs": {"choice": ["a"]}}, True),
    ],
)
async def test_a_budget_of_thinking_binds_the_answer_by_a_grammar(options, is_bound):
    async with serving("yes", THINKER) as (engine, client, _):
        await ask(client, extra_body=options)
    assert ("TEXT" in (engine.submitted[0].sampling.grammar or "")) == is_bound


async def test_a_budget_passes_where_a_model_does_not_think_and_is_refused_beyond_its_limits():
    async with serving("yes") as (engine, client, _):
        await ask(client, extra_body={"thinking_token_budget": 5})
        assert engine.submitted[0].sampling.grammar is None
        for wrong in (-2, 2**31, "5"):
            with pytest.raises(openai.BadRequestError, match="thinking_token_budget"):
                await ask(client, extra_body={"thinking_token_budget": wrong})


async def test_marks_that_are_special_tokens_are_read_all_the_same():
    published = PublishedTemplate(
        HERMES, ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
    )
    text = TextProcessor(published.codec())
    engine = FakeEngine(info=info_of(text), reply="")
    reply = text.codec.encode(CALL, add_special_tokens=False)
    output = engine._output
    engine._output = lambda request, ids, reason, **o: output(request, [*reply, 0], reason, **o)
    async with make_client(make_app(engine, text=text)) as client:
        for options, content in (({}, CALL), ({"tools": [WEATHER]}, None)):
            body = {"model": "tiny", "messages": HELLO, **options}
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            message = answer["choices"][0]["message"]
            if content is None:
                assert message["tool_calls"][0]["function"]["name"] == "weather"
            else:
                assert "<tool_call>" not in message["content"]


async def test_log_probabilities_are_of_all_tokens_in_their_order():
    async with serving(f"<think>hm</think>yes {CALL}", THINKER) as (_, client, _):
        whole = await ask(client, tools=[WEATHER], logprobs=True)
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[WEATHER], logprobs=True, stream=True
        )
        tokens = [
            entry.token
            async for chunk in stream
            for choice in chunk.choices
            for entry in (choice.logprobs.content if choice.logprobs else [])
        ]
    assert tokens == [entry.token for entry in whole.logprobs.content]


async def test_each_choice_has_its_own_calls_and_reason():
    replies = [CALL, "no call"]
    text = make_tools_text(HERMES)
    engine = FakeEngine(info=info_of(text), replies=replies)
    app = make_app(engine, text=text)
    async with make_client(app) as client:
        body = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "n": 2, "seed": 0}
        choices = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "stop"]
    assert "tool_calls" not in choices[1]["message"]


async def test_usage_counts_the_tokens_of_thinking():
    text = make_tools_text(THINKER)
    engine = FakeEngine(info=info_of(text), reply="", ends_with=FinishReason.STOP)
    reply = text.codec.encode("<think>hm</think>yes", add_special_tokens=False)
    output = engine._output
    engine._output = lambda request, ids, reason, **o: output(request, [*reply, 0], reason, **o)
    async with make_client(make_app(engine, text=text)) as client:
        body = {"model": "tiny", "messages": HELLO}
        usage = (await client.post("/v1/chat/completions", json=body)).json()["usage"]
    closing = text.vocabulary.mark_ids["</think>"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": reply.index(closing) + 1}


async def test_json_is_content_where_the_prompt_opens_thinking_whose_marks_are_no_tokens():
    """The grammar holds from the first token, so that nothing of the answer is thought."""
    codec = PublishedTemplate(THINKER, ("<|im_start|>", "<|im_end|>"), ()).codec()
    text = TextProcessor(codec)
    engine = FakeEngine(reply='{"a": 1}', info=info_of(text))
    async with (
        run_server(make_app(engine, text=text)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        options = {"reasoning_effort": "high", "response_format": {"type": "json_object"}}
        choice = await ask(client, **options)
        content, reasoning, _, _, _ = await ask_streamed(client, **options)
        assert prompt_of(engine, text).rstrip().endswith("<think>")
    assert choice.message.content == content == '{"a": 1}'
    assert reasoning == ""
