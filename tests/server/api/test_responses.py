"""/v1/responses, driven by OpenAI's own client, and held to its types."""

import json
from contextlib import asynccontextmanager

import openai
import pytest
from openai.lib.streaming.responses import ResponseTextDeltaEvent  # the client's own gathering
from openai.types import responses as kinds
from openai.types.responses import Response
from pydantic import TypeAdapter

from tests.fakes import FakeEngine, make_app, make_client, run_server, untimed

pytestmark = pytest.mark.anyio

EVENTS = TypeAdapter(kinds.ResponseStreamEvent)
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@asynccontextmanager
async def openai_client(engine, **settings):
    """Yield OpenAI's client of a server over this engine."""
    async with (
        run_server(make_app(engine, **settings), **settings) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def ask(body, engine=None, **settings):
    async with make_client(make_app(engine or FakeEngine(), **settings)) as client:
        return await client.post("/v1/responses", json={"model": "tiny"} | body)


def events_of(response):
    """Return the stream's events, each under its own name."""
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    read = []
    for event in events:
        name, data = event.split("\n")
        read.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {read[-1]['type']}"
    return read


async def test_the_client_reads_a_whole_response():
    async with openai_client(FakeEngine()) as client:
        response = await client.responses.create(
            model="tiny", input="hi", instructions="be brief", metadata={"a": "b"}, store=False
        )
    assert response.output_text == "the quick brown fox"
    assert (response.status, response.error, response.metadata) == ("completed", None, {"a": "b"})
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.instructions == "be brief"


async def test_the_clients_stream_gathers_the_same_response():
    async with (
        openai_client(FakeEngine()) as client,
        client.responses.stream(model="tiny", input="hi") as stream,
    ):
        texts = [e.delta async for e in stream if isinstance(e, ResponseTextDeltaEvent)]
        gathered = await stream.get_final_response()
    assert "".join(texts) == gathered.output_text == "the quick brown fox"
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("change", "status"),
    [({}, "completed"), ({"max_output_tokens": 2}, "incomplete"), ({"stop": "the"}, "completed")],
)
async def test_events_come_in_openais_order_with_its_types_and_one_end(change, status):
    response = await ask({"input": "hi", "stream": True} | change)
    events = events_of(response)
    for event in events:
        EVENTS.validate_json(json.dumps(event), strict=True)
    names = list(dict.fromkeys(event["type"] for event in events))
    expected = [*ORDER, f"response.{status}"]
    assert names == [n for n in expected if n in names]
    assert set(expected) - set(names) <= {"response.output_text.delta"}
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events].count(f"response.{status}") == 1
    deltas = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    last = events[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == deltas
    whole = (await ask({"input": "hi"} | change)).json()
    assert (last["status"], whole["status"]) == (status, status)
    assert whole["output"][0]["content"] == last["output"][0]["content"]
    assert untimed(whole["usage"]) == untimed(last["usage"])


@pytest.mark.parametrize("change", [{}, {"max_output_tokens": 1}, {"reasoning": {"effort": "low"}}])
async def test_a_whole_response_is_one_of_openais(change):
    body = await ask({"input": [{"role": "user", "content": "hi"}]} | change)
    Response.model_validate_json(body.text, strict=True)


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("hi", "<|user|>hi<|end|>"),
        ([{"role": "user", "content": "hi"}], "<|user|>hi<|end|>"),
        (
            [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}],
            "<|user|>a<|end|>",
        ),
        (
            [
                {"role": "developer", "content": "x"},
                {"role": "user", "content": "a"},
                {"type": "reasoning", "id": "r", "summary": []},
                {
                    "type": "message",
                    "id": "msg_1",
                    "status": "completed",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "b", "annotations": []}],
                },
                {"role": "user", "content": "c"},
            ],
            "<|system|>x<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|>",
        ),
    ],
)
@pytest.mark.parametrize("told", [None, "be brief"])
async def test_input_is_put_to_the_model_as_chat_puts_it(given, prompt, told):
    engine = FakeEngine()
    response = await ask({"input": given, "instructions": told}, engine)
    assert response.status_code == 200, response.text
    if told is not None:
        others = prompt.removeprefix("<|system|>x<|end|>")
        told = told if others == prompt else f"{told}\n\nx"
        prompt = f"<|system|>{told}<|end|>{others}"
    async with make_client(make_app()) as client:
        body = {"model": "tiny", "tokens": engine.submitted[0].prompt_token_ids}
        spelled = (await client.post("/detokenize", json=body)).json()["prompt"]
    assert spelled == f"{prompt}<|assistant|>"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input[0]"),
        ({"input": [{"type": {}, "role": "user", "content": "x"}]}, "input[0]"),
        ({"input": [{"role": {}, "content": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": {}}]}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": None}]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"input": "a " * 999}, "input"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
async def test_what_is_not_done_is_refused_by_its_name(change, param):
    response = await ask({"input": "hi"} | change)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param, error


@pytest.mark.parametrize("kind", ["json_schema", "json_object"])
async def test_the_texts_format_is_what_chat_knows_as_response_format(kind):
    given = {"type": kind} | ({"name": "n", "schema": 3} if kind == "json_schema" else {})
    refused = await ask({"input": "hi", "text": {"format": given | {"colour": 1}}})
    if kind == "json_schema":
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["param"], error["message"]) == (
            "text.format",
            "text.format schema is 3; it is an object",
        )
    else:
        assert refused.headers["x-bitwatt-ignored-fields"] == "text.format.colour"


async def test_a_response_that_fails_midway_ends_in_one_failed_event():
    response = await ask({"input": "hi", "stream": True}, FakeEngine(dies_after=2))
    events = events_of(response)
    for event in events:
        EVENTS.validate_json(json.dumps(event), strict=True)
    last = events[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


async def test_pieces_are_padded_where_that_is_asked_for():
    options = {"include_obfuscation": True}
    events = events_of(await ask({"input": "hi", "stream": True, "stream_options": options}))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert len(deltas) > 1
    assert all("obfuscation" in delta for delta in deltas)
