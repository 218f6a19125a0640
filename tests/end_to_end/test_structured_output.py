"""Structured output of the embedded model: valid by any schema, and no one's tokens wait for it."""

import asyncio
import itertools
import json
import os
import re
import signal

import httpx
import jsonschema
import pytest

from tests.end_to_end.conftest import Server
from tests.extent import TEST_ALL

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

NUM_CASES = 200 if TEST_ALL else 20
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NAME = {"type": "string", "maxLength": 12}


def record(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = [
    record(name=NAME, age={"type": "integer", "minimum": 0, "maximum": 120}),
    record(kind={"enum": ["function", "class", None, 3]}, ok={"type": "boolean"}),
    record(tags={"type": "array", "items": NAME, "minItems": 1, "maxItems": 3}),
    record(day={"type": "string", "format": "date"}, id={"type": "string", "format": "uuid"}),
    record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    record(inner=record(x={"type": "number", "minimum": -1, "maximum": 1}, y={"const": "y"})),
    record(either={"anyOf": [{"type": "null"}, {"type": "integer", "maximum": 99, "minimum": 9}]}),
    record(pair={"type": "array", "prefixItems": [NAME, {"type": "boolean"}], "items": False}),
    {
        "type": "array",
        "items": {"oneOf": [record(a={"const": "a"}), record(b={"type": "boolean"})]},
        "maxItems": 3,
    },
    {
        "$defs": {"node": record(v={"enum": [1, 2]}, n={"$ref": "#/$defs/l"}), "l": {"const": 0}},
        "$ref": "#/$defs/node",
    },
]
PROMPTS = ["What does textwrap.dedent do?", "def main():", "Tell me of yourself ☃", "{", "1 2 3 4"]
SETTINGS = [
    {"temperature": 0},
    {"temperature": 1, "logprobs": True},
    {"temperature": 1.3, "top_k": 30, "frequency_penalty": 0.4},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "n": 2},
]
CASES = list(itertools.product(range(len(SCHEMAS)), range(len(PROMPTS)), range(len(SETTINGS))))


def body_of(case):
    schema, prompt, setting = case
    asked = {
        "model": "builtin",
        "max_tokens": 400,
        "seed": prompt,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMAS[schema], "strict": True},
        },
        **SETTINGS[setting],
    }
    if schema == 5:  # a number has as many digits as a model likes, and a small one likes zeros
        asked.setdefault("frequency_penalty", 0.4)
    if prompt % 2:
        if "logprobs" in asked:
            asked["logprobs"] = 1
        return COMPLETIONS, asked | {"prompt": PROMPTS[prompt]}
    return CHAT, asked | {"messages": [{"role": "user", "content": PROMPTS[prompt]}]}


async def whole(client, path, body):
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return [
        (choice.get("text") or choice["message"]["content"], choice["finish_reason"])
        for choice in response.json()["choices"]
    ]


async def streamed(client, path, body):
    texts, reasons = {}, {}
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            for choice in event["choices"]:
                index = choice["index"]
                new = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                texts[index] = texts.get(index, "") + new
                reasons[index] = choice["finish_reason"] or reasons.get(index)
    return [(texts[index], reasons[index]) for index in sorted(texts)]


async def test_every_schemas_answers_validate_streamed_and_not(server: Server):
    turns = asyncio.Semaphore(16)

    async def check(client, case):
        async with turns:
            path, body = body_of(case)
            answers = await whole(client, path, body)
            assert await streamed(client, path, body) == answers
        for text, reason in answers:
            assert reason == "stop", (case, text)
            jsonschema.validate(json.loads(text), SCHEMAS[case[0]])

    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        step = len(CASES) // NUM_CASES
        offsets = range(0, len(CASES), step)
        await asyncio.gather(*(check(client, CASES[(i + i // step) % 200]) for i in offsets))


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-z]{2}"}}, r"[0-9]{3}-[a-z]{2}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b" root'}}, "b*a"),
        ({"structured_outputs": {"json": {"enum": [True, 5]}}}, "true|5"),
        ({"response_format": {"type": "text"}}, "(?s).*"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_an_answer_is_what_was_asked_for(server: Server, path, asked, pattern):
    start = {"prompt": "a"} if path == COMPLETIONS else {"messages": [message("a")]}
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        body = {"model": "builtin", "max_tokens": 40, "seed": 3, **start, **asked}
        for text, _ in await whole(client, path, body | {"n": 4}):
            assert re.fullmatch(pattern, text), text


def message(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("asked", "param", "told"),
    [
        (
            {"structured_outputs": {"json": {"type": "integer", "multipleOf": 999_983}}},
            "structured_outputs.json",
            "1.5 s to compile, which is the limit",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"not": {}}},
                }
            },
            "response_format",
            'Unimplemented keys: ["not"]',
        ),
        ({"structured_outputs": {"regex": ".?" * 1024}}, "structured_outputs.regex", "fuel"),
        ({"structured_outputs": {"regex": "a" * 5000}}, "structured_outputs.regex", "is 2048"),
        ({"structured_outputs": {}}, "structured_outputs", "it has none"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format",
            "exclude each other",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "type is 'xml'"),
    ],
)
async def test_a_hostile_grammar_is_a_400_and_no_other_requests_tokens_wait(
    server: Server, asked, param, told
):
    """Tokens come while it is tried: by the time it is refused there are more than before."""
    count, has_begun = 0, asyncio.Event()
    takes_long = "1.5 s" in told

    async def read(client):
        nonlocal count
        num_tokens = 900 if takes_long else 100
        body = {"model": "builtin", "prompt": "a", "max_tokens": num_tokens, "ignore_eos": True}
        async with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
            async for line in response.aiter_lines():
                count += line.startswith("data: ")
                has_begun.set()

    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        stream = asyncio.create_task(read(client))
        await has_begun.wait()
        before = count
        body = {"model": "builtin", "prompt": "a", "max_tokens": 5, **asked}
        response = await client.post(COMPLETIONS, json=body)
        if takes_long:
            assert count > before or stream.done()
        await stream
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert told in response.json()["error"]["message"]


async def test_an_engine_that_was_started_again_goes_by_grammars_too(own_server: Server):
    body = {"model": "builtin", "prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}}
    async with httpx.AsyncClient(base_url=own_server.url, timeout=120) as client:
        [(text, _)] = await whole(client, COMPLETIONS, body)
        assert text in ("yes", "no")
        killed, num_before = own_server.engine_ids().values(), own_server.logged("is started again")
        for process_id in killed:
            os.kill(process_id, signal.SIGKILL)
        while own_server.logged("is started again") < num_before + len(killed):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        own_server.wait_ready()
        [(text, _)] = await whole(client, COMPLETIONS, body)
        assert text in ("yes", "no")
