"""The model families that are served, one entry each: what an architecture's name implies.

A family whose layers compute what kernels/bitwatt_kernels/layer.py already does is an entry of
FAMILIES and nothing else. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, get_args

from bitwatt.errors import CheckpointError, shorten
from bitwatt.model.config import Activation, Llama3RopeScaling, ModelConfig

__all__ = ["FAMILIES", "Family", "family_of", "notices_of", "with_generation_config"]

T = TypeVar("T", int, float, bool, str)

# Fields of a config.json that change the result and are not supported, with the values that
# switch each off.
_OFF: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "sliding_window": (),
    "input_bits": (8,),
    "weight_bits": (1,),
}

# 1bitLLM/bitnet_b1_58-* by the names of microsoft/bitnet-b1.58-2B-4T.
_BITNET_ALIASES: Mapping[str, str] = {
    ".attn_sub_norm.": ".inner_attn_ln.",
    ".ffn_sub_norm.": ".ffn_layernorm.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of Hugging Face, by the name that its config.json gives it.

    activation, rope_theta  what holds where config.json leaves them out
    has_sub_norms           its layers have the two norms of BitNet
    has_ternary_masters     its float linears are masters of ternary ones even where config.json
                            has no quantization_config
    aliases  parts of tensor names, TensorSource's to its own; either is read
    off      fields of config.json that are refused, with the values that switch each off
    """

    architecture: str
    activation: Activation
    has_sub_norms: bool
    rope_theta: float = 10000.0
    has_ternary_masters: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    off: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: _OFF)

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """Return the model of a config.json.

        Raises  CheckpointError naming every feature that is not supported, or the bad field
        """
        num_heads = _get(config, "num_attention_heads", int)
        hidden_size = _get(config, "hidden_size", int)
        activation = self._activation(config)
        self._refuse_unsupported(config)
        theta, scaling = _rope(config, self.rope_theta)
        bos = _token_ids(config, "bos_token_id")
        if num_heads < 1:
            raise CheckpointError(
                f"num_attention_heads is {shorten(num_heads)}; it must be at least 1"
            )
        return ModelConfig(
            architecture=self.architecture,
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
            activation=activation,
            has_sub_norms=self.has_sub_norms,
            is_tied=_get(config, "tie_word_embeddings", bool, False),
            rope_scaling=scaling,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=_token_ids(config, "eos_token_id"),
        )

    def _activation(self, config: Mapping[str, Any]) -> Activation:
        name = _get(config, "hidden_act", str, self.activation)
        known: tuple[Activation, ...] = get_args(Activation)
        for activation in known:
            if name == activation:
                return activation
        raise CheckpointError(
            f"hidden_act {shorten(name)} is not supported; {' and '.join(known)} are"
        )

    def _refuse_unsupported(self, config: Mapping[str, Any]) -> None:
        found = [
            f"{name}={shorten(config[name])}"
            for name, off in self.off.items()
            if config.get(name) is not None and config[name] not in off
        ]
        if found:
            raise CheckpointError(f"not supported: {', '.join(found)}")


FAMILIES = {
    family.architecture: family
    for family in (
        Family(
            architecture="BitNetForCausalLM",
            activation="relu2",
            has_sub_norms=True,
            rope_theta=500000.0,
            aliases=_BITNET_ALIASES,
        ),
        Family(  # of 1bitLLM/bitnet_b1_58-*, published as masters
            architecture="BitnetForCausalLM",
            activation="silu",
            has_sub_norms=True,
            has_ternary_masters=True,
            aliases=_BITNET_ALIASES,
        ),
        Family(architecture="LlamaForCausalLM", activation="silu", has_sub_norms=False),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that a config.json names; CheckpointError if it is none of FAMILIES."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"architectures is {shorten(names)}; expected a list of one name")
    if names[0] not in FAMILIES:
        raise CheckpointError(
            f"architecture {shorten(names[0])} is not supported; {', '.join(FAMILIES)} are"
        )
    return FAMILIES[names[0]]


def with_generation_config(model: ModelConfig, generation: Mapping[str, Any]) -> ModelConfig:
    """Return the model with what a generation_config.json adds: tokens that begin and end text.

    Raises  CheckpointError naming the bad field
    """
    bos = _token_ids(generation, "bos_token_id")
    eos = model.eos_token_ids + _token_ids(generation, "eos_token_id")
    return replace(
        model,
        bos_token_id=bos[0] if bos and model.bos_token_id is None else model.bos_token_id,
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )


def notices_of(config: Mapping[str, Any]) -> list[str]:
    """Return what is passed over of a config.json that says two things of one."""
    older, newer = config.get("rope_scaling"), config.get("rope_parameters")
    if older and newer and older != newer:
        return ["rope_parameters is passed over for rope_scaling, which says otherwise"]
    return []


def _rope(config: Mapping[str, Any], default: float) -> tuple[float, Llama3RopeScaling | None]:
    """Return theta and the scaling, from rope_scaling or the newer rope_parameters.

    Where both are there the older goes before, as in transformers' PreTrainedConfig.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"rope_scaling is {shorten(scaling)}; expected an object")
    theta = _get(scaling, "rope_theta", float, _get(config, "rope_theta", float, default))
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise CheckpointError(
            f"not supported: partial_rotary_factor={shorten(scaling['partial_rotary_factor'])}"
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
            raise CheckpointError(
                f"rope type {shorten(kind)} is not supported; default and llama3 are"
            )


def _get(config: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    """Return the field, or the default where it is missing or null."""
    value = config.get(name)
    if value is None:
        if default is None:
            raise CheckpointError(f"{name} is missing")
        return default
    if kind is float and type(value) is int and abs(value) < 1 << 64:
        return kind(value)
    if type(value) is not kind:
        raise CheckpointError(f"{name} is {shorten(value)}; expected {kind.__name__}")
    return value


def _token_ids(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = config.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(f"{name} is {shorten(value)}; expected token ids")
    return tuple(dict.fromkeys(ids))
