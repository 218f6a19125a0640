"""/v1/completions."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import ConfigDict, Field, model_validator

from bitwatt.api.schemas.common import (
    Bounded,
    GenerationBody,
    PromptLogprob,
    excludes,
    needs,
    zero_needs,
)
from bitwatt.api.schemas.parameters import COMPLETIONS, refuse
from bitwatt.api.schemas.prompts import PromptItem, PromptList
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

Prompt = Annotated[list[Any], PromptList("prompt", max_prompts=MAX_PROMPTS, takes_null=True)]


class CompletionBody(GenerationBody):
    """A request to continue texts."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                needs("stream_options", "stream"),
                excludes("stream", "prompt_logprobs"),
                zero_needs("max_tokens", "echo", "prompt_logprobs"),
            ],
            "example": {
                "model": "builtin",
                "prompt": "def main():",
                "max_tokens": 24,
                "temperature": 0,
            },
        }
    )
    parameters: ClassVar = COMPLETIONS

    prompt: Prompt = Field(
        description="A text or a list of token ids, or a list of up to 64 of either; each has "
        "`n` choices, 128 in all at most. null begins a new text."
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Adds what the tokenizer puts around a text, unless false. As in vLLM.",
    )
    max_tokens: Annotated[int, Bounded("max_tokens")] | None = Field(
        None,
        description=f"Tokens of each choice at most; {DEFAULT_MAX_TOKENS} unless given, or fewer "
        "where the context has less room; 0 with `echo` or `prompt_logprobs` alone.",
    )
    echo: bool | None = Field(
        None,
        description="Begins each choice with its prompt, and `logprobs` with those of the "
        "prompt's tokens.",
    )
    logprobs: Annotated[int, Bounded("logprobs")] | None = Field(
        None,
        description="Likeliest tokens to return at each position, beside the one drawn. OpenAI has "
        "5 at most.",
    )

    @model_validator(mode="after")
    def _choices_are_bounded(self) -> "CompletionBody":
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
        wanted = [self.prompt_logprobs]
        if self.echo:
            wanted += [self.logprobs, 0 if self.max_tokens == 0 else None]
        return self._sampling_params(
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=max((k for k in wanted if k is not None), default=None),
        )


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """One entry a token; offsets count characters of the choice's text.

    A prompt's first token has nothing before it: its entries are null.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReasonName | None = None
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The response, or in a stream a chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    obfuscation: str | UnsetType = UNSET
