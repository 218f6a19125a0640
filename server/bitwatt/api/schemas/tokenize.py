"""/tokenize and /detokenize."""

from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import ConfigDict, Field, JsonValue, model_validator

from bitwatt.api.schemas.chat import MAX_MESSAGES, ChatTemplateKwargs, Message, check_continued
from bitwatt.api.schemas.common import Body, ModelName, TokenIds
from bitwatt.api.schemas.parameters import DETOKENIZE, TOKENIZE, refuse
from bitwatt.api.schemas.tools import Tools, unknown_in_tools
from bitwatt.serving.tools import template_tools, tool_use_of

__all__ = ["DetokenizeBody", "Detokenized", "TokenizeBody", "Tokenized"]


_MODEL = "The model's name, one of `GET /v1/models`; the first of them unless given. As in vLLM."


def _one_of(given: str, absent: str) -> dict[str, JsonValue]:
    return {
        "required": [given],
        "properties": {given: {"type": ["string", "array"]}, absent: {"type": "null"}},
    }


class TokenizeBody(Body):
    """A text or a conversation to encode."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [_one_of("prompt", "messages"), _one_of("messages", "prompt")],
            "example": {"model": "builtin", "prompt": "def main():"},
        }
    )
    parameters: ClassVar = TOKENIZE
    nested: ClassVar = ("messages",)

    model: ModelName | None = Field(None, description=_MODEL)
    prompt: str | None = Field(None, description="A text; either this or `messages`.")
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = Field(
        None,
        min_length=1,
        max_length=MAX_MESSAGES,
        description="A conversation, put as the model's chat template puts it.",
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Adds what the tokenizer puts around a text: unless false to `prompt`, and if "
        "true to `messages` too, beside what the template puts there.",
    )
    add_generation_prompt: bool | None = Field(
        None, description="Opens the model's turn, unless false; of `messages` alone."
    )
    chat_template_kwargs: ChatTemplateKwargs | None = Field(
        None, description="What the model's template may be told; of `messages` alone."
    )
    continue_final_message: bool | None = Field(
        None,
        description="Ends with the last message's content, for the model to go on with; of "
        "`messages` alone.",
    )
    tools: Tools | None = Field(
        None, description="Functions that the template tells of; of `messages` alone."
    )
    return_token_strs: bool | None = Field(
        None, description="Returns each token's text too, as `token_strs`."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise refuse("either prompt or messages is needed, and not both", "prompt")
        if self.continue_final_message and self.messages:
            check_continued(self.messages, self.add_generation_prompt)
        return self

    @property
    def unknown_fields(self) -> list[str]:
        """Those within tools besides."""
        return [*super().unknown_fields, *unknown_in_tools(self.tools)]

    def template_tools(self) -> list[dict[str, Any]] | None:
        """Return the tools as templates know them; raises InvalidRequestError."""
        return template_tools(self.tools, tool_use_of(self.tools, None, None))


class DetokenizeBody(Body):
    """Tokens to decode."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "builtin", "tokens": [1, 2, 3]}}
    )
    parameters: ClassVar = DETOKENIZE

    model: ModelName | None = Field(None, description=_MODEL)
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
