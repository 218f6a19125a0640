"""Tools and thinking in /v1/messages, by Anthropic's own client and types."""

import json

import pytest

from tests.fakes import FakeEngine, make_app, make_client, run_server
from tests.server.api.test_tools import (
    CALL,
    HELLO,
    HERMES,
    THINKER,
    UNKNOWN,
    info_of,
    make_tools_text,
    prompt_of,
)
from tests.server.api.test_tools import WEATHER as CHAT_WEATHER

pytestmark = pytest.mark.anyio

SCHEMA = CHAT_WEATHER["function"]["parameters"]
WEATHER = {"name": "weather", "description": "Tells the weather.", "input_schema": SCHEMA}
CLOCK = {"name": "clock", "input_schema": {"type": "object"}, "type": "custom"}
ASKED = {"model": "tiny", "max_tokens": 900, "messages": HELLO}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
ROME = {"city": "Rome"}


async def ask(reply, body, template=HERMES, path="/v1/messages", **options):
    """Return the answer of a model of that template which replies so, its engine and its text."""
    text = make_tools_text(template)
    engine = FakeEngine(reply=reply, info=info_of(text), **options)
    async with make_client(make_app(engine, text=text)) as client:
        return await client.post(path, json=ASKED | body), engine, text


def told(content):
    """Return what blocks say, without their ids and signatures."""
    fields = {"text": ("text",), "thinking": ("thinking",), "tool_use": ("name", "input")}
    return [(b["type"], *(b[name] for name in fields[b["type"]])) for b in content]


def events_of(response):
    """Return the stream's events, each of Anthropic's types and under its own name."""
    from tests.server.api.anthropics import as_event

    read = []
    for event in response.text.split("\n\n")[:-1]:
        name, data = event.split("\n")
        read.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {read[-1]['type']}"
        if read[-1]["type"] != "ping":
            as_event(json.dumps(read[-1]))
    return read


def gathered(events):
    """Return the blocks that a stream's events make: one at a time is open."""
    blocks, inputs, is_open = [], {}, False
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                assert not is_open
                blocks.append(event["content_block"])
                is_open = True
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                assert is_open
                match event["delta"]:
                    case {"type": "text_delta", "text": text}:
                        blocks[-1]["text"] += text
                    case {"type": "thinking_delta", "thinking": text}:
                        blocks[-1]["thinking"] += text
                    case {"type": "signature_delta", "signature": text}:
                        blocks[-1]["signature"] += text
                    case {"type": "input_json_delta", "partial_json": text}:
                        assert blocks[-1]["input"] == {}
                        inputs[len(blocks) - 1] = inputs.get(len(blocks) - 1, "") + text
            case "content_block_stop":
                assert event["index"] == len(blocks) - 1
                is_open = False
    assert not is_open
    for index, text in inputs.items():
        blocks[index]["input"] = json.loads(text)
    return blocks


@pytest.mark.parametrize("chunk_size", [1, 1000])
@pytest.mark.parametrize(
    ("reply", "change", "blocks", "reason"),
    [
        (CALL, {}, [("tool_use", "weather", ROME)], "tool_use"),
        (
            f"So:\n{CALL}\n{CALL}",
            {},
            [("text", "So:"), *[("tool_use", "weather", ROME)] * 2],
            "tool_use",
        ),
        (
            f"{CALL}\n{CALL}",
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            [("tool_use", "weather", ROME)],
            "tool_use",
        ),
        (CALL, {"tool_choice": {"type": "none"}}, [("text", CALL)], "end_turn"),
        (f"{CALL}x", {"stop_sequences": ["x"]}, [("tool_use", "weather", ROME)], "stop_sequence"),
        (
            f"<think>hm</think>so {CALL}",
            {},
            [("thinking", "hm"), ("text", "so"), ("tool_use", "weather", ROME)],
            "tool_use",
        ),
        (
            "<think>hm</think>yes",
            {"thinking": {"type": "adaptive", "display": "omitted"}},
            [("thinking", ""), ("text", "yes")],
            "end_turn",
        ),
        ("", {}, [], "end_turn"),
    ],
)
async def test_blocks_come_in_the_models_order_streamed_as_whole(
    reply, change, blocks, reason, chunk_size
):
    from tests.server.api.anthropics import as_message

    body = {"tools": [WEATHER]} | change
    whole, _, _ = await ask(reply, body, THINKER)
    stream, _, _ = await ask(reply, body | {"stream": True}, THINKER, chunk_size=chunk_size)
    message = as_message(whole.text)
    assert told(whole.json()["content"]) == blocks
    assert message.stop_reason == reason
    assert all(block.signature for block in message.content if block.type == "thinking")
    events = events_of(stream)
    assert told(gathered(events)) == blocks
    assert events[-2]["delta"]["stop_reason"] == reason
    starts = [event for event in events if event["type"] == "content_block_start"]
    ids = {e["content_block"]["id"] for e in starts if e["content_block"]["type"] == "tool_use"}
    assert len(ids) == sum(block[0] == "tool_use" for block in blocks)


@pytest.mark.parametrize("chunk_size", [1, 1000])
@pytest.mark.parametrize(
    ("change", "blocks", "reason"),
    [
        ({"stop_sequences": ['"na']}, [], "stop_sequence"),
        ({"stop_sequences": ['"arg']}, [("tool_use", "weather", {})], "stop_sequence"),
        ({"stop_sequences": ["om"]}, [("tool_use", "weather", {"city": "R"})], "stop_sequence"),
        ({"max_tokens": 3}, [], "max_tokens"),
    ],
)
async def test_a_forced_call_that_is_cut_is_no_text_streamed_as_whole(
    change, blocks, reason, chunk_size
):
    body = {"tools": [WEATHER], "tool_choice": {"type": "any"}} | change
    whole, _, _ = await ask(CALL, body)
    stream, _, _ = await ask(CALL, body | {"stream": True}, chunk_size=chunk_size)
    assert told(whole.json()["content"]) == blocks
    assert whole.json()["stop_reason"] == reason
    events = events_of(stream)
    starts = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    assert [start["type"] for start in starts] == [block[0] for block in blocks]
    assert events[-2]["delta"]["stop_reason"] == reason


async def test_the_client_gathers_calls_and_thinking_from_a_stream():
    import anthropic

    text = make_tools_text(THINKER)
    engine = FakeEngine(reply=f"<think>hm</think>{CALL}", info=info_of(text))
    thinking = {"type": "enabled", "budget_tokens": 1024}
    async with (
        run_server(make_app(engine, text=text)) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
        client.messages.stream(**ASKED, tools=[WEATHER], thinking=thinking) as stream,
    ):
        message = await stream.get_final_message()
    thought, use = message.content
    assert thought.thinking == "hm"
    assert (use.name, use.input, message.stop_reason) == ("weather", ROME, "tool_use")


@pytest.mark.parametrize(
    ("written", "given"),
    [
        ('{"city": "Rome"}', {"city": "Rome"}),
        ("null", {}),
        ("[1]", {"raw_arguments": "[1]"}),
        ('{"city" Rome}', {"raw_arguments": '{"city" Rome}'}),
    ],
)
async def test_a_whole_calls_input_is_an_object_and_nothing_of_it_is_lost(written, given):
    reply = f'<tool_call>{{"name": "weather", "arguments": {written}}}</tool_call>'
    response, _, _ = await ask(reply, {"tools": [WEATHER]})
    [block] = response.json()["content"]
    assert block["input"] == given


async def test_a_call_that_max_tokens_cuts_has_what_came_of_its_input():
    from tests.server.api.anthropics import as_message

    response, _, _ = await ask(CALL, {"tools": [WEATHER], "max_tokens": 50})
    message = as_message(response.text)
    [use] = message.content
    assert message.stop_reason == "max_tokens"
    assert use.input == {} or ROME["city"].startswith(use.input["city"])


async def test_calls_and_results_are_put_as_chat_puts_them_and_counted_alike():
    text = make_tools_text(HERMES)
    call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps(ROME)}}
    chat = [
        {"role": "system", "content": "be brief"},
        *HELLO,
        {
            "role": "assistant",
            "content": "So:",
            "tool_calls": [call | {"id": "toolu_1"}, call | {"id": "toolu_2"}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "sun"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "rain\nwind"},
        {"role": "user", "content": "well?\nwhat?"},
    ]
    texts = [{"type": "text", "text": line} for line in ("rain", "wind")]
    turns = [
        *HELLO,
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "So:"}, USE, USE | {"id": "toolu_2"}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sun"},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "content": texts,
                    "is_error": True,
                },
                {"type": "text", "text": "well?", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "what?"},
            ],
        },
    ]
    tool = {"type": "function", "function": CHAT_WEATHER["function"]}
    given = {"model": "tiny", "messages": turns, "tools": [WEATHER], "system": "be brief"}
    engine = FakeEngine(info=info_of(text))
    async with make_client(make_app(engine, text=text)) as client:
        response = await client.post("/v1/messages", json=given | {"max_tokens": 9})
        assert response.status_code == 200, response.text
        assert "x-bitwatt-ignored-fields" not in response.headers
        counted = await client.post("/v1/messages/count_tokens", json=given)
        await client.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": chat, "tools": [tool]}
        )
    ours, chats = engine.submitted
    assert text.codec.decode(ours.prompt_token_ids) == text.codec.decode(chats.prompt_token_ids)
    assert counted.json() == {"input_tokens": len(ours.prompt_token_ids)}


@pytest.mark.parametrize(
    ("change", "ending"),
    [
        ({"thinking": {"type": "disabled"}}, "<think>\n\n</think>\n\n"),
        ({"thinking": {"type": "enabled"}, "output_config": {"effort": "max"}}, "(high)<think>\n"),
        ({"output_config": {"effort": "low"}}, "(low)<think>\n"),
        ({"thinking": {"type": "adaptive"}}, "assistant\n"),
    ],
)
async def test_the_template_is_told_of_thinking_and_effort_and_both_are_counted(change, ending):
    response, engine, text = await ask("yes", change, THINKER)
    assert response.status_code == 200, response.text
    assert prompt_of(engine, text).endswith(ending)
    counted, _, _ = await ask("", change, THINKER, "/v1/messages/count_tokens")
    assert counted.json()["input_tokens"] == len(engine.submitted[0].prompt_token_ids)


async def test_a_budget_of_thinking_binds_the_answer():
    thinking = {"type": "enabled", "budget_tokens": 5}
    _, engine, _ = await ask("yes", {"thinking": thinking}, THINKER)
    assert "TEXT" in engine.submitted[0].sampling.grammar


async def test_thinking_goes_back_with_the_answer_that_it_led_to():
    template = (
        "{% for m in messages %}{{ m.role }}[{{ m.reasoning_content }}]{{ m.content }};{% endfor %}"
    )
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "unsigned"},
        {"type": "redacted_thinking", "data": "???"},
        {"type": "text", "text": "x"},
    ]
    turns = [*HELLO, {"role": "assistant", "content": content}, *HELLO]
    _, engine, text = await ask("x", {"messages": turns}, template)
    assert prompt_of(engine, text) == "user[]hello;assistant[hm]x;user[]hello;"


async def test_the_model_goes_on_with_an_answer_that_was_begun():
    turns = [*HELLO, {"role": "assistant", "content": "I am "}]
    response, engine, text = await ask("fine", {"messages": turns})
    assert prompt_of(engine, text).endswith("<|im_start|>assistant\nI am ")
    assert told(response.json()["content"]) == [("text", "fine")]
    counted, _, _ = await ask("", {"messages": turns}, path="/v1/messages/count_tokens")
    assert counted.json()["input_tokens"] == len(engine.submitted[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "any"}, {"weather", "clock"}),
        ({"type": "tool", "name": "clock"}, {"clock"}),
        ({"type": "auto"}, set()),
    ],
)
async def test_a_choice_forces_what_chats_does(choice, names):
    _, engine, _ = await ask("x", {"tools": [WEATHER, CLOCK], "tool_choice": choice})
    grammar = engine.submitted[0].sampling.grammar or ""
    assert {name for name in ("weather", "clock") if name in grammar} == names


def turns_of(role, **block):
    return {"messages": [{"role": role, "content": [block]}, *HELLO]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema is None"),
        ({"tools": [1]}, "tools[0] must be an object"),
        ({"tools": [WEATHER, WEATHER]}, "twice"),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name is 'a b'"),
        ({"tools": [WEATHER | {"input_examples": [{}]}]}, "tools[0].input_examples"),
        ({"tools": [WEATHER], "tool_choice": {"type": "some"}}, "tool_choice.type is 'some'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "has a name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "none of the tools"),
        ({"tool_choice": {"type": "any"}}, "any without tools"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": 1}},
            "disable_parallel_tool_use is 1",
        ),
        ({"tools": [CLOCK] * 129}, "128"),
        (turns_of("user", **USE), "'tool_use' are not supported"),
        (turns_of("assistant", type="tool_result", tool_use_id="a"), "'tool_result'"),
        (turns_of("user", type="image"), "'image'"),
        (turns_of("assistant", **USE | {"input": "{}"}), "must be an object"),
        (turns_of("assistant", **USE | {"id": ""}), "1 to 256"),
        (turns_of("user", type="tool_result", tool_use_id="a", content=0), "string or a list"),
        (turns_of("user", type="tool_result"), "tool_use_id of tool_result is None"),
        (
            turns_of("user", type="tool_result", tool_use_id="a", content=[{"type": "image"}]),
            "'image'",
        ),
        (
            turns_of("assistant", type="thinking", thinking="a", signature=True),
            "signature is a string",
        ),
        ({"messages": [*HELLO, {"role": "assistant", "content": [USE] * 129}, *HELLO]}, "128"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "budget_tokens"),
        ({"output_config": {"format": {"type": None, "schema": {}}}}, "format type is None"),
        ({"output_config": {"format": {"type": "text"}}}, "format type is 'text'"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "format schema is None"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_what_is_wrong_with_tools_and_blocks_is_refused_by_its_name(change, words, path):
    response, _, _ = await ask("x", change, path=path)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


async def test_tools_are_refused_where_the_model_could_not_call_them():
    response, _, _ = await ask("x", {"tools": [WEATHER]}, UNKNOWN)
    assert response.status_code == 400
    assert "--tool-call-parser" in response.json()["error"]["message"]


async def test_fields_of_tools_choices_and_blocks_that_no_api_has_are_named():
    body = {
        "tools": [WEATHER | {"size": 1}],
        "tool_choice": {"type": "auto", "mood": 1},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a", "size": 1}]}],
    }
    response, _, _ = await ask("x", body)
    assert response.headers["x-bitwatt-ignored-fields"] == (
        "messages[].content[].size, tools[].size, tool_choice.mood"
    )
