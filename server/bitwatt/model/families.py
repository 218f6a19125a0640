"""The model families that are served, one entry each: what an architecture's name implies.

A family whose layers compute what kernels/bitwatt_kernels/layer.py already does is an entry of
FAMILIES and nothing else. No torch.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, get_args

from bitwatt.errors import CheckpointError, shorten
from bitwatt.model.config import (
    Activation,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)

__all__ = [
    "FAMILIES",
    "Family",
    "family_of",
    "notices_of",
    "what_is_missing",
    "with_generation_config",
]

T = TypeVar("T", int, float, bool, str)

# Fields of a config.json that change the result and are not supported, with the values that
# switch each off.
_OFF: Mapping[str, tuple[object, ...]] = {
    "partial_rotary_factor": (1, 1.0),
    "input_bits": (8,),
    "weight_bits": (1,),
}

# 1bitLLM/bitnet_b1_58-* by the names of microsoft/bitnet-b1.58-2B-4T.
_BITNET_ALIASES: Mapping[str, str] = {
    ".attn_sub_norm.": ".inner_attn_ln.",
    ".ffn_sub_norm.": ".ffn_layernorm.",
}


# What known models are refused for, by what their names begin with, in small letters and digits
# alone: qwen35 in a GGUF file is qwen3_5 or Qwen3_5ForCausalLM in a config.json.
_MISSING: Mapping[str, str] = {
    "qwen35moe": "its layers of gated delta net and its experts are missing here",
    "qwen35": "its gated delta net, and the rotated basis of its weights, are missing here",
    "qwen3next": "its layers of gated delta net and its experts are missing here",
    "maple": "its layers are a mixture of experts, whose routing is missing here",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of Hugging Face, by the name that its config.json gives it.

    activation, rope_theta  what holds where config.json leaves them out
    has_sub_norms           its layers have the two norms of BitNet
    has_ternary_masters     its float linears are masters of ternary ones even where config.json
                            has no quantization_config
    has_head_norms          its attention norms each head's query and key
    has_qkv_bias            its queries, keys and values have a bias; None where attention_bias of
                            config.json says so, for the output projection too
    head_dim, sliding_window  what holds where config.json leaves them out
    can_drop_window         config.json has use_sliding_window, without which there is no window
    aliases  parts of tensor names, TensorSource's to its own; either is read
    off      fields of config.json that are refused, with the values that switch each off
    """

    architecture: str
    activation: Activation
    has_sub_norms: bool
    rope_theta: float = 10000.0
    has_ternary_masters: bool = False
    has_head_norms: bool = False
    has_qkv_bias: bool | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    can_drop_window: bool = False
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
        max_model_len = _get(config, "max_position_embeddings", int)
        self._refuse_window(config, max_model_len)
        theta, scaling = _rope(config, self.rope_theta, max_model_len)
        attention_bias = _get(config, "attention_bias", bool, False)
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
            head_dim=_get(config, "head_dim", int, self.head_dim or hidden_size // num_heads),
            max_model_len=max_model_len,
            rope_theta=theta,
            rms_norm_eps=_get(config, "rms_norm_eps", float),
            activation=activation,
            has_sub_norms=self.has_sub_norms,
            has_head_norms=self.has_head_norms,
            has_qkv_bias=attention_bias if self.has_qkv_bias is None else self.has_qkv_bias,
            has_o_bias=attention_bias and self.has_qkv_bias is None,
            has_mlp_bias=_get(config, "mlp_bias", bool, False),
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

    def _refuse_window(self, config: Mapping[str, Any], max_model_len: int) -> None:
        """Raise CheckpointError where some layers see but the last tokens of the context."""
        window = config.get("sliding_window", self.sliding_window)
        if self.can_drop_window and not _get(config, "use_sliding_window", bool, False):
            window = None
        if window is not None and not (type(window) is int and window >= max_model_len):
            raise CheckpointError(
                f"not supported: sliding_window={shorten(window)}, for a context of "
                f"{max_model_len} tokens; attention sees all of them here"
            )
        layers = config.get("layer_types") or []
        if window is None and not (
            isinstance(layers, list) and all(kind == "full_attention" for kind in layers)
        ):
            raise CheckpointError(
                f"not supported: layer_types={shorten(layers)}; full_attention alone is"
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
        Family(
            architecture="MistralForCausalLM",
            activation="silu",
            has_sub_norms=False,
            has_qkv_bias=False,
            sliding_window=4096,
        ),
        Family(
            architecture="Qwen2ForCausalLM",
            activation="silu",
            has_sub_norms=False,
            has_qkv_bias=True,
            can_drop_window=True,
        ),
        Family(
            architecture="Qwen3ForCausalLM",
            activation="silu",
            has_sub_norms=False,
            has_head_norms=True,
            head_dim=128,
            can_drop_window=True,
        ),
    )
}


def what_is_missing(name: str) -> str | None:
    """Return what a known architecture is refused for, by its name in any format; else None."""
    plain = re.sub("[^a-z0-9]", "", name.lower())
    return next((what for start, what in _MISSING.items() if plain.startswith(start)), None)


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that a config.json names; CheckpointError if it is none of FAMILIES."""
    for key in config:
        if key.lower().startswith("prism") or "hadamard" in key.lower():
            raise CheckpointError(
                f"not supported: {shorten(key)}: the weights are in a rotated basis"
            )
    names = config.get("architectures")
    kind = config.get("model_type")
    for name in [*(names if isinstance(names, list) else []), kind]:
        if isinstance(name, str) and (what := what_is_missing(name)):
            raise CheckpointError(f"architecture {shorten(name)} is not supported: {what}")
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


def _rope(
    config: Mapping[str, Any], default: float, max_model_len: int
) -> tuple[float, RopeScaling | None]:
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
        case "linear":
            return theta, LinearRopeScaling(_get(scaling, "factor", float))
        case "yarn":
            return theta, _yarn(scaling, config, max_model_len)
        case _:
            raise CheckpointError(
                f"rope type {shorten(kind)} is not supported; default, linear, llama3 and yarn are"
            )


def _yarn(
    scaling: Mapping[str, Any], config: Mapping[str, Any], max_model_len: int
) -> YarnRopeScaling:
    """Return the scaling, with what transformers takes where a field is missing."""
    # Standing beside rope_scaling it goes before, and where it stands nowhere it is the context.
    original = _get(
        config,
        "original_max_position_embeddings",
        int,
        _get(scaling, "original_max_position_embeddings", int, max_model_len),
    )
    factor = _get(scaling, "factor", float)
    mscale, of_all = (_get(scaling, name, float, 0.0) for name in ("mscale", "mscale_all_dim"))
    by_factor = yarn_attention_factor(factor)
    if mscale and of_all:
        by_factor = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, of_all)
    return YarnRopeScaling(
        factor=factor,
        original_max_model_len=original,
        attention_factor=_get(scaling, "attention_factor", float, by_factor),
        beta_fast=_get(scaling, "beta_fast", float, 32.0),
        beta_slow=_get(scaling, "beta_slow", float, 1.0),
        truncates=_get(scaling, "truncate", bool, True),
    )


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """Return what YaRN multiplies cos and sin by, arXiv:2309.00071, section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


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
