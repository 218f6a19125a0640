"""What a model is, in sizes and switches, and what its weights are. No torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from bitwatt.errors import CheckpointError, ConfigurationError, shorten

__all__ = [
    "Activation",
    "Dtype",
    "HeadBits",
    "KVCacheDtype",
    "LinearRopeScaling",
    "Llama3RopeScaling",
    "ModelConfig",
    "RopeDivisors",
    "RopeScaling",
    "Weights",
    "WeightsName",
    "YarnRopeScaling",
    "weights_named",
]

Activation = Literal["relu2", "silu"]

Weights = Literal["ternary", "dense"]
"""What the layers' linears are: packed at two bits a weight, or matrices of 16 (or 32) bits."""

WeightsName = Literal[Weights, "fp16"]
"""What a user may call them: "fp16" is another name for "dense"."""

Dtype = Literal["bfloat16", "float16", "float32"]
"""Of activations and of dense weights."""

KVCacheDtype = Literal["auto", "bfloat16", "float16", "int8"]
"""Of keys and values in the KV cache; "auto" is that of activations."""

HeadBits = Literal[8, 16]
"""Of the output head's weights, and of a tied embedding's."""

_MAX_MODEL_LEN = 1 << 24  # positions are exact in float32 to here
_MAX_SIZE = 1 << 31
# Of a number that float32 holds with all its digits, and so its reciprocal.
_MIN_FLOAT, _MAX_FLOAT = 2.0**-126, 2.0**126


def weights_named(name: object) -> Weights:
    """Return the weights that a user means by a WeightsName.

    Raises  ConfigurationError
    """
    match name:
        case "ternary":
            return "ternary"
        case "dense" | "fp16":
            return "dense"
        case _:
            names = ", ".join(get_args(WeightsName))
            raise ConfigurationError(
                f"weights is {shorten(name)}; it is one of {names} (--weights)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """How Llama 3.1 stretches its rotary frequencies past the context it was first trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_model_len: int

    def __post_init__(self) -> None:
        if not (
            1 <= self.factor <= _MAX_FLOAT
            and 0 <= self.low_freq_factor < self.high_freq_factor <= _MAX_FLOAT
        ):
            raise CheckpointError(
                f"rope scaling has factor {self.factor}, low_freq_factor {self.low_freq_factor} "
                f"and high_freq_factor {self.high_freq_factor}; the first must be at least 1, "
                "the second at least 0, the last above the second"
            )
        if not 1 <= self.original_max_model_len <= _MAX_SIZE:
            raise CheckpointError(
                "rope scaling has original_max_position_embeddings "
                f"{shorten(self.original_max_model_len)}; it must be 1 to {_MAX_SIZE}"
            )


@dataclass(frozen=True, slots=True)
class RopeDivisors:
    """What each rotary frequency is divided by, the highest one's first: head_dim / 2 of them."""

    divisors: tuple[float, ...]

    def __post_init__(self) -> None:
        for divisor in self.divisors:
            if not _MIN_FLOAT <= divisor <= _MAX_FLOAT:
                raise CheckpointError(
                    f"a rotary frequency is divided by {divisor}; it must be above 0 and finite"
                )


@dataclass(frozen=True, slots=True)
class LinearRopeScaling:
    """Every rotary frequency is divided by the factor."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRopeScaling:
    """How YaRN stretches rotary frequencies, arXiv:2309.00071.

    attention_factor      multiplies cos and sin
    beta_fast, beta_slow  turns within the first context: frequencies of more than the first are
                          kept, those of less than the second divided by the factor
    truncates             to whole frequencies, where the blend between begins and ends
    """

    factor: float
    original_max_model_len: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not 1 <= self.original_max_model_len <= _MAX_SIZE:
            raise CheckpointError(
                "rope scaling has original_max_position_embeddings "
                f"{shorten(self.original_max_model_len)}; it must be 1 to {_MAX_SIZE}"
            )
        if not (
            _MIN_FLOAT <= self.attention_factor <= _MAX_FLOAT
            and _MIN_FLOAT <= self.beta_slow <= self.beta_fast <= _MAX_FLOAT
        ):
            raise CheckpointError(
                f"rope scaling has attention_factor {self.attention_factor}, beta_slow "
                f"{self.beta_slow} and beta_fast {self.beta_fast}; they must be above 0 and "
                "finite, the last at least the second"
            )


def _check_factor(factor: float) -> None:
    if not 1 <= factor <= _MAX_FLOAT:
        raise CheckpointError(f"rope scaling has factor {factor}; it must be at least 1")


RopeScaling = Llama3RopeScaling | LinearRopeScaling | YarnRopeScaling | RopeDivisors
"""How rotary frequencies are changed for a longer context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a decoder-only transformer.

    architecture     the checkpoint's own name for it
    has_sub_norms    RMSNorm also before the output and down projections, as in BitNet b1.58
    has_head_norms   RMSNorm of each head's query and key before they are rotated, as in Qwen3
    linear_norm_eps  of an RMSNorm of each linear's own before it; None where there is none
    has_qkv_bias, has_o_bias, has_mlp_bias  which linears add a bias
    is_tied          the head is the embedding
    bos_token_id     None where the model has none
    eos_token_ids    any of them ends a sequence; generation_config.json's besides config.json's
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    rope_theta: float
    rms_norm_eps: float
    activation: Activation
    has_sub_norms: bool
    is_tied: bool
    has_head_norms: bool = False
    linear_norm_eps: float | None = None
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_model_len",
        ):
            size = getattr(self, name)
            is_context = name == "max_model_len"  # a token of a prompt, and one to draw
            lowest, limit = (2, _MAX_MODEL_LEN) if is_context else (1, _MAX_SIZE)
            if size < lowest:
                raise CheckpointError(f"{name} is {shorten(size)}; it must be at least {lowest}")
            if size > limit:
                raise CheckpointError(f"{name} is {shorten(size)}; at most {limit} is supported")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} heads can't share {self.num_kv_heads} key-value heads evenly"
            )
        if isinstance(self.rope_scaling, YarnRopeScaling) and self.rope_theta <= 1:
            raise CheckpointError(f"rope_theta is {self.rope_theta}; YaRN wants it above 1")
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}; rotary embedding wants it even")
        if not (
            1 <= self.rope_theta <= _MAX_FLOAT and _MIN_FLOAT <= self.rms_norm_eps <= _MAX_FLOAT
        ):
            raise CheckpointError(
                f"rope_theta is {self.rope_theta} and rms_norm_eps {self.rms_norm_eps}; "
                "both must be above 0 and finite in float32, the first at least 1"
            )
        own = self.linear_norm_eps
        if own is not None and not _MIN_FLOAT <= own <= _MAX_FLOAT:
            raise CheckpointError(
                f"rms_norm_eps of the linears is {own}; it must be above 0 and finite in float32"
            )
        for token_id in (*self.eos_token_ids, self.bos_token_id or 0):
            if not 0 <= token_id < self.vocab_size:
                raise CheckpointError(
                    f"{'eos' if token_id in self.eos_token_ids else 'bos'}_token_id is "
                    f"{shorten(token_id)}; the vocabulary has {self.vocab_size} tokens"
                )

    @property
    def num_linear_parameters(self) -> int:
        """Weights of all layers' linears; embedding, head and norms are left out."""
        width = self.num_heads * self.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * width + 2 * kv_width)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)
