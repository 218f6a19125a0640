"""LangChain's ChatOpenAI: invoke, stream, structured output, bound tools, and over responses."""

from typing import Literal

from cases import ANSWER, QUESTION, REAL, SCRIPTED, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

real = ChatOpenAI(
    base_url=f"{REAL}/v1", api_key="none", model="builtin", max_tokens=60, temperature=0
)


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    return f"sunny in {city}"


class Trip(BaseModel):
    """A trip."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Oslo"]


def invoke():
    assert real.invoke(QUESTION).content


def stream():
    assert len([chunk for chunk in real.stream(QUESTION) if chunk.content]) > 1


async def astream():
    assert [chunk async for chunk in real.astream(QUESTION)]


def structured_output():
    for method in ("json_schema", "function_calling"):
        found = real.with_structured_output(Trip, method=method).invoke(QUESTION)
        assert isinstance(found, Trip), method


def _bound_tools(**options):
    scripted = ChatOpenAI(base_url=f"{SCRIPTED}/v1", api_key="none", model="tiny", **options)
    bound = scripted.bind_tools([weather])
    messages = [HumanMessage(QUESTION)]
    called = bound.invoke(messages)
    [call] = called.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Rome"})
    messages += [called, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert bound.invoke(messages).text == ANSWER
    whole = None
    for chunk in bound.stream(messages[:1]):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == {"city": "Rome"}


def bound_tools():
    _bound_tools()


def bound_tools_over_responses():
    _bound_tools(use_responses_api=True)


run(invoke, stream, astream, structured_output, bound_tools, bound_tools_over_responses)
