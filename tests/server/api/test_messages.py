"""/v1/messages, driven by Anthropic's own client, and held to its types."""

import json
from contextlib import asynccontextmanager

import pytest

from tests.fakes import FakeEngine, make_app, make_client, run_server, untimed

pytestmark = pytest.mark.anyio

HELLO = [{"role": "user", "content": "hello"}]
ASKED = {"model": "tiny", "max_tokens": 20, "messages": HELLO}


@asynccontextmanager
async def anthropic_client(engine, key="none", **settings):
    """Yield Anthropic's client of a server over this engine."""
    import anthropic

    async with (
        run_server(make_app(engine, **settings), **settings) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as client,
    ):
        yield client


async def post(body, engine=None, path="/v1/messages", **settings):
    async with make_client(make_app(engine or FakeEngine(), **settings)) as client:
        return await client.post(path, json=body)


async def test_the_client_reads_a_whole_message_and_counts_the_same_tokens():
    async with anthropic_client(FakeEngine(), key="k", api_key="k") as client:
        message = await client.messages.create(**ASKED, system="be brief")
        count = await client.messages.count_tokens(
            model="tiny", messages=HELLO, system=[{"type": "text", "text": "be brief"}]
        )
    assert [block.text for block in message.content] == ["the quick brown fox"]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == count.input_tokens


async def test_the_clients_stream_gathers_the_same_message():
    async with anthropic_client(FakeEngine()) as client:
        whole = await client.messages.create(**ASKED)
        async with client.messages.stream(**ASKED) as stream:
            texts = [text async for text in stream.text_stream]
            gathered = await stream.get_final_message()
    assert "".join(texts) == "the quick brown fox"
    assert len(texts) > 1
    assert gathered.content[0].text == whole.content[0].text
    assert gathered.stop_reason == whole.stop_reason
    assert gathered.usage.output_tokens == whole.usage.output_tokens


async def test_a_wrong_key_is_the_clients_own_error():
    import anthropic

    async with anthropic_client(FakeEngine(), key="wrong", api_key="k") as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            await client.messages.create(**ASKED)
    assert caught.value.body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("change", "reason", "string", "text"),
    [
        ({}, "end_turn", None, "the quick brown fox"),
        ({"max_tokens": 1}, "max_tokens", None, "the"),
        ({"stop_sequences": ["zebra", "brown"]}, "stop_sequence", "brown", "the quick "),
        ({"stop_sequences": ["the"]}, "stop_sequence", "the", ""),
    ],
)
async def test_a_message_says_why_it_ended_whole_and_streamed(change, reason, string, text):
    from tests.server.api.anthropics import as_event, as_message

    whole = await post(ASKED | change)
    message = as_message(whole.text)
    assert "".join(block.text for block in message.content) == text
    assert (message.stop_reason, message.stop_sequence) == (reason, string)
    stream = await post(ASKED | change | {"stream": True})
    events = [event.split("\n") for event in stream.text.split("\n\n") if event]
    read = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name for name, _ in events] == [f"event: {event['type']}" for event in read]
    for event in read:
        if event["type"] != "ping":
            as_event(json.dumps(event))
    block = ["content_block_start", "content_block_delta", "content_block_stop"] if text else []
    order = ["message_start", "ping", *block, "message_delta", "message_stop"]
    assert list(dict.fromkeys(event["type"] for event in read)) == order
    assert read[-2]["delta"] == {"stop_reason": reason, "stop_sequence": string}
    assert untimed(read[-2]["usage"]) == untimed(whole.json()["usage"])


@pytest.mark.parametrize(
    ("body", "status", "kind", "said"),
    [
        (ASKED | {"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "tiny", "messages": HELLO}, 400, "invalid_request_error", "max_tokens is requ"),
        (ASKED | {"model": "x"}, 404, "not_found_error", "'x'"),
        (ASKED | {"max_tokens": 0}, 400, "invalid_request_error", "max_tokens is 0"),
        (ASKED | {"max_tokens": 999}, 400, "invalid_request_error", "max_tokens is 999"),
        (ASKED | {"messages": []}, 400, "invalid_request_error", "messages"),
        (
            ASKED
            | {
                "messages": [
                    *HELLO,
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
                    },
                ]
            },
            400,
            "invalid_request_error",
            "end with tool_use",
        ),
        (
            ASKED | {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "invalid_request_error",
            "'image'",
        ),
        (ASKED | {"system": [{"type": []}]}, 400, "invalid_request_error", "blocks of type []"),
        (ASKED | {"container": "c"}, 400, "invalid_request_error", "container"),
        (ASKED | {"messages": " " * 4096}, 413, "request_too_large", "--max-body-bytes"),
    ],
)
async def test_a_refusal_is_anthropics(body, status, kind, said):
    response = await post(body, max_body_bytes=2048)
    error = response.json()
    assert (response.status_code, error["type"]) == (status, "error")
    assert error["error"].keys() == {"type", "message"}
    assert error["error"]["type"] == kind
    assert said in error["error"]["message"]
    assert error["request_id"] == response.headers["request-id"]


@pytest.mark.parametrize("engine", [FakeEngine(is_ready=False), FakeEngine(max_open=0)])
async def test_what_is_to_be_tried_again_is_overloaded(engine):
    response = await post(ASKED, engine)
    assert (response.status_code, response.json()["error"]["type"]) == (529, "overloaded_error")
    assert response.headers["retry-after"] == "1"


async def test_a_message_that_fails_midway_ends_in_one_error():
    import anthropic

    async with anthropic_client(FakeEngine(dies_after=2)) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            async with client.messages.stream(**ASKED) as stream:
                await stream.get_final_message()
    assert caught.value.body["error"]["type"] == "api_error"


async def test_blocks_are_lines_and_unknown_fields_are_named():
    block = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "mood": 1}
    asked = ASKED | {"messages": [{"role": "user", "content": [block, block]}]}
    engine = FakeEngine()
    response = await post(asked, engine)
    plain = FakeEngine()
    await post(ASKED | {"messages": [{"role": "user", "content": "a\na"}]}, plain)
    assert response.headers["x-bitwatt-ignored-fields"] == "messages[].content[].mood"
    assert engine.submitted[0].prompt_token_ids == plain.submitted[0].prompt_token_ids
