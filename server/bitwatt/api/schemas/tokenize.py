"""/tokenize and /detokenize."""

from typing import Annotated

import msgspec
from pydantic import Field, model_validator

from bitwatt.api.schemas.chat import MAX_MESSAGES, Message
from bitwatt.api.schemas.common import Body, ModelName, TokenIds, refuse

__all__ = ["DetokenizeBody", "Detokenized", "TokenizeBody", "Tokenized"]


class TokenizeBody(Body):
    """A text or a conversation to encode."""

    model: ModelName
    prompt: str | None = Field(None, description="A text; either this or `messages`.")
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = Field(
        None,
        min_length=1,
        max_length=MAX_MESSAGES,
        description="A conversation, put as the model's chat template puts it.",
    )
    add_special_tokens: bool = Field(
        True, description="Adds what the tokenizer puts around a text; of `prompt` alone."
    )
    add_generation_prompt: bool = Field(
        True, description="Opens the model's turn; of `messages` alone."
    )
    return_token_strs: bool | None = Field(
        None, description="Returns each token's text too, as `token_strs`."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise refuse("either prompt or messages is needed, and not both", "prompt")
        return self


class DetokenizeBody(Body):
    """Tokens to decode."""

    model: ModelName
    tokens: TokenIds = Field(description="Token ids, special tokens among them.")


class Tokenized(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
):
    """The tokens, and how many the model takes."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    """The text."""

    prompt: str
