"""What an answer must be, as a body has it: OpenAI's response_format, vLLM's structured_outputs."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import WithJsonSchema

from bitwatt.constraints.structured_outputs import (
    MAX_CHOICES,
    MAX_GRAMMAR_CHARS,
    MAX_REGEX_CHARS,
    StructuredOutputsParams,
)
from bitwatt.errors import InvalidRequestError, shorten

__all__ = [
    "ResponseFormat",
    "StructuredOutputs",
    "check_schema",
    "structured_outputs_of",
    "unknown_in",
]

_FORMAT_FIELDS = {"type", "json_schema", "structures", "triggers"}
_SCHEMA_FIELDS = {"name", "description", "schema", "strict"}
_OUTPUTS_FIELDS = {field.name for field in fields(StructuredOutputsParams)} - {"param"}

_OBJECT: dict[str, Any] = {"type": "object"}
_NOT_ASKED: dict[str, list[Any]] = {  # by the ways to say what is asked
    "json": [None],
    "regex": [None],
    "choice": [None],
    "grammar": [None],
    "json_object": [None, False],
    "structural_tag": [None],
}
ResponseFormat = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"type": {"enum": ["text", "json_object"]}},
                    "required": ["type"],
                },
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "json_schema"},
                        "json_schema": {
                            "type": "object",
                            "properties": {
                                "name": {"type": "string"},
                                "schema": {"type": ["object", "null"]},
                                "strict": {"type": ["boolean", "null"]},
                            },
                            "required": ["name"],
                        },
                    },
                    "required": ["type", "json_schema"],
                },
            ]
        }
    ),
]
StructuredOutputs = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "json": {"type": ["object", "string", "boolean", "null"]},
                "regex": {"type": ["string", "null"], "maxLength": MAX_REGEX_CHARS},
                "choice": {
                    "type": ["array", "null"],
                    "items": {"type": "string", "minLength": 1},
                    "minItems": 1,
                    "maxItems": MAX_CHOICES,
                },
                "grammar": {"type": ["string", "null"], "maxLength": MAX_GRAMMAR_CHARS},
                "json_object": {"type": ["boolean", "null"]},
                "structural_tag": {"type": ["object", "string", "null"]},
                "disable_any_whitespace": {"type": ["boolean", "null"]},
                "disable_additional_properties": {"type": ["boolean", "null"]},
                "whitespace_pattern": {"type": ["string", "null"], "maxLength": MAX_REGEX_CHARS},
            },
            "oneOf": [
                {"required": [name], "properties": {name: {"not": {"enum": _NOT_ASKED[name]}}}}
                for name in _NOT_ASKED
            ],
        }
    ),
]


def structured_outputs_of(
    response_format: Mapping[str, Any] | None, structured_outputs: Mapping[str, Any] | None
) -> StructuredOutputsParams | None:
    """Return what the two fields of a body ask for, None for any text.

    Raises  InvalidRequestError
    """
    asked = None if response_format is None else _by_format(response_format)
    if structured_outputs is None:
        return asked
    if asked is not None:
        raise _refusal("response_format", "and structured_outputs exclude each other")
    given = {k: v for k, v in structured_outputs.items() if k in _OUTPUTS_FIELDS and v is not None}
    return StructuredOutputsParams(**given)


def unknown_in(
    response_format: Mapping[str, Any] | None, structured_outputs: Mapping[str, Any] | None
) -> list[str]:
    """Return the fields of the two that no API known here defines."""
    response_format = response_format or {}
    schema = response_format.get("json_schema")
    within = schema if isinstance(schema, Mapping) else {}
    return [
        *(f"response_format.{n}" for n in response_format if n not in _FORMAT_FIELDS),
        *(f"response_format.json_schema.{n}" for n in within if n not in _SCHEMA_FIELDS),
        *(f"structured_outputs.{n}" for n in structured_outputs or () if n not in _OUTPUTS_FIELDS),
    ]


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


def check_schema(param: str, schema: object) -> None:
    """Raise InvalidRequestError, which names the field, unless the schema is an object."""
    if not isinstance(schema, Mapping):
        raise _refusal(param, f"schema is {shorten(schema)}; it is an object")


def _refusal(param: str, told: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} {told}", param=param)
