"""instructor: answers by a model of pydantic's, in each of its modes."""

from typing import Literal

import instructor
import openai
from cases import QUESTION, REAL, run
from pydantic import BaseModel, ConfigDict

client = openai.OpenAI(base_url=f"{REAL}/v1", api_key="none")


class Trip(BaseModel):
    """A trip."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Oslo"]


def _ask(mode):
    asked = instructor.from_openai(client, mode=mode)
    found = asked.chat.completions.create(
        model="builtin",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=60,
        temperature=0,
        response_model=Trip,
        max_retries=0,
    )
    assert isinstance(found, Trip)


def tools():
    _ask(instructor.Mode.TOOLS)


def json_schema():
    _ask(instructor.Mode.JSON_SCHEMA)


def responses():
    asked = instructor.from_openai(client, mode=instructor.Mode.RESPONSES_TOOLS)
    found = asked.responses.create(
        model="builtin",
        input=QUESTION,
        max_output_tokens=60,
        temperature=0,
        response_model=Trip,
        max_retries=0,
    )
    assert isinstance(found, Trip)


run(tools, json_schema, responses)
