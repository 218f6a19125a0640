"""What JSON Schema can't say of a body, for schemathesis to bear a refusal of."""

import re
from typing import Any

import schemathesis
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.openapi.checks import RejectedPositiveData

_TOKEN_ID = re.compile(r"has token id (\d+); the model has (\d+) tokens")


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
    if error["code"] == "context_length_exceeded":
        return True
    token = _TOKEN_ID.search(error["message"])
    if token is not None:
        token_id, size = map(int, token.groups())
        given = {int(number) for number in re.findall(r"\d+", str(body[error["param"]]))}
        return token_id >= size and token_id in given
    if error["param"] == "min_tokens":
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        return body["min_tokens"] > limit
    if error["param"] == "n":
        return len(body["prompt"]) * body["n"] > 128
    if error["param"] == "stop":
        return sum(map(len, body["stop"])) > 2048
    if error["param"] == "seed":  # whose bounds are rounded to a double's where it is drawn
        return not -(2**63) <= body["seed"] < 2**63
    if str(error["param"]).startswith(("response_format", "structured_outputs")):
        return "can't be followed" in error["message"] or "exclude each" in error["message"]
    if error["param"] == "prompt":  # "" of a model whose texts begin with no token of their own
        return "" in (body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]])
    return False
