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
from bitwatt.serving.response_format import outputs_of

__all__ = [
    "ResponseFormat",
    "StructuredOutputs",
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
    outputs = None
    if structured_outputs is not None:
        known = {name: structured_outputs.get(name) for name in _OUTPUTS_FIELDS}
        outputs = StructuredOutputsParams(**{n: v for n, v in known.items() if v is not None})
    return outputs_of(response_format, outputs)


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
