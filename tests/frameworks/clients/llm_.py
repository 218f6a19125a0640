"""simonw's `llm`, by its own extra-openai-models.yaml: prompt, stream, schema and tools."""

import json
import os
import pathlib
import tempfile

from cases import ANSWER, QUESTION, REAL, SCHEMA, SCRIPTED, run

folder = pathlib.Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(folder)
(folder / "extra-openai-models.yaml").write_text(
    f"""
- model_id: real
  model_name: builtin
  api_base: {REAL}/v1
  supports_schema: true
  supports_tools: true
- model_id: scripted
  model_name: tiny
  api_base: {SCRIPTED}/v1
  supports_tools: true
"""
)

import llm  # noqa: E402 - which reads its folder's name when it is imported


def model(name):
    found = llm.get_model(name)
    found.key = "none"
    return found


def prompt():
    assert model("real").prompt(QUESTION, max_tokens=9, stream=False).text()


def stream():
    assert list(model("real").prompt(QUESTION, max_tokens=9))


def schema():
    answer = model("real").prompt(QUESTION, schema=SCHEMA, max_tokens=60)
    assert json.loads(answer.text())["city"] in ("Rome", "Oslo")


def tools():
    def weather(city: str) -> str:
        """Tell the weather."""
        return f"sunny in {city}"

    chain = model("scripted").chain(QUESTION, tools=[weather])
    assert chain.text().endswith(ANSWER)


run(prompt, stream, schema, tools)
