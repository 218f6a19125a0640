"""What a caller asks of a generation: the one type behind every route and behind LLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Literal, NamedTuple

from bitwatt.constraints.structured_outputs import StructuredOutputsParams
from bitwatt.errors import CheckpointError, InvalidRequestError, shorten

__all__ = [
    "BOUNDS",
    "DEFAULT_MAX_TOKENS",
    "MAX_CACHE_SALT_CHARS",
    "MAX_CHOICES",
    "MAX_LOGIT_BIASES",
    "MAX_LOGPROBS",
    "MAX_PROMPT_LOGPROBS_IN_ALL",
    "MAX_STOPS",
    "MAX_STOP_CHARS",
    "MAX_STOP_CHARS_IN_ALL",
    "MAX_STOP_TOKEN_IDS",
    "Bounds",
    "GenerationConfig",
    "SamplingDefaults",
    "SamplingParams",
    "check_max_tokens",
    "checked_defaults",
]

GenerationConfig = Literal["auto", "none"]
"""Whether what a model's files recommend stands where a request is silent."""

SamplingDefaults = Mapping[str, float]
"""Values of some fields of SamplingParams."""

DEFAULT_MAX_TOKENS = 16  # OpenAI's completions, and vLLM
MAX_CHOICES = 128  # OpenAI's
MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS_IN_ALL = 1 << 19  # 64 prompts of 4096 tokens with 1 each; 40 MB of JSON
MAX_STOPS = 64  # OpenAI has 4; evaluations send up to 18
MAX_STOP_CHARS = 512
MAX_STOP_CHARS_IN_ALL = 2048  # each token is looked through for all of them
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 300
MAX_CACHE_SALT_CHARS = 256
_MAX_LOGIT_BIAS = 100
_INT32 = 2**31 - 1
_INT64 = 2**63 - 1


class Bounds(NamedTuple):
    """The values a number may have."""

    lowest: float
    highest: float
    is_whole: bool = False

    def __str__(self) -> str:
        return f"from {self.lowest} to {self.highest}"

    def check(self, name: str, value: object) -> None:
        """Raise InvalidRequestError unless the value is such a number."""
        kind = "a whole number" if self.is_whole else "a number"
        expected = int if self.is_whole else int | float
        if isinstance(value, bool) or not isinstance(value, expected):
            raise InvalidRequestError(
                f"{name} is {shorten(value)}; it must be {kind} {self}", param=name
            )
        if not self.lowest <= value <= self.highest:
            raise InvalidRequestError(f"{name} is {shorten(value)}; it must be {self}", param=name)


BOUNDS: Mapping[str, Bounds] = {
    "n": Bounds(1, MAX_CHOICES, is_whole=True),
    "max_tokens": Bounds(0, _INT32, is_whole=True),
    "min_tokens": Bounds(0, _INT32, is_whole=True),
    "temperature": Bounds(0, 2),
    "top_p": Bounds(0, 1),
    "top_k": Bounds(-1, _INT32, is_whole=True),
    "min_p": Bounds(0, 1),
    "presence_penalty": Bounds(-2, 2),
    "frequency_penalty": Bounds(-2, 2),
    "repetition_penalty": Bounds(0.01, 10),
    "seed": Bounds(-_INT64 - 1, _INT64, is_whole=True),
    "logprobs": Bounds(0, MAX_LOGPROBS, is_whole=True),
    "prompt_logprobs": Bounds(0, MAX_LOGPROBS, is_whole=True),
    "priority": Bounds(-_INT32, _INT32, is_whole=True),
}
"""Limits of every number among SamplingParams, whoever sets it."""

_OPTIONAL = frozenset({"max_tokens", "seed", "logprobs", "prompt_logprobs"})


def check_max_tokens(name: str, max_tokens: int | None, prompt_logprobs: int | None) -> None:
    """Raise InvalidRequestError where nothing is to be generated, and no prompt to be scored.

    name  the field that max_tokens was given by
    """
    if max_tokens == 0 and prompt_logprobs is None:
        raise InvalidRequestError(
            f"{name} is 0; it must be from 1 to {_INT32}, or 0 with prompt_logprobs", param=name
        )


def checked_defaults(
    told: SamplingDefaults, path: Path, generation_config: GenerationConfig
) -> SamplingDefaults:
    """Return what stands where a request is silent: what the model at path recommends, or nothing.

    Raises  CheckpointError for a value that no request could ask for
    """
    if generation_config == "none":
        return {}
    defaults = {
        name: int(value) if BOUNDS[name].is_whole and value == value // 1 else value
        for name, value in told.items()
    }
    for name, value in defaults.items():
        try:
            BOUNDS[name].check(name, value)
        except InvalidRequestError as error:
            raise CheckpointError(
                f"{path}: its default for requests can't be used: {error} "
                "(--generation-config none takes none)"
            ) from error
    return defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a caller asks of a generation, checked; planning turns it into what the engine draws by.

    n                    choices to each prompt, 1 to 128
    max_tokens           tokens of each at most; None leaves all that the context has room for, and
                         0, with prompt_logprobs, generates nothing
    min_tokens           tokens before which nothing ends a choice but max_tokens and stop
    temperature          0 to 2; 0, or less than 1e-5, is greedy
    top_p                keeps the likeliest tokens that together have this probability; 1 keeps
                         all, 0 the likeliest
    top_k                keeps so many of the likeliest tokens; 0 and -1 keep all
    min_p                keeps tokens at least so likely, as a share of the likeliest one's; 0 all
    presence_penalty     taken off the logits of tokens that were generated, -2 to 2
    frequency_penalty    taken off for each time that they were, -2 to 2
    repetition_penalty   divides or multiplies logits of tokens that were met, prompt included
    logit_bias           added to logits, by token id; -100 to 100, 300 entries at most
    logprobs             likeliest tokens to return at each position, 0 to 20; None returns none
    prompt_logprobs      the same at each token of the prompt but the first, which has nothing
                         before it; such a prompt is read whole, not from the prefix cache
    seed                 with the token's position, keys the generator: same seed, same tokens.
                         Choice i of a prompt draws by seed + i. None draws a new one.
    stop                 strings that end a choice and are no part of it: 64 of 512 characters, 2048
                         in all
    stop_token_ids       tokens that end a choice and are no part of its text, 64 at most
    ignore_eos           go on past the model's own end-of-sequence tokens
    priority             lower runs sooner
    cache_salt           shares the prefix cache among requests with the same salt alone
    structured_outputs   what the answer must be: JSON of a schema, a text of a regex or a grammar,
                         one of some texts. Stop tokens end it where it may end, and nowhere else;
                         max_tokens ends it anywhere

    Raises  InvalidRequestError, which names the field, its value and the limit
    """

    n: int = 1
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    priority: int = 0
    cache_salt: str = ""
    structured_outputs: StructuredOutputsParams | None = None
    stop_strings: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                bounds.check(name, value)
        check_max_tokens("max_tokens", self.max_tokens, self.prompt_logprobs)
        object.__setattr__(self, "stop_strings", _stop_strings(self.stop))
        _check_token_ids("stop_token_ids", self.stop_token_ids or (), MAX_STOP_TOKEN_IDS)
        _check_logit_bias(self.logit_bias or {})
        _check_type("ignore_eos", self.ignore_eos, bool, "True or False")
        _check_type("cache_salt", self.cache_salt, str, "a string")
        _check_type(
            "structured_outputs",
            self.structured_outputs,
            StructuredOutputsParams | None,
            "StructuredOutputsParams or None",
        )
        if len(self.cache_salt) > MAX_CACHE_SALT_CHARS:
            raise InvalidRequestError(
                f"cache_salt has {len(self.cache_salt)} characters; "
                f"the limit is {MAX_CACHE_SALT_CHARS}",
                param="cache_salt",
            )


def _check_type(name: str, value: object, kind: type | UnionType, words: str) -> None:
    if not isinstance(value, kind):
        raise InvalidRequestError(f"{name} is {shorten(value)}; it must be {words}", param=name)


def _stop_strings(stop: object) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(one, str) for one in stops):
        raise InvalidRequestError("stop must be a string or a list of strings", param="stop")
    if len(stops) > MAX_STOPS:
        raise InvalidRequestError(
            f"stop has {len(stops)} strings; the limit is {MAX_STOPS}", param="stop"
        )
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_CHARS:
        raise InvalidRequestError(
            f"a stop string has {longest} characters; the limit is {MAX_STOP_CHARS}", param="stop"
        )
    if (in_all := sum(map(len, stops))) > MAX_STOP_CHARS_IN_ALL:
        raise InvalidRequestError(
            f"the stop strings have {in_all} characters in all; "
            f"the limit is {MAX_STOP_CHARS_IN_ALL}",
            param="stop",
        )
    if "" in stops:
        raise InvalidRequestError("a stop string must not be empty", param="stop")
    return tuple(stops)


def _check_token_ids(name: str, token_ids: Sequence[object], limit: int) -> None:
    _check_type(name, token_ids, list | tuple, "a list of token ids")
    if len(token_ids) > limit:
        raise InvalidRequestError(
            f"{name} has {len(token_ids)} entries; the limit is {limit}", param=name
        )
    for index, token_id in enumerate(token_ids):
        Bounds(0, _INT32, is_whole=True).check(f"{name}[{index}]", token_id)


def _check_logit_bias(biases: Mapping[int, object]) -> None:
    _check_type("logit_bias", biases, Mapping, "a mapping from token ids to numbers")
    if len(biases) > MAX_LOGIT_BIASES:
        raise InvalidRequestError(
            f"logit_bias has {len(biases)} entries; the limit is {MAX_LOGIT_BIASES}",
            param="logit_bias",
        )
    for token_id, bias in biases.items():
        is_id = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not is_id or not 0 <= token_id <= _INT32:
            raise InvalidRequestError(
                f"logit_bias has the key {shorten(token_id)}, which is no token id",
                param="logit_bias",
            )
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not is_number or not abs(bias) <= _MAX_LOGIT_BIAS:  # type: ignore[arg-type]
            raise InvalidRequestError(
                f"logit_bias of token {token_id} is {shorten(bias)}; it must be a number "
                f"from -{_MAX_LOGIT_BIAS} to {_MAX_LOGIT_BIAS}",
                param="logit_bias",
            )
