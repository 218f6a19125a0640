"""What completions and chat completions share."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from bitwatt.errors import shorten
from bitwatt.scheduling.request import SamplingParams

__all__ = [
    "MAX_CHOICES",
    "MAX_LOGPROBS",
    "Body",
    "GenerationBody",
    "Shape",
    "StreamOptions",
    "TokenIds",
    "refuse",
]

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_STOP_CHARS = 512
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 300
_LOWEST_TEMPERATURE = 1e-5
_INT32 = 2**31 - 1
_INT64 = 2**63 - 1


def refuse(message: str, param: str | None = None) -> PydanticCustomError:
    """Return the error to raise in a validator; param names the field where pydantic can't."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


class Body(BaseModel):
    """A request body: every field is known, or the request is refused.

    asks_nothing  options of other servers that this one doesn't have, each with the values at
                  which it asks for nothing; null is always one
    ignored       options that can't change the answer
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    asks_nothing: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _settle_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise refuse("the body must be a JSON object")
        settled = {}
        for name, value in data.items():
            if name in cls.ignored:
                continue
            if name in cls.asks_nothing:
                if value is None or any(_same(value, v) for v in cls.asks_nothing[name]):
                    continue
                raise refuse(f"{name} is not supported: {shorten(value)}", name)
            settled[name] = value
        return settled


def _same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _settle_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise refuse("stop must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise refuse(f"stop has {len(stops)} strings; the limit is {MAX_STOPS}")
    if any(not stop for stop in stops):
        raise refuse("a stop string must not be empty")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_CHARS:
        raise refuse(f"a stop string has {longest} characters; the limit is {MAX_STOP_CHARS}")
    return tuple(stops)


def _settle_logit_bias(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refuse("logit_bias must map token ids to numbers")
    if len(value) > MAX_LOGIT_BIASES:
        raise refuse(f"logit_bias has {len(value)} entries; the limit is {MAX_LOGIT_BIASES}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10):
            raise refuse(f"logit_bias has the key {shorten(key)}, which is no token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise refuse(f"logit_bias of token {key} must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=_INT32)]], Field(max_length=2**20)]
StopStrings = Annotated[
    tuple[str, ...],
    BeforeValidator(_settle_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS},
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_settle_logit_bias),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]


class StreamOptions(Body):
    """How a stream is sent."""

    asks_nothing: ClassVar = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool | None = None


class GenerationBody(Body):
    """What decides how tokens are drawn and when they end."""

    asks_nothing: ClassVar[Mapping[str, tuple[Any, ...]]] = {
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

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(None, ge=1, le=_INT32)
    min_tokens: int | None = Field(None, ge=0, le=_INT32)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_INT32)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: LogitBias = {}
    seed: int | None = Field(None, ge=-_INT64 - 1, le=_INT64)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: StopStrings = ()
    stop_token_ids: TokenIds | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool | None = None
    priority: int | None = Field(None, ge=-_INT32, le=_INT32)
    cache_salt: str | None = Field(None, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options needs stream: true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(
        self, *, max_tokens: int, seed: int, logprobs: int | None, eos_token_ids: list[int]
    ) -> SamplingParams:
        """Return how the engine draws this request's tokens."""
        eos = () if self.ignore_eos else eos_token_ids
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_settle_temperature(self.temperature),
            top_k=max(self.top_k or 0, 0),
            top_p=_given(self.top_p, 1.0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            logit_bias=self.logit_bias,
            logprobs=logprobs,
            seed=seed,
            stop_token_ids=tuple(dict.fromkeys([*eos, *(self.stop_token_ids or ())])),
            min_tokens=self.min_tokens or 0,
        )


def _settle_temperature(temperature: float | None) -> float:
    """Return the temperature; one so low that it divides logits to infinity is greedy."""
    given = _given(temperature, 1.0)
    return given if given >= _LOWEST_TEMPERATURE else 0.0


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


class Shape(TypedDict):
    """What a response and every chunk of it begin with."""

    id: str
    created: int
    model: str
