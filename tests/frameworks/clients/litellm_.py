"""litellm: completion, and its bridges to responses and to Anthropic's messages."""

import asyncio
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it asks a site for prices else

import litellm
from cases import ANSWER, QUESTION, REAL, SCRIPTED, run

REAL_MODEL = {"model": "openai/builtin", "api_base": f"{REAL}/v1", "api_key": "none"}
SCRIPTED_MODEL = {"model": "openai/tiny", "api_base": f"{SCRIPTED}/v1", "api_key": "none"}
ASKED = [{"role": "user", "content": QUESTION}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}


def completion():
    answer = litellm.completion(**REAL_MODEL, messages=ASKED, max_tokens=9)
    assert answer.choices[0].message.content


def completion_stream():
    stream = litellm.completion(**REAL_MODEL, messages=ASKED, max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def _loop(model):
    messages = list(ASKED)
    message = litellm.completion(**model, messages=messages, tools=[TOOL], max_tokens=900)
    message = message.choices[0].message
    [call] = message.tool_calls
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = litellm.completion(**model, messages=messages, tools=[TOOL], max_tokens=900)
    assert answer.choices[0].message.content == ANSWER


def tools():
    _loop(SCRIPTED_MODEL)


def tools_over_responses():
    _loop(SCRIPTED_MODEL | {"model": "openai/responses/tiny"})


def tools_over_messages():
    _loop({"model": "anthropic/tiny", "api_base": SCRIPTED, "api_key": "none"})


def responses():
    answer = litellm.responses(**REAL_MODEL, input=QUESTION, max_output_tokens=9)
    assert answer.output[0].content[0].text


def messages_from_chat():
    answer = asyncio.run(
        litellm.anthropic_messages(
            **SCRIPTED_MODEL,
            messages=ASKED,
            max_tokens=900,
            tools=[{"name": "weather", "input_schema": PARAMETERS}],
        )
    )
    [call] = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert call["input"] == {"city": "Rome"}


run(
    completion,
    completion_stream,
    tools,
    tools_over_responses,
    tools_over_messages,
    responses,
    messages_from_chat,
)
