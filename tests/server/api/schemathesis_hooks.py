"""What JSON Schema can't say of a body, for schemathesis to bear a refusal of."""

import json
import re
from typing import Any

import schemathesis
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.openapi.checks import RejectedPositiveData

_TOKEN_ID = re.compile(r"has token id (\d+); the model has (\d+) tokens")

_GRAMMARS = ("response_format", "structured_outputs", "text.format", "output_config.format")


@schemathesis.hook
def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """Return whether the failure is one: a body may be refused for what its schema can't say."""
    if isinstance(failure, AcceptedNegativeData):
        return response.status_code != 413  # refused for its size before it is looked at
    if not isinstance(failure, RejectedPositiveData) or response.status_code != 400:
        return True
    return not is_beyond_json_schema(case.body, response.json()["error"])


def is_beyond_json_schema(body: dict[str, Any], error: dict[str, Any]) -> bool:
    """Return whether two fields don't go together, or one doesn't with the model."""
    message = error["message"]
    param = error.get("param", message.split(" ", 1)[0])  # Anthropic's errors have a message alone
    if error.get("code") == "context_length_exceeded" or "(--max-model-len)" in message:
        return True
    token = _TOKEN_ID.search(message)
    if token is not None:
        token_id, size = map(int, token.groups())
        given = {int(number) for number in re.findall(r"\d+", str(body[param.partition("[")[0]]))}
        return token_id >= size and token_id in given
    if param == "min_tokens":
        names = ("max_completion_tokens", "max_output_tokens", "max_tokens")
        limit = next((body[name] for name in names if body.get(name)), 0)
        return body["min_tokens"] > limit
    if param == "n":
        return len(body["prompt"]) * body["n"] > 128
    if "the stop strings have" in message:
        return sum(map(len, body.get("stop") or body["stop_sequences"])) > 2048
    if param == "seed":  # whose bounds are rounded to a double's where it is drawn
        return not -(2**63) <= body["seed"] < 2**63
    if str(param).startswith(_GRAMMARS):
        return "can't be followed" in message or "exclude each" in message
    if str(param).startswith(("tools", "tool_choice")):
        told = (
            "twice",
            "none of the tools",
            "without tools",
            "can't be followed",
            "takes no tools",
        )
        return any(words in message for words in told)
    if "takes no tools" in message:  # which Anthropic's errors, without a param, begin otherwise
        return True
    if param == "messages" and message.startswith("messages end with tool_use"):
        return True
    if "is a call too many" in message or "tool_use; the limit is" in message:
        return (
            json.dumps(body).count('"function_call"') + json.dumps(body).count('"tool_use"') > 128
        )
    if "tool_call" in str(param):
        return "tool_call_id" in message or "are an assistant's" in message
    if param == "continue_final_message":
        return "last message" in message or "excludes" in message
    if param == "dimensions":  # the model's own number
        return "Matryoshka" in message
    name = str(param).partition("[")[0]
    if name in ("prompt", "input"):  # "" of a model whose texts begin with no token of their own
        return "" in (body[name] if isinstance(body[name], list) else [body[name]])
    return False
