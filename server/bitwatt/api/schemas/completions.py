"""/v1/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from bitwatt.api.schemas.common import GenerationBody, bounded, refuse
from bitwatt.errors import shorten
from bitwatt.serving.choice import FinishReasonName
from bitwatt.serving.sampling_params import DEFAULT_MAX_TOKENS, SamplingParams
from bitwatt.serving.usage import Usage

__all__ = [
    "Completion",
    "CompletionBody",
    "CompletionChoice",
    "CompletionLogprobs",
    "PromptItem",
]

MAX_PROMPTS = 64
MAX_ALL_CHOICES = 128
_MAX_TOKEN_ID = 2**31 - 1

PromptItem = str | list[int]


def _settle_prompt(value: Any) -> Any:
    """Return the prompts as a list, each a text or token ids."""
    prompts = value if isinstance(value, list) and value and not _is_ids(value) else [value]
    if len(prompts) > MAX_PROMPTS:
        raise refuse(f"prompt has {len(prompts)} prompts; the limit is {MAX_PROMPTS}")
    for prompt in prompts:
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not _is_ids(prompt):
            raise refuse(
                "prompt must be a string, a list of strings, a list of token ids, "
                "or a list of lists of token ids"
            )
        worst = next((i for i in prompt if not 0 <= i <= _MAX_TOKEN_ID), None)
        if worst is not None:
            raise refuse(f"prompt has a token id below 0 or above {_MAX_TOKEN_ID}")
    return prompts


def _is_ids(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)


Prompt = Annotated[
    list[Any],
    BeforeValidator(_settle_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class CompletionBody(GenerationBody):
    """A request to continue texts."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationBody.unsupported,
        "suffix": ("",),
        "add_special_tokens": (True,),
    }

    prompt: Prompt = Field(
        description="A text or a list of token ids, or a list of up to 64 of either; each has "
        "`n` choices, 128 in all at most."
    )
    max_tokens: Annotated[int, bounded("integer", "max_tokens")] | None = Field(
        None,
        description=f"Tokens of each choice at most; {DEFAULT_MAX_TOKENS} unless given, or fewer "
        "where the context has less room.",
    )
    echo: bool | None = Field(
        None, description="Begins each choice with its prompt. Refused together with `logprobs`."
    )
    logprobs: Annotated[int, bounded("integer", "logprobs")] | None = Field(
        None,
        description="Likeliest tokens to return at each position, beside the one drawn. OpenAI has "
        "5 at most.",
    )

    @model_validator(mode="after")
    def _choices_are_bounded(self) -> "CompletionBody":
        if self.echo and self.logprobs is not None:
            raise refuse("echo with logprobs is not supported", "echo")
        n = 1 if self.n is None else self.n
        if len(self.prompt) > 1 and len(self.prompt) * n > MAX_ALL_CHOICES:
            raise refuse(
                f"{len(self.prompt)} prompts with n={shorten(n)} choices each ask for more than "
                f"{MAX_ALL_CHOICES} choices",
                "n",
            )
        return self

    def sampling_params(self) -> SamplingParams:
        """Return what is asked; raises InvalidRequestError beyond a limit."""
        return self._sampling_params(max_tokens=self.max_tokens, logprobs=self.logprobs)


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """One entry a token; offsets count characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReasonName | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The response, or in a stream a chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
