"""/v1/embeddings."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, ConfigDict, Field

from bitwatt.api.schemas.common import Body, CacheSalt, ModelName, Priority, whole
from bitwatt.api.schemas.parameters import EMBEDDINGS
from bitwatt.api.schemas.prompts import PromptList
from bitwatt.serving.usage import EmbeddingUsage

__all__ = ["Embedding", "EmbeddingBody", "EmbeddingList"]

MAX_INPUTS = 2048


class EmbeddingBody(Body):
    """Texts to embed."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "builtin", "input": "def main():"}}
    )
    parameters: ClassVar = EMBEDDINGS

    model: ModelName
    input: Annotated[list[Any], PromptList("input", max_prompts=MAX_INPUTS, takes_null=False)] = (
        Field(
            description=f"A text or a list of token ids, or a list of up to {MAX_INPUTS} of either."
        )
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None,
        description="`float`, a list of numbers, unless given; `base64` has them as float32, "
        "little-endian.",
    )
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1), BeforeValidator(whole)] | None = Field(
        None,
        description="Numbers of an embedding: the model's hidden size, or a 400, as from vLLM for "
        "a model that wasn't trained to be cut.",
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Adds what the tokenizer puts around a text, unless false. As in vLLM.",
    )
    priority: Priority = None
    cache_salt: CacheSalt = None


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One input's vector, of length 1: numbers, or base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """The vectors, in the order of the inputs."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
