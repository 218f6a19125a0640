"""The `anthropic` package: a loop of its tool runner, and a stream with thinking."""

import anthropic
from anthropic import beta_tool
from cases import ANSWER, QUESTION, REAL, SCHEMA, SCRIPTED, run

real = anthropic.Anthropic(base_url=REAL, api_key="none")
scripted = anthropic.Anthropic(base_url=SCRIPTED, api_key="none")
ASKED = [{"role": "user", "content": QUESTION}]


@beta_tool
def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: Where.
    """
    return f"sunny in {city}"


def messages():
    answer = real.messages.create(model="builtin", messages=ASKED, max_tokens=9)
    assert answer.content[0].text


def stream_with_thinking():
    with scripted.messages.stream(
        model="tiny",
        messages=ASKED,
        max_tokens=2000,
        thinking={"type": "enabled", "budget_tokens": 1024},
        tools=[weather.to_dict()],
    ) as stream:
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "tool_use"]


def forced_tool():
    answer = real.messages.create(
        model="builtin",
        messages=ASKED,
        max_tokens=90,
        tools=[{"name": "trip", "input_schema": SCHEMA}],
        tool_choice={"type": "tool", "name": "trip"},
    )
    assert answer.content[0].input["city"] in ("Rome", "Oslo")


def tool_runner():
    runner = scripted.beta.messages.tool_runner(
        model="tiny", messages=ASKED, max_tokens=900, tools=[weather]
    )
    assert runner.until_done().content[0].text == ANSWER


run(messages, stream_with_thinking, forced_tool, tool_runner)
