"""/tokenize and /detokenize."""

import msgspec
from pydantic import Field, model_validator

from bitwatt.api.schemas.chat import MAX_MESSAGES, Message
from bitwatt.api.schemas.common import Body, TokenIds, refuse

__all__ = ["DetokenizeBody", "Detokenized", "TokenizeBody", "Tokenized"]


class TokenizeBody(Body):
    """A text or a conversation to encode."""

    model: str = Field(max_length=256)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise refuse("either prompt or messages is needed, and not both", "prompt")
        return self


class DetokenizeBody(Body):
    """Tokens to decode."""

    model: str = Field(max_length=256)
    tokens: TokenIds


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
