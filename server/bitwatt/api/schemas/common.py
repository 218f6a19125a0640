"""What completions and chat completions share."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from bitwatt.errors import shorten
from bitwatt.serving.sampling_params import (
    BOUNDS,
    MAX_CACHE_SALT_CHARS,
    MAX_LOGIT_BIASES,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    SamplingParams,
)

__all__ = ["Body", "GenerationBody", "ModelName", "StreamOptions", "TokenIds", "bounded", "refuse"]

ModelName = Annotated[
    str, Field(max_length=256, description="The model's name, one of `GET /v1/models`.")
]


def refuse(message: str, param: str | None = None) -> PydanticCustomError:
    """Return the error to raise in a validator; param names the field where pydantic can't."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


class Body(BaseModel):
    """A request body: every field is known, or the request is refused.

    unsupported  options of other servers that this one lacks, each with the values at which it
                 changes nothing, and so may pass; null always may
    ignored      options that never change an answer
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise refuse("the body must be a JSON object")
        settled = {}
        for name, value in data.items():
            if name in cls.ignored:
                continue
            if name in cls.unsupported:
                if value is None or any(_same(value, v) for v in cls.unsupported[name]):
                    continue
                raise refuse(f"{name} is not supported: {shorten(value)}", name)
            if name not in cls.model_fields:  # at the first: a body may have a hundred thousand
                raise refuse(f"unknown field {shorten(name)}", name)
            settled[name] = value
        return settled


def _same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _settle_logit_bias(value: Any) -> Any:
    """Return the biases by token id: JSON's keys are strings."""
    if not isinstance(value, dict):
        raise refuse("logit_bias must map token ids to numbers")
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10):
            raise refuse(f"logit_bias has the key {shorten(key)}, which is no token id")
    return {int(key): bias for key, bias in value.items()}


def bounded(kind: str, name: str) -> WithJsonSchema:
    """Return the JSON schema of a number whose bounds SamplingParams checks."""
    bounds = BOUNDS[name]
    lowest = "exclusiveMinimum" if bounds.is_open else "minimum"
    return WithJsonSchema({"type": kind, lowest: bounds.lowest, "maximum": bounds.highest})


TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=2**20, fail_fast=True)
]
StopStrings = Annotated[
    Any,  # SamplingParams checks it
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "maxLength": MAX_STOP_CHARS},
                {
                    "type": "array",
                    "items": {"type": "string", "maxLength": MAX_STOP_CHARS},
                    "maxItems": MAX_STOPS,
                },
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[int, Any],
    BeforeValidator(_settle_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIASES,
        }
    ),
]


class StreamOptions(Body):
    """How a stream is sent."""

    unsupported: ClassVar = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool | None = Field(
        None, description="Ends the stream with a chunk that has usage and no choices."
    )


class GenerationBody(Body):
    """What decides how tokens are drawn and when they end."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_token_ids": (),
        "bad_words": ([],),
        "best_of": (1,),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_json": (),
        "guided_regex": (),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1.0,),
        "logits_processors": ([],),
        "prompt_logprobs": (),
        "response_format": ({"type": "text"},),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "structured_outputs": (),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
    }
    ignored: ClassVar = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})

    model: ModelName
    max_tokens: Annotated[int, bounded("integer", "max_tokens")] | None = None
    min_tokens: Annotated[int, bounded("integer", "min_tokens")] | None = Field(
        None,
        description="Tokens before which no stop token is drawn; at most `max_tokens`. As in vLLM.",
    )
    temperature: Annotated[float, bounded("number", "temperature")] | None = Field(
        None,
        description="Divides the logits; 0, or less than 1e-5, always takes the likeliest token.",
    )
    top_p: Annotated[float, bounded("number", "top_p")] | None = Field(
        None, description="Keeps the likeliest tokens that together have this probability."
    )
    top_k: Annotated[int, bounded("integer", "top_k")] | None = Field(
        None, description="Keeps so many of the likeliest tokens; 0 and -1 keep all. As in vLLM."
    )
    min_p: Annotated[float, bounded("number", "min_p")] | None = Field(
        None,
        description="Keeps tokens at least so likely, as a share of the likeliest one's "
        "probability. As in vLLM and llama.cpp, but 0 unless asked for.",
    )
    presence_penalty: Annotated[float, bounded("number", "presence_penalty")] | None = Field(
        None, description="Taken off the logit of every token that the choice has already."
    )
    frequency_penalty: Annotated[float, bounded("number", "frequency_penalty")] | None = Field(
        None, description="Taken off the logit for each time that the choice has the token already."
    )
    repetition_penalty: Annotated[float, bounded("number", "repetition_penalty")] | None = Field(
        None,
        description="Divides positive and multiplies negative logits of tokens that the prompt "
        "or the choice has. As in vLLM; llama.cpp's `repeat_penalty`.",
    )
    logit_bias: LogitBias | None = Field(
        None, description="Added to logits, by token id: -100 to 100, 300 entries at most."
    )
    seed: Annotated[int, bounded("integer", "seed")] | None = Field(
        None,
        description="The same seed gives the same tokens, whatever else runs; choice `i` of a "
        "prompt draws by `seed + i`. A new one each time unless given. OpenAI's promise is only "
        "best effort; here it holds on the ternary engine and with `--batch-invariant`.",
    )
    n: Annotated[int, bounded("integer", "n")] | None = Field(
        None, description="Choices to each prompt."
    )
    stop: StopStrings | None = Field(
        None,
        description="One string, or up to 4, of 512 characters at most, that end a choice and are "
        "no part of it.",
    )
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = Field(
        None,
        description="Up to 64 tokens that end a choice and are no part of its text. As in vLLM.",
    )
    ignore_eos: bool | None = Field(
        None, description="Goes on past the model's own end-of-sequence tokens. As in vLLM."
    )
    priority: Annotated[int, bounded("integer", "priority")] | None = Field(
        None,
        description="Lower runs sooner. As vLLM's; other than 0 where `--allow-priority` is set.",
    )
    cache_salt: str | None = Field(
        None,
        max_length=MAX_CACHE_SALT_CHARS,
        description="Shares the prefix cache among requests of the same salt alone. As in vLLM.",
    )
    stream: bool | None = Field(
        None, description="Sends the answer in pieces, as server-sent events that end in `[DONE]`."
    )
    stream_options: StreamOptions | None = Field(
        None, description="Needs `stream`. Its only field: `include_usage`, a last chunk of usage."
    )

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options needs stream: true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Return what is asked, null being the default.

        max_tokens, logprobs  named by each route in its own way
        """
        given = {name: value for name in _SHARED if (value := getattr(self, name)) is not None}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)


_SHARED = tuple(
    field.name
    for field in fields(SamplingParams)
    if field.init and field.name not in ("max_tokens", "logprobs")
)
