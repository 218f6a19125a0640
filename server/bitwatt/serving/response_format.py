"""What an answer must be, as OpenAI's response_format says it."""

from collections.abc import Mapping
from typing import Any

from bitwatt.constraints.structured_outputs import StructuredOutputsParams
from bitwatt.errors import InvalidRequestError, shorten

__all__ = ["check_schema", "outputs_of"]


def outputs_of(
    response_format: Mapping[str, Any] | None, outputs: StructuredOutputsParams | None
) -> StructuredOutputsParams | None:
    """Return what response_format asks for, or else outputs, None for any text.

    Raises  InvalidRequestError, also where both ask for something
    """
    asked = None if response_format is None else _by_format(response_format)
    if asked is not None and outputs is not None:
        raise _refusal("response_format", "and structured_outputs exclude each other")
    return outputs if asked is None else asked


def check_schema(param: str, schema: object) -> None:
    """Raise InvalidRequestError, which names the field, unless the schema is an object."""
    if not isinstance(schema, Mapping):
        raise _refusal(param, f"schema is {shorten(schema)}; it is an object")


def _by_format(given: Mapping[str, Any]) -> StructuredOutputsParams | None:
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True, param="response_format")
    if kind == "structural_tag":
        tag = {name: given.get(name) for name in ("structures", "triggers")}
        return StructuredOutputsParams(structural_tag=tag, param="response_format")
    if kind != "json_schema":
        told = f"type is {shorten(kind)}; it is one of text, json_object, json_schema"
        raise _refusal("response_format", f"{told}, structural_tag")
    asked = given.get("json_schema")
    if not isinstance(asked, Mapping) or not isinstance(asked.get("name"), str):
        raise _refusal("response_format", "json_schema is an object with a name and a schema")
    if not isinstance(asked.get("strict"), bool | None):
        raise _refusal("response_format", f"strict is {shorten(asked['strict'])}; it is a boolean")
    schema = asked.get("schema")
    if schema is not None:
        check_schema("response_format", schema)
    return StructuredOutputsParams(
        json={"type": "object"} if schema is None else schema, param="response_format"
    )


def _refusal(param: str, told: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} {told}", param=param)
