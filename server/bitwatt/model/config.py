"""What a model is: sizes and switches, read from a Hugging Face config.json. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from bitwatt.errors import CheckpointError

__all__ = ["Llama3RopeScaling", "ModelConfig"]

Activation = Literal["relu2", "silu"]

_MAX_MODEL_LEN = 1 << 24  # the rotary table takes memory by it

T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """How Llama 3.1 stretches its rotary frequencies past the context it was first trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_model_len: int

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.high_freq_factor > self.low_freq_factor):
            raise CheckpointError(
                f"rope scaling has factor {self.factor}, low_freq_factor {self.low_freq_factor} "
                f"and high_freq_factor {self.high_freq_factor}; the first must be above 0, "
                "the last above the second"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a decoder-only transformer.

    architecture     the checkpoint's own name for it
    has_sub_norms    RMSNorm also before the output and down projections, as in BitNet b1.58
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
    rope_scaling: Llama3RopeScaling | None = None
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
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} heads can't share {self.num_kv_heads} key-value heads evenly"
            )
        if self.max_model_len > _MAX_MODEL_LEN:
            raise CheckpointError(
                f"max_model_len is {self.max_model_len}; at most {_MAX_MODEL_LEN} is supported"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}; rotary embedding wants it even")
        if not (self.rope_theta > 0 and self.rms_norm_eps > 0):
            raise CheckpointError(
                f"rope_theta is {self.rope_theta} and rms_norm_eps {self.rms_norm_eps}; "
                "both must be above 0"
            )

    @property
    def num_linear_parameters(self) -> int:
        """Weights of all layers' linears; embedding, head and norms are left out."""
        width = self.num_heads * self.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * width + 2 * kv_width)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @classmethod
    def from_huggingface(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Return the model of a config.json and, where there is one, its generation_config.json.

        Raises  CheckpointError naming every feature that is not supported, or the bad field
        """
        family = _family(config)
        num_heads = _get(config, "num_attention_heads", int)
        hidden_size = _get(config, "hidden_size", int)
        activation = _get(config, "hidden_act", str, family.activation)
        if activation not in ("relu2", "silu"):
            raise CheckpointError(f"hidden_act {activation!r} is not supported; relu2 and silu are")
        _refuse_unsupported(config)
        theta, scaling = _rope(config, family.rope_theta)
        generation = generation or {}
        eos = _token_ids(config, "eos_token_id") + _token_ids(generation, "eos_token_id")
        bos = _token_ids(config, "bos_token_id") or _token_ids(generation, "bos_token_id")
        if num_heads < 1:
            raise CheckpointError(f"num_attention_heads is {num_heads}; it must be at least 1")
        return cls(
            architecture=family.architecture,
            vocab_size=_get(config, "vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=_get(config, "intermediate_size", int),
            num_layers=_get(config, "num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=_get(config, "num_key_value_heads", int, num_heads),
            head_dim=_get(config, "head_dim", int, hidden_size // num_heads),
            max_model_len=_get(config, "max_position_embeddings", int),
            rope_theta=theta,
            rms_norm_eps=_get(config, "rms_norm_eps", float),
            activation="relu2" if activation == "relu2" else "silu",
            has_sub_norms=family.has_sub_norms,
            is_tied=_get(config, "tie_word_embeddings", bool, False),
            rope_scaling=scaling,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=tuple(dict.fromkeys(eos)),
        )


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's name implies; config.json leaves its defaults out."""

    architecture: str
    activation: Activation
    has_sub_norms: bool
    rope_theta: float = 10000.0


_FAMILIES = {
    family.architecture: family
    for family in (
        _Family("BitNetForCausalLM", "relu2", has_sub_norms=True, rope_theta=500000.0),
        _Family("BitnetForCausalLM", "silu", has_sub_norms=True),  # of 1bitLLM/bitnet_b1_58-*
        _Family("LlamaForCausalLM", "silu", has_sub_norms=False),
    )
}

# Features of these families' configurations that change the result and are not supported, with
# the values that switch each off.
_OFF: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "sliding_window": (),
    "input_bits": (8,),
    "weight_bits": (1,),
}


def _family(config: Mapping[str, Any]) -> _Family:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"architectures is {names!r}; expected a list of one name")
    if names[0] not in _FAMILIES:
        raise CheckpointError(
            f"architecture {names[0]!r} is not supported; {', '.join(_FAMILIES)} are"
        )
    return _FAMILIES[names[0]]


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    found = [
        f"{name}={config[name]!r}"
        for name, off in _OFF.items()
        if config.get(name) is not None and config[name] not in off
    ]
    if found:
        raise CheckpointError(f"not supported: {', '.join(found)}")


def _rope(config: Mapping[str, Any], default: float) -> tuple[float, Llama3RopeScaling | None]:
    """Return theta and the scaling, from rope_parameters or the older rope_scaling."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"rope_scaling is {scaling!r}; expected an object")
    theta = _get(scaling, "rope_theta", float, _get(config, "rope_theta", float, default))
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise CheckpointError(
            f"not supported: partial_rotary_factor={scaling['partial_rotary_factor']!r}"
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    match kind:
        case "default":
            return theta, None
        case "llama3":
            return theta, Llama3RopeScaling(
                factor=_get(scaling, "factor", float),
                low_freq_factor=_get(scaling, "low_freq_factor", float),
                high_freq_factor=_get(scaling, "high_freq_factor", float),
                original_max_model_len=_get(scaling, "original_max_position_embeddings", int),
            )
        case _:
            raise CheckpointError(f"rope type {kind!r} is not supported; default and llama3 are")


def _get(config: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    """Return the field, or the default where it is missing or null."""
    value = config.get(name)
    if value is None:
        if default is None:
            raise CheckpointError(f"{name} is missing")
        return default
    if kind is float and type(value) is int:
        return kind(value)
    if type(value) is not kind:
        raise CheckpointError(f"{name} is {value!r}; expected {kind.__name__}")
    return value


def _token_ids(config: Mapping[str, Any], name: str) -> list[int]:
    value = config.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(f"{name} is {value!r}; expected token ids")
    return ids
