"""Prompts as completions and embeddings take them: texts or token ids, one or many."""

from typing import Any

from pydantic_core import core_schema

from bitwatt.api.schemas.common import whole
from bitwatt.api.schemas.parameters import refuse

__all__ = ["PromptItem", "PromptList"]

_MAX_TOKEN_ID = 2**31 - 1
_IDS = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": _MAX_TOKEN_ID},
    "minItems": 1,
}

PromptItem = str | list[int] | None
"""None begins a new text."""


class PromptList:
    """Makes one list of prompts of whatever was given: a text, ids, or a list of either."""

    def __init__(self, name: str, *, max_prompts: int, takes_null: bool) -> None:
        """Take the field's name, and whether null begins a new text."""
        self._name = name
        self._max_prompts = max_prompts
        self._takes_null = takes_null

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return the schema of what is accepted."""
        return core_schema.no_info_before_validator_function(self._settle, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """Return the schema that the document tells."""
        count = {"minItems": 1, "maxItems": self._max_prompts}
        forms: list[dict[str, Any]] = [
            {"type": "string"},
            *([{"type": "null"}] if self._takes_null else []),
            _IDS,
            {"type": "array", "items": {"type": "string"}, **count},
            {"type": "array", "items": _IDS, **count},
        ]
        return {"anyOf": forms}

    def _settle(self, value: Any) -> list[PromptItem]:
        name = self._name
        if value is None and self._takes_null:
            return [None]
        value = whole(value)
        prompts = value if isinstance(value, list) and value and not _is_ids(value) else [value]
        if len(prompts) > self._max_prompts:
            raise refuse(f"{name} has {len(prompts)} prompts; the limit is {self._max_prompts}")
        prompts = [whole(prompt) for prompt in prompts]
        for prompt in prompts:
            if isinstance(prompt, str):
                continue
            if not isinstance(prompt, list) or not _is_ids(prompt):
                raise refuse(
                    f"{name} must be a string, a list of strings, a list of token ids, "
                    "or a list of lists of token ids"
                )
            worst = next((i for i in prompt if not 0 <= i <= _MAX_TOKEN_ID), None)
            if worst is not None:
                raise refuse(f"{name} has a token id below 0 or above {_MAX_TOKEN_ID}")
        return prompts


def _is_ids(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)
