"""The `openai` package: both of its APIs."""

import json
from typing import Literal

import openai
from cases import ANSWER, QUESTION, REAL, SCHEMA, SCRIPTED, run
from pydantic import BaseModel

real = openai.OpenAI(base_url=f"{REAL}/v1", api_key="none")
scripted = openai.OpenAI(base_url=f"{SCRIPTED}/v1", api_key="none")
WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASKED = [{"role": "user", "content": QUESTION}]


def chat():
    answer = real.chat.completions.create(model="builtin", messages=ASKED, max_tokens=9)
    assert answer.choices[0].message.content


def chat_stream():
    stream = real.chat.completions.create(
        model="builtin", messages=ASKED, max_tokens=9, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def chat_parse():
    class Trip(BaseModel):
        city: Literal["Rome", "Oslo"]

    answer = real.chat.completions.parse(
        model="builtin", messages=ASKED, max_tokens=40, response_format=Trip
    )
    assert isinstance(answer.choices[0].message.parsed, Trip)


def chat_tools():
    messages = list(ASKED)
    tools = [{"type": "function", "function": WEATHER}]
    called = scripted.chat.completions.create(model="tiny", messages=messages, tools=tools)
    message = called.choices[0].message
    messages += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
    ]
    answer = scripted.chat.completions.create(model="tiny", messages=messages, tools=tools)
    assert answer.choices[0].message.content == ANSWER


def responses():
    assert real.responses.create(model="builtin", input=QUESTION, max_output_tokens=9).output_text


def responses_parse():
    form = {"type": "json_schema", "name": "trip", "schema": SCHEMA}
    answer = real.responses.create(
        model="builtin", input=QUESTION, max_output_tokens=60, text={"format": form}
    )
    assert json.loads(answer.output_text)["city"] in ("Rome", "Oslo")


def responses_tools():
    given = list(ASKED)
    tools = [{"type": "function", "strict": False, **WEATHER}]
    with scripted.responses.stream(model="tiny", input=given, tools=tools) as stream:
        for _ in stream:
            pass
        called = stream.get_final_response()
    thought, call = called.output
    assert thought.content[0].text == "The tool knows."
    given += [
        *(item.model_dump(exclude_none=True) for item in called.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    answer = scripted.responses.create(model="tiny", input=given, tools=tools)
    assert answer.output_text == ANSWER


def models():
    assert "builtin" in [model.id for model in real.models.list()]


run(models, chat, chat_stream, chat_parse, chat_tools, responses, responses_parse, responses_tools)
