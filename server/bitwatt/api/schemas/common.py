"""What the bodies of several routes share."""

from dataclasses import fields
from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    JsonValue,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import core_schema

from bitwatt.api.schemas.parameters import STREAM_OPTIONS, Parameters, refuse
from bitwatt.api.schemas.structured import (
    ResponseFormat,
    StructuredOutputs,
    structured_outputs_of,
    unknown_in,
)
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
from bitwatt.text.tokenizer_files import SAMPLING_NAMES

__all__ = [
    "Body",
    "Bounded",
    "CacheSalt",
    "GenerationBody",
    "ModelName",
    "Priority",
    "PromptLogprob",
    "SamplingBody",
    "StopStrings",
    "StreamOptions",
    "TokenIds",
    "excludes",
    "needs",
    "whole",
    "zero_needs",
]

ModelName = Annotated[
    str, Field(max_length=256, description="The model's name, one of `GET /v1/models`.")
]


class Body(BaseModel):
    """A request body. A field it lacks is judged by its parameters, or kept to be named.

    parameters  every parameter that an API known here gives such a body
    nested      fields that hold other bodies, one or a list
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    parameters: ClassVar[Parameters]
    nested: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _judge(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise refuse("the body must be a JSON object")
        for name, value in data.items():
            parameter = cls.parameters.get(name)
            if parameter is not None and not parameter.works:
                parameter.check(name, value, data)
        return data

    @property
    def unknown_fields(self) -> list[str]:
        """The fields that no API known here defines, each once, as `messages[].colour`."""
        names = dict.fromkeys(n for n in self.model_extra or () if n not in self.parameters)
        for field in self.nested:
            value = getattr(self, field)
            is_list = isinstance(value, list)
            for body in value if is_list else [value] if value is not None else []:
                owner = f"{field}[]" if is_list else field
                names |= dict.fromkeys(f"{owner}.{name}" for name in body.unknown_fields)
        return list(names)


def _settle_logit_bias(value: Any) -> Any:
    """Return the biases by token id: JSON's keys are strings."""
    if not isinstance(value, dict):
        raise refuse("logit_bias must map token ids to numbers")
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10):
            raise refuse(f"logit_bias has the key {shorten(key)}, which is no token id")
    return {int(key): bias for key, bias in value.items()}


def whole(value: Any) -> Any:
    """Return a whole number as an int, as 16 for 16.0, and a list of such; else the value itself.

    JSON knows one kind of number: clients whose language does too send 16.0.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and float in set(map(type, value)):
        return [whole(item) if isinstance(item, float) else item for item in value]
    return value


class Bounded:
    """A number among SamplingParams, whose bounds are checked there."""

    def __init__(self, name: str, *, lowest: float | None = None) -> None:
        """Take the field's name there, and the lowest value that is told where it is another."""
        bounds = BOUNDS[name]
        self._bounds = bounds if lowest is None else bounds._replace(lowest=lowest)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """Return the schema of what is accepted."""
        schema = handler(source)
        if not self._bounds.is_whole:
            return schema
        return core_schema.no_info_before_validator_function(whole, schema)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """Return the schema that the document tells."""
        lowest, highest, is_whole = self._bounds
        kind = "integer" if is_whole else "number"
        return {"type": kind, "minimum": lowest, "maximum": highest}


TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]],
    Field(max_length=2**20, fail_fast=True),
    BeforeValidator(whole),
]


def needs(field: str, neighbour: str) -> dict[str, Any]:
    """Return the JSON schema that says: the field means something beside a true neighbour."""
    return {
        "if": {"required": [field], "properties": {field: {"not": {"enum": [None, 0]}}}},
        "then": {"required": [neighbour], "properties": {neighbour: {"const": True}}},
    }


def _asks(field: str) -> dict[str, Any]:
    return {"required": [field], "properties": {field: {"not": {"enum": [None, False]}}}}


def excludes(field: str, neighbour: str) -> dict[str, Any]:
    """Return the JSON schema that says: where the field asks for something, the other doesn't."""
    return {"if": _asks(field), "then": {"properties": {neighbour: {"type": "null"}}}}


def zero_needs(field: str, *neighbours: str) -> dict[str, Any]:
    """Return the JSON schema that says: the field is 0 where a neighbour asks for something."""
    return {
        "if": {"required": [field], "properties": {field: {"const": 0}}},
        "then": {"anyOf": [_asks(neighbour) for neighbour in neighbours]},
    }


_STOP: dict[str, JsonValue] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
StopStrings = Annotated[
    Any,  # SamplingParams checks it
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]}),
]
LogitBias = Annotated[
    dict[int, Any],
    BeforeValidator(_settle_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIASES,
        }
    ),
]


Priority = Annotated[
    Annotated[int, Bounded("priority")] | None,
    Field(
        description="Lower runs sooner. As vLLM's; other than 0 where `--allow-priority` is set."
    ),
]
CacheSalt = Annotated[
    Annotated[str, Field(max_length=MAX_CACHE_SALT_CHARS)] | None,
    Field(description="Shares the prefix cache among requests of the same salt alone. As in vLLM."),
]


class StreamOptions(Body):
    """How a stream is sent."""

    parameters: ClassVar = STREAM_OPTIONS

    include_usage: bool | None = Field(
        None, description="Ends the stream with a chunk that has usage and no choices."
    )
    continuous_usage_stats: bool | None = Field(
        None,
        description="Gives each chunk the usage of its choice so far; of `include_usage`. As in "
        "vLLM.",
    )
    include_obfuscation: bool | None = Field(
        None,
        description="Pads each chunk, in a field `obfuscation`, so that its size says little of "
        "its text. OpenAI does so unless told not to.",
    )


class SamplingBody(Body):
    """How tokens are drawn: what every route that generates takes."""

    model: ModelName
    min_tokens: Annotated[int, Bounded("min_tokens")] | None = Field(
        None,
        description="Tokens before which no stop token is drawn, unless a grammar allows nothing "
        "else; at most `max_tokens`. As in vLLM.",
    )
    temperature: Annotated[float, Bounded("temperature")] | None = Field(
        None,
        description="Divides the logits; 0, or less than 1e-5, always takes the likeliest token.",
    )
    top_p: Annotated[float, Bounded("top_p")] | None = Field(
        None,
        description="Keeps the likeliest tokens that together have this probability; 0 keeps the "
        "likeliest alone.",
    )
    top_k: Annotated[int, Bounded("top_k")] | None = Field(
        None, description="Keeps so many of the likeliest tokens; 0 and -1 keep all. As in vLLM."
    )
    min_p: Annotated[float, Bounded("min_p")] | None = Field(
        None,
        description="Keeps tokens at least so likely, as a share of the likeliest one's "
        "probability. As in vLLM and llama.cpp, but 0 unless asked for.",
    )
    presence_penalty: Annotated[float, Bounded("presence_penalty")] | None = Field(
        None, description="Taken off the logit of every token that the choice has already."
    )
    frequency_penalty: Annotated[float, Bounded("frequency_penalty")] | None = Field(
        None, description="Taken off the logit for each time that the choice has the token already."
    )
    repetition_penalty: Annotated[float, Bounded("repetition_penalty")] | None = Field(
        None,
        description="Divides positive and multiplies negative logits of tokens that the prompt "
        "or the choice has. As in vLLM; llama.cpp's `repeat_penalty`.",
    )
    logit_bias: LogitBias | None = Field(
        None, description="Added to logits, by token id: -100 to 100, 300 entries at most."
    )
    seed: Annotated[int, Bounded("seed")] | None = Field(
        None,
        description="The same seed gives the same tokens, whatever else runs; choice `i` of a "
        "prompt draws by `seed + i`. A new one each time unless given. OpenAI's promise is only "
        "best effort; here it holds on the ternary engine and with `--batch-invariant`.",
    )
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = Field(
        None,
        description="Up to 64 tokens that end a choice and are no part of its text. As in vLLM.",
    )
    ignore_eos: bool | None = Field(
        None, description="Goes on past the model's own end-of-sequence tokens. As in vLLM."
    )
    priority: Priority = None
    cache_salt: CacheSalt = None
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="What the answer must be, in vLLM's way: one of `json`, `regex`, `choice`, "
        "`grammar`, `json_object` and `structural_tag`.",
    )
    stream: bool | None = Field(
        None, description="Sends the answer in pieces, as server-sent events that end in `[DONE]`."
    )

    @property
    def silent(self) -> frozenset[str]:
        """The fields that say nothing, of those for which a model may have its own defaults."""
        return frozenset(name for name in SAMPLING_NAMES if getattr(self, name) is None)

    def sampling(self) -> dict[str, Any]:
        """Return these fields as another route's body takes them."""
        given = {name: getattr(self, name) for name in SamplingBody.model_fields}
        if self.logit_bias is not None:
            given["logit_bias"] = {str(token_id): b for token_id, b in self.logit_bias.items()}
        return given

    @property
    def unknown_fields(self) -> list[str]:
        """Those within structured_outputs besides."""
        return [*super().unknown_fields, *unknown_in(None, self.structured_outputs)]


class GenerationBody(SamplingBody):
    """What both completions take."""

    nested: ClassVar[tuple[str, ...]] = ("stream_options",)

    max_tokens: Annotated[int, Bounded("max_tokens")] | None = None
    prompt_logprobs: Annotated[int, Bounded("prompt_logprobs")] | None = Field(
        None,
        description="Likeliest tokens to return at each token of the prompt, beside its own, as "
        "`prompt_logprobs` of the answer. Not in a stream. As in vLLM, which has -1 for all.",
    )
    n: Annotated[int, Bounded("n")] | None = Field(None, description="Choices to each prompt.")
    stop: StopStrings | None = Field(
        None,
        description="One string, or up to 64, of 512 characters at most and 2048 in all, that end "
        "a choice and are no part of it. OpenAI has 4.",
    )
    response_format: ResponseFormat | None = Field(
        None,
        description="What the answer must be: `text`, the default; `json_object`, any JSON object; "
        "`json_schema`, JSON by `json_schema.schema`, strict or not; vLLM's `structural_tag`.",
    )
    stream_options: StreamOptions | None = Field(
        None, description="How a stream is sent; needs `stream`."
    )

    @property
    def unknown_fields(self) -> list[str]:
        """Those within response_format besides."""
        return [*super().unknown_fields, *unknown_in(self.response_format, None)]

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options needs stream: true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise refuse("prompt_logprobs are not sent in a stream", "prompt_logprobs")
        return self

    def _sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """Return what is asked, null being the default; each route says these in its own way."""
        given = {name: value for name in _SHARED if (value := getattr(self, name)) is not None}
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=structured_outputs_of(self.response_format, self.structured_outputs),
            **given,
        )


_OWN = ("max_tokens", "logprobs", "prompt_logprobs", "structured_outputs")
_SHARED = tuple(
    field.name for field in fields(SamplingParams) if field.init and field.name not in _OWN
)


class PromptLogprob(msgspec.Struct, frozen=True, gc=False):
    """A token that a prompt has, or was likely to have there; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str
