"""pydantic-ai: agents over chat completions, responses and messages."""

from typing import Literal

from cases import ANSWER, QUESTION, REAL, SCRIPTED, run
from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

real = OpenAIProvider(base_url=f"{REAL}/v1", api_key="none")
scripted = OpenAIProvider(base_url=f"{SCRIPTED}/v1", api_key="none")


class Trip(BaseModel):
    """A trip."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Oslo"]


def answer():
    agent = Agent(OpenAIChatModel("builtin", provider=real), model_settings={"max_tokens": 20})
    assert agent.run_sync(QUESTION).output


def structured_output():
    model = OpenAIChatModel("builtin", provider=real)
    agent = Agent(model, output_type=Trip, model_settings={"max_tokens": 60, "temperature": 0})
    assert isinstance(agent.run_sync(QUESTION).output, Trip)


def _with_tools(model):
    agent = Agent(model)

    @agent.tool_plain
    def weather(city: str) -> str:
        """Tell the weather."""
        return f"sunny in {city}"

    return agent


def _call(model):
    assert _with_tools(model).run_sync(QUESTION).output == ANSWER


def tools():
    _call(OpenAIChatModel("tiny", provider=scripted))


async def tools_streamed():
    agent = _with_tools(OpenAIChatModel("tiny", provider=scripted))
    async with agent.run_stream(QUESTION) as result:
        assert await result.get_output() == ANSWER


def tools_over_responses():
    _call(OpenAIResponsesModel("tiny", provider=scripted))


def tools_over_messages():
    provider = AnthropicProvider(base_url=SCRIPTED, api_key="none")
    _call(AnthropicModel("tiny", provider=provider))


run(answer, structured_output, tools, tools_streamed, tools_over_responses, tools_over_messages)
