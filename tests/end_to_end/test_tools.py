"""Forced calls of the embedded model, which knows no tools: valid by each schema, always."""

import asyncio
import json

import jsonschema
import openai
import pytest

from tests.end_to_end.conftest import Server

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "paint": {
        "$defs": {"colour": {"enum": ["red", "green"]}},
        "properties": {"colours": {"type": "array", "items": {"$ref": "#/$defs/colour"}}},
        "required": ["colours"],
        "additionalProperties": False,
    },
    "clock": None,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, **({} if schema is None else {"parameters": schema})},
    }
    for name, schema in SCHEMAS.items()
]
MESSAGES = [{"role": "user", "content": "How is the weather in Rome?"}]


def named(name):
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("choice", ["required", *map(named, SCHEMAS)])
async def test_forced_calls_are_valid_streamed_and_not(server: Server, choice):
    async def check(client, seed):
        asked = {
            "model": "builtin",
            "messages": MESSAGES,
            "tools": TOOLS,
            "tool_choice": choice,
            "parallel_tool_calls": bool(seed % 2),
            "max_tokens": 160,
            "seed": seed,
            "frequency_penalty": 0.5,
        }
        answer = await client.chat.completions.create(**asked)
        [whole] = answer.choices
        told = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
        streamed: dict[int, list[str]] = {}
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            for call in chunk.choices[0].delta.tool_calls or []:
                parts = streamed.setdefault(call.index, ["", ""])
                parts[0] += call.function.name or ""
                parts[1] += call.function.arguments or ""
        assert [tuple(parts) for parts in streamed.values()] == told
        if whole.finish_reason == "length":  # it may call as often as it likes
            told.pop()
        else:
            assert whole.finish_reason == "tool_calls"
            assert told
        if choice != "required" or not seed % 2:
            assert len(told) <= 1
        for name, arguments in told:
            assert choice in ("required", named(name))
            schema = SCHEMAS[name] or {"type": "object", "maxProperties": 0}
            jsonschema.validate(json.loads(arguments), schema)

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        await asyncio.gather(*(check(client, seed) for seed in range(6)))


async def test_tools_that_the_model_may_call_or_not_are_refused_by_name(server: Server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        with pytest.raises(openai.BadRequestError, match="takes no tools"):
            await client.chat.completions.create(model="builtin", messages=MESSAGES, tools=TOOLS)


async def test_a_turn_with_calls_and_results_goes_on(server: Server):
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(
            model="builtin", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=8
        )
    assert answer.choices[0].message.tool_calls is None
