"""Tools and reasoning in /v1/responses, by OpenAI's own client and types."""

import json
from contextlib import asynccontextmanager
from itertools import product

import msgspec
import pytest
from bitwatt.api.kept_items import CallerItems
from bitwatt.api.schemas.response_events import OutputMessage, OutputText
from bitwatt.api.schemas.response_input import chat_messages
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.responses import ResponseFunctionCallArgumentsDeltaEvent
from openai.types import responses as kinds
from openai.types.responses import Response
from pydantic import TypeAdapter

from tests.fakes import FakeEngine, make_app, make_client, untimed
from tests.server.api.test_responses import events_of
from tests.server.api.test_tools import (
    CALL,
    HERMES,
    THINKER,
    UNKNOWN,
    info_of,
    make_tools_text,
    prompt_of,
    serving,
)
from tests.server.api.test_tools import WEATHER as CHAT_WEATHER

pytestmark = pytest.mark.anyio

EVENTS = TypeAdapter(kinds.ResponseStreamEvent)
WEATHER = {"type": "function", "strict": False, **CHAT_WEATHER["function"]}
CLOCK = {"type": "function", "name": "clock"}
NAMED = {"type": "function", "name": "weather"}


async def ask(reply, body, template=HERMES, **options):
    """Return the answer of a model of that template which replies so, its engine and its text."""
    text = make_tools_text(template)
    engine = FakeEngine(reply=reply, info=info_of(text), **options)
    async with make_client(make_app(engine, text=text)) as client:
        given = {"model": "tiny", "input": "hello"} | body
        return await client.post("/v1/responses", json=given), engine, text


def told(output):
    """Return what items say, without their ids."""
    shown = []
    for item in output:
        match item["type"]:
            case "function_call":
                shown.append((item["type"], item["name"], item["arguments"], item["status"]))
            case kind:
                [part] = item["content"]
                shown.append((kind, part["text"], item["status"]))
    return shown


ARGUMENTS = '{"city": "Rome"}'
CALLED = ("function_call", "weather", ARGUMENTS, "completed")
THOUGHT = ("reasoning", "hm", "completed")


@pytest.mark.parametrize("chunk_size", [1, 1000])
@pytest.mark.parametrize(
    ("reply", "change", "output"),
    [
        (CALL, {}, [CALLED]),
        (f"So:\n{CALL}\n{CALL}", {}, [("message", "So:", "completed"), CALLED, CALLED]),
        (f"{CALL}\nDone.", {}, [CALLED, ("message", "Done.", "completed")]),
        (f"{CALL}\n{CALL}", {"parallel_tool_calls": False}, [CALLED]),
        ("sun", {}, [("message", "sun", "completed")]),
        (CALL, {"tool_choice": "none"}, [("message", CALL, "completed")]),
        (f"<think>hm</think>{CALL}", {}, [THOUGHT, CALLED]),
        ("<think>hm</think>yes", {}, [THOUGHT, ("message", "yes", "completed")]),
        ("<think>hm</think>", {}, [THOUGHT]),
        ("<think>hm hm", {"max_output_tokens": 11}, [("reasoning", "hm", "incomplete")]),
        (CALL, {"max_output_tokens": 50}, [("function_call", "weather", '{"city": "Ro', "x")]),
    ],
)
async def test_items_come_in_the_models_order_streamed_as_whole(reply, change, output, chunk_size):
    body = {"tools": [WEATHER]} | change
    whole, _, _ = await ask(reply, body, THINKER)
    stream, _, _ = await ask(reply, body | {"stream": True}, THINKER, chunk_size=chunk_size)
    Response.model_validate_json(whole.text, strict=True)
    events = events_of(stream)
    for event in events:
        EVENTS.validate_json(json.dumps(event), strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]["response"]
    is_cut = "max_output_tokens" in change
    if is_cut:  # how many tokens a text has is the tokenizer's affair
        kind, *start, _ = output[0]
        [got] = told(last["output"])
        assert (got[0], got[-1]) == (kind, "incomplete")
        assert all(g.startswith(s[:2]) for g, s in zip(got[1:-1], start, strict=True))
    else:
        assert told(last["output"]) == output
    assert told(whole.json()["output"]) == told(last["output"])
    assert last["status"] == whole.json()["status"] == ("incomplete" if is_cut else "completed")
    if chunk_size == 1:  # with more, tokens behind the last call come with it
        assert untimed(last["usage"]) == untimed(whole.json()["usage"])
    assert gathered(events) == last["output"]


CUT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.mark.parametrize("chunk_size", [1, 1000])
@pytest.mark.parametrize(
    ("stop", "output"),
    [
        ('"na', [("message", "", "completed")]),
        ("ther", [("message", "", "completed")]),
        ('"arg', [("function_call", "weather", "", "incomplete")]),
        ("om", [("function_call", "weather", '{"city": "R', "incomplete")]),
        ("}\n", [CALLED]),
    ],
)
async def test_a_forced_call_that_a_stop_string_cuts_is_incomplete_and_no_message(
    stop, output, chunk_size
):
    body = {"tools": [WEATHER], "tool_choice": "required", "stop": stop}
    whole, _, _ = await ask(CUT, body)
    stream, _, _ = await ask(CUT, body | {"stream": True}, chunk_size=chunk_size)
    events = events_of(stream)
    assert told(whole.json()["output"]) == output
    assert told(events[-1]["response"]["output"]) == output
    assert gathered(events) == events[-1]["response"]["output"]
    assert whole.json()["status"] == events[-1]["response"]["status"] == "completed"


async def test_a_forced_call_that_max_output_tokens_cuts_is_never_a_message():
    body = {"model": "tiny", "input": "hello", "tools": [WEATHER], "tool_choice": NAMED}
    text = make_tools_text(HERMES)
    app = make_app(FakeEngine(reply=CUT, info=info_of(text)), text=text)
    seen = set()
    for limit in range(1, 60):
        cut = body | {"max_output_tokens": limit}
        async with make_client(app) as client:
            whole = await client.post("/v1/responses", json=cut)
            stream = await client.post("/v1/responses", json=cut | {"stream": True})
        response = events_of(stream)[-1]["response"]
        [item] = told(whole.json()["output"])
        assert [item] == told(response["output"])
        assert whole.json()["status"] == response["status"]
        if item[0] == "message":
            assert item == ("message", "", "incomplete")
        else:
            assert item[1] == "weather"
            assert ARGUMENTS.startswith(item[2])
            assert item[3] == ("completed" if item[2] == ARGUMENTS else "incomplete")
        seen.add((item[0], item[-1]))
    assert seen >= {("message", "incomplete"), ("function_call", "incomplete")}


def gathered(events):
    """Return the items that the events of their parts make, held to OpenAI's order."""
    items = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            items.append(event["item"])
            assert event["item"]["status"] == "in_progress"
            assert event["output_index"] == len(items) - 1
        elif kind == "response.content_part.added":
            assert event["part"]["text"] == ""
            items[-1]["content"].append(event["part"])
        elif kind == "response.output_item.done":
            items[-1]["status"] = event["item"]["status"]
            assert event["item"] == items[-1]
        elif "item_id" in event:
            assert (event["item_id"], event["output_index"]) == (items[-1]["id"], len(items) - 1)
            if kind == "response.function_call_arguments.delta":
                items[-1]["arguments"] += event["delta"]
            elif kind == "response.function_call_arguments.done":
                assert event["arguments"] == items[-1]["arguments"]
            elif kind.endswith("text.delta"):
                items[-1]["content"][0]["text"] += event["delta"]
            elif kind.endswith("text.done"):
                assert event["text"] == items[-1]["content"][0]["text"]
            else:
                assert kind == "response.content_part.done"
                assert event["part"] == items[-1]["content"][0]
    return items


async def test_the_client_gathers_a_call_from_a_stream():
    async with (
        serving(CALL) as (_, client, _),
        client.responses.stream(model="tiny", input="hi", tools=[WEATHER]) as stream,
    ):
        deltas = [
            event.delta
            async for event in stream
            if isinstance(event, ResponseFunctionCallArgumentsDeltaEvent)
        ]
        response = await stream.get_final_response()
    [call] = response.output
    assert "".join(deltas) == call.arguments == ARGUMENTS
    assert call.call_id.startswith("call_")
    assert call.id.startswith("fc_")
    assert response.tools[0].name == "weather"


async def test_calls_and_what_they_brought_are_put_as_chat_puts_them():
    text = make_tools_text(HERMES)
    prompts = []
    calls = [
        {"id": name, "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
        for name in ("call_1", "call_2")
    ]
    chat = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "So:", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
        {"role": "tool", "tool_call_id": "call_2", "content": "rain\nwind"},
        {"role": "assistant", "content": "", "tool_calls": calls[:1]},
        {"role": "tool", "tool_call_id": "call_1", "content": ""},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "Really."},
        {"role": "user", "content": "thanks"},
    ]
    called = {"type": "function_call", "name": "weather", "arguments": ARGUMENTS}
    brought = {"type": "function_call_output"}
    lines = [{"type": "input_text", "text": line} for line in ("rain", "wind")]
    items = [
        {"role": "user", "content": "hello"},
        {"type": "message", "role": "assistant", "content": "So:", "id": "msg_1"},
        called | {"call_id": "call_1", "id": "fc_1", "status": "completed"},
        called | {"call_id": "call_2"},
        brought | {"call_id": "call_1", "output": "sun"},
        brought | {"call_id": "call_2", "output": lines},
        called | {"call_id": "call_1"},
        brought | {"call_id": "call_1", "output": ""},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "Really."},
        {"role": "user", "content": "thanks"},
    ]
    engine = FakeEngine(info=info_of(text))
    async with make_client(make_app(engine, text=text)) as client:
        for path, given in (
            ("responses", {"input": items, "tools": [WEATHER]}),
            ("chat/completions", {"messages": chat, "tools": [CHAT_WEATHER]}),
        ):
            response = await client.post(f"/v1/{path}", json={"model": "tiny"} | given)
            assert response.status_code == 200, response.text
            assert "x-bitwatt-ignored-fields" not in response.headers
            prompts.append(prompt_of(engine, text))
    assert prompts[0] == prompts[1]
    assert prompts[0].count("CALL weather") == 3


async def test_reasoning_goes_back_with_the_answer_that_it_led_to():
    template = (
        "{% for m in messages %}{{ m.role }}[{{ m.reasoning_content or '' }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}CALL{% endfor %};{% endfor %}"
        "{{ '<tool_call>' if tools }}"
    )
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    call = {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"}
    items = [
        {"role": "user", "content": "q"},
        thought | {"content": [{"type": "reasoning_text", "text": "one"}]},
        call,
        {"type": "function_call_output", "call_id": "a", "output": "r"},
        {"role": "assistant", "content": "w"},
        {"role": "assistant", "content": ""},
        thought | {"summary": [{"type": "summary_text", "text": "two"}]},
        {"role": "assistant", "content": "x"},
        thought | {"encrypted_content": "???"},
        thought | {"content": [{"type": "reasoning_text", "text": "three"}]},
        thought | {"content": [{"type": "reasoning_text", "text": "four"}]},
        {"role": "user", "content": "p"},
    ]
    _, engine, text = await ask("x", {"input": items}, template)
    assert prompt_of(engine, text) == (
        "user[]q;assistant[one]CALL;tool[]r;assistant[]w;assistant[two]x;"
        "assistant[three\nfour];user[]p;"
    )


async def test_a_function_of_a_namespace_is_called_by_both_names():
    space = {"type": "namespace", "name": "sky", "description": "Above.", "tools": [WEATHER, CLOCK]}
    reply = CALL.replace('"weather"', '"sky.weather"')
    response, engine, text = await ask(reply, {"tools": [space, CLOCK]})
    Response.model_validate_json(response.text, strict=True)
    prompt = prompt_of(engine, text)
    assert '"name": "sky.weather"' in prompt
    assert '"name": "sky.clock"' in prompt
    assert '"name": "clock"' in prompt
    assert prompt.count("Above.") == 1
    [call] = response.json()["output"]
    assert (call["name"], call["namespace"]) == ("weather", "sky")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}
    again, engine, text = await ask("x", {"input": [call, result], "tools": [space]})
    assert "x-bitwatt-ignored-fields" not in again.headers
    assert 'CALL sky.weather {"city": "Rome"}' in prompt_of(engine, text)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        (NAMED, {"weather"}),
        ({"type": "allowed_tools", "mode": "required", "tools": [CLOCK]}, {"clock"}),
        ("auto", set()),
    ],
)
async def test_a_choice_forces_what_chats_does(choice, names):
    response, engine, _ = await ask("x", {"tools": [WEATHER, CLOCK], "tool_choice": choice})
    assert response.status_code == 200, response.text
    grammar = engine.submitted[0].sampling.grammar or ""
    assert {name for name in ("weather", "clock") if name in grammar} == names
    assert response.json()["tool_choice"] == choice
    assert response.json()["tools"][1] == CLOCK | {
        "description": None,
        "parameters": None,
        "strict": False,
    }


@pytest.mark.parametrize(
    ("effort", "ending"),
    [("none", "<think>\n\n</think>\n\n"), ("xhigh", "(high)<think>\n"), (None, "assistant\n")],
)
async def test_the_template_is_told_of_an_effort_as_chat_tells_it(effort, ending):
    body = {"reasoning": {"effort": effort, "summary": "auto"}}
    response, engine, text = await ask("yes", body, THINKER)
    assert prompt_of(engine, text).endswith(ending)
    assert response.json()["reasoning"] == {"effort": effort, "summary": None}


CALL_ITEM = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"tools": [{"type": "computer_use_preview"}]}, "tools[0].type", "computer_use_preview"),
        ({"tools": [CLOCK, {"type": "custom", "name": "x"}]}, "tools[1].type", "custom"),
        ({"tools": [1]}, "tools[0]", "object"),
        ({"tools": [{"type": "namespace", "name": "a"}]}, "tools[0].tools", "list"),
        (
            {"tools": [{"type": "namespace", "name": "a", "tools": [{"type": "custom"}]}]},
            "tools[0].tools[0].type",
            "custom",
        ),
        (
            {"tools": [{"type": "namespace", "name": "a", "tools": [CLOCK | {"name": "x" * 63}]}]},
            "tools[0].tools[0].name",
            "64 letters",
        ),
        (
            {"tools": [{"type": "namespace", "name": "a", "tools": [{"type": "function"}]}]},
            "tools[0].tools[0].name",
            "None",
        ),
        (
            {"tools": [{"type": "namespace", "name": None, "tools": [CLOCK]}]},
            "tools[0].name",
            "None",
        ),
        ({"tools": [CLOCK, CLOCK]}, "tools", "twice"),
        ({"tools": [CLOCK] * 129}, "tools", "128"),
        ({"tools": [CLOCK | {"name": "a b"}]}, "tools[0].name", "tools[0].name is 'a b'"),
        ({"tools": [CLOCK | {"parameters": 1}]}, "tools[0].parameters", "JSON schema"),
        ({"tools": [CLOCK | {"defer_loading": True}]}, "tools[0].defer_loading", "True"),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "web_search"}}, "tool_choice", "web_search"),
        ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice", "weather"),
        ({"input": [CALL_ITEM | {"call_id": ""}]}, "input[0].call_id", "1 to 256"),
        ({"input": [CALL_ITEM | {"name": None}]}, "input[0].name", "None"),
        ({"input": [CALL_ITEM | {"arguments": {}}]}, "input[0]", "JSON in a string"),
        ({"input": [CALL_ITEM] * 129}, "input[128]", "128 at most"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "None"),
        (
            {
                "input": [
                    {
                        "type": "function_call_output",
                        "call_id": "a",
                        "output": [{"type": "input_image", "image_url": "x"}],
                    }
                ]
            },
            "input[0].output",
            "input_image",
        ),
        ({"input": [{"type": "reasoning", "content": 0}]}, "input[0]", "string or a list"),
        ({"input": [{"type": "computer_call_output"}]}, "input[0]", "computer_call_output"),
        ({"reasoning": {"effort": "x" * 65}}, "reasoning.effort", "64"),
    ],
)
async def test_what_is_wrong_with_tools_and_calls_is_refused_by_its_name(change, param, words):
    response, _, _ = await ask("x", change)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


async def test_tools_are_refused_where_the_model_could_not_call_them():
    response, _, _ = await ask("x", {"tools": [CLOCK]}, UNKNOWN)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"


async def test_fields_of_tools_and_items_that_no_api_has_are_named():
    items = [CALL_ITEM | {"mood": 1}, {"role": "user", "content": "x"}]
    response, _, _ = await ask("x", {"input": items, "tools": [CLOCK | {"size": 1}]})
    assert response.headers["x-bitwatt-ignored-fields"] == "tools[].size, input[].mood"


async def test_a_response_that_fails_within_a_call_tells_it_as_far_as_it_came():
    body = {"tools": [WEATHER], "stream": True}
    response, _, _ = await ask(f"So: {CALL}", body, dies_after=45)
    events = events_of(response)
    for event in events:
        EVENTS.validate_json(json.dumps(event), strict=True)
    last = events[-1]
    assert last["type"] == "response.failed"
    message, call = told(last["response"]["output"])
    assert message == ("message", "So:", "completed")
    assert (call[1], call[-1]) == ("weather", "incomplete")


@asynccontextmanager
async def caller(engine=None, **settings):
    """Yield what sends a body to one application, under a key."""
    text = make_tools_text(THINKER)
    engine = engine or FakeEngine(reply=f"<think>hm</think>So: {CALL}")
    engine.info = info_of(text)
    app = make_app(engine, text=text, **settings)
    async with make_client(app) as client:

        async def send(given, key="k", **body):
            headers = {"authorization": f"Bearer {key}"}
            asked = {"model": "tiny", "input": given, "tools": [WEATHER]} | body
            return await client.post("/v1/responses", json=asked, headers=headers)

        yield send, engine, text


def references(output):
    return [{"type": "item_reference", "id": item["id"]} for item in output]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_item_of_an_earlier_response_may_be_referred_to(is_streamed):
    asked = {"role": "user", "content": "hello"}
    async with caller() as (send, engine, text):
        answer = await send([asked], stream=is_streamed)
        output = events_of(answer)[-1]["response"]["output"] if is_streamed else None
        output = output or answer.json()["output"]
        call = output[2]["call_id"]
        result = {"type": "function_call_output", "call_id": call, "output": "sun"}
        for items in (output, references(output)):
            response = await send([asked, *items, result])
            assert response.status_code == 200, response.text
    whole, referred = engine.submitted[1:]
    assert text.codec.decode(whole.prompt_token_ids) == text.codec.decode(referred.prompt_token_ids)


@pytest.mark.parametrize(
    ("settings", "body", "key"),
    [
        ({}, {"store": False}, "k"),
        ({"kept_items_bytes": 0}, {}, "k"),
        ({"kept_items_bytes": 200}, {}, "k"),  # too few for the first item and those behind it
        ({}, {}, "l"),
    ],
)
async def test_an_item_is_not_there_where_it_was_not_to_be_kept_or_is_anothers(
    settings, body, key, tmp_path
):
    (tmp_path / "keys").write_text("k\nl\n")
    keys = {"api_key_file": str(tmp_path / "keys")}
    async with caller(**keys, **settings) as (send, _, _):
        output = (await send("hello", **body)).json()["output"]
        response = await send(references(output), key)
    error = response.json()["error"]
    assert response.status_code == 400
    assert "input[0] refers to 'rs_" in error["message"]
    assert "--kept-items-bytes" in error["message"]


@pytest.mark.parametrize("reference", [{"id": 1}, {}, {"id": "x" * 257}])
async def test_a_reference_without_an_id_is_refused(reference):
    response, _, _ = await ask("x", {"input": [{"type": "item_reference", **reference}]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input[0].id"


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200)), max_size=30),
    st.integers(0, 600),
)
def test_the_latest_items_are_kept_as_far_as_the_bytes_go(steps, max_bytes):
    """Against a list, the latest last."""
    kept, model = CallerItems(max_bytes), []
    for at, (looked_up, size) in enumerate(steps):
        for item in model:
            if item.id == f"{looked_up}":
                model = [*(i for i in model if i is not item), item]
        found = kept.find(f"{looked_up}")
        assert (found is not None) == (f"{looked_up}" in [item.id for item in model])
        item = OutputMessage(id=f"{at}", status="completed", content=[OutputText(text="x" * size)])
        kept.keep([item])
        if len(msgspec.json.encode(item)) <= max_bytes:
            model.append(item)
        while sum(len(msgspec.json.encode(item)) for item in model) > max_bytes:
            model.pop(0)
        for item in model:
            assert kept.find(item.id) == msgspec.to_builtins(item)


def test_no_item_of_an_input_is_lost_in_whatever_order_they_come():
    """Every sequence of up to four of these."""
    items = {
        "silent": {"role": "assistant", "content": ""},
        "said": {"role": "assistant", "content": "x"},
        "asked": {"role": "user", "content": "u"},
        "thought": {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
        "called": CALL_ITEM,
        "brought": {"type": "function_call_output", "call_id": "a", "output": "o"},
    }
    for length in range(1, 5):
        for names in product(items, repeat=length):
            unknown = []
            messages = chat_messages([items[name] for name in names], unknown, lambda _: None)
            assert not unknown
            contents = [message["content"] for message in messages]
            thoughts = "".join(message.get("reasoning_content", "") for message in messages)
            calls = [call for message in messages for call in message.get("tool_calls", ())]
            assert contents.count("x") == names.count("said")
            assert contents.count("u") == names.count("asked")
            assert contents.count("o") == names.count("brought")
            assert thoughts.count("t") == names.count("thought")
            assert len(calls) == names.count("called")
