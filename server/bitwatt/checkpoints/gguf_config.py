"""What a GGUF file says of its model, in the fields of a config.json. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitwatt.checkpoints.gguf_file import Gguf
from bitwatt.errors import CheckpointError, shorten
from bitwatt.model.config import ModelConfig
from bitwatt.model.families import FAMILIES, what_is_missing, yarn_attention_factor

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "read_config"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A value of general.architecture.

    family           of FAMILIES, by its name
    has_paired_rope  the rows of q and k are in the order of a rotation of neighbours, where
                     Hugging Face's rotates the first half of a head against the second
    """

    family: str
    has_paired_rope: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", has_paired_rope=True),
    "bitnet": Architecture("BitnetForCausalLM"),
    "bitnet-25": Architecture("BitNetForCausalLM"),
    "bitnet-b1.58": Architecture("BitNetForCausalLM"),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
}

# Keys below the architecture's own name, and the field of a config.json that each is.
_FIELDS: Mapping[str, tuple[str, type]] = {
    "embedding_length": ("hidden_size", int),
    "feed_forward_length": ("intermediate_size", int),
    "block_count": ("num_hidden_layers", int),
    "attention.head_count": ("num_attention_heads", int),
    "attention.head_count_kv": ("num_key_value_heads", int),
    "attention.key_length": ("head_dim", int),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
    "context_length": ("max_position_embeddings", int),
    "rope.freq_base": ("rope_theta", float),
}
_OPTIONAL = {"attention.head_count_kv", "attention.key_length", "rope.freq_base"}

# Keys that change nothing, and such that change nothing with these values.
_TOLD = {"vocab_size", "tensor_data_layout"}
_OFF: Mapping[str, tuple[object, ...]] = {
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scale_linear": (1.0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
}
_SPECIAL = {"rope.dimension_count", "attention.value_length", "rope.scaling.finetuned"}
_SCALING: Mapping[str, type] = {
    "type": str,
    "factor": float,
    "attn_factor": float,
    "original_context_length": int,
    "yarn_beta_fast": float,
    "yarn_beta_slow": float,
}

# Control tokens that end a turn wherever they are, whichever the file names: files written before
# there was a key for them name one.
_ENDS_OF_TURN = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
)
_CONTROL = 3


def architecture_of(gguf: Gguf) -> Architecture:
    """Return the file's architecture; CheckpointError if it is none of ARCHITECTURES."""
    name = gguf.require("general.architecture", str)
    rotated = next((key for key in gguf.metadata if key.startswith("prism.")), None)
    if rotated is not None:
        raise gguf.error(rotated, "is not supported: the weights are in a rotated basis")
    if what := what_is_missing(name):
        raise CheckpointError(f"{gguf.path}: architecture {shorten(name)} is not supported: {what}")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{gguf.path}: architecture {shorten(name)} is not supported; "
            f"{', '.join(ARCHITECTURES)} are"
        )
    return ARCHITECTURES[name]


def read_config(gguf: Gguf, *, vocab_size: int, is_tied: bool) -> ModelConfig:
    """Return the file's model.

    vocab_size  rows of its embedding
    Raises      CheckpointError naming the bad key, or the feature that is not supported
    """
    architecture = architecture_of(gguf)
    config: dict[str, Any] = {"vocab_size": vocab_size, "tie_word_embeddings": is_tied}
    prefix = gguf.require("general.architecture", str) + "."
    for key, (field, kind) in _FIELDS.items():
        read = gguf.get if key in _OPTIONAL else gguf.require
        config[field] = read(prefix + key, kind)
    _refuse_unsupported(gguf, prefix, config)
    config["rope_scaling"] = _rope_scaling(gguf, prefix)
    if config["head_dim"] is None and config["num_attention_heads"] > 0:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    eos = _end_token_ids(gguf)
    config["bos_token_id"] = gguf.get("tokenizer.ggml.bos_token_id", int)
    try:
        model = FAMILIES[architecture.family].read_config(config)
        return replace(model, eos_token_ids=eos)
    except CheckpointError as error:
        raise CheckpointError(f"{gguf.path}: {error}") from error


def _refuse_unsupported(gguf: Gguf, prefix: str, config: Mapping[str, Any]) -> None:
    known = {*_FIELDS, *_TOLD, *_OFF, *_SPECIAL, *(f"rope.scaling.{key}" for key in _SCALING)}
    for key, value in gguf.metadata.items():
        name = key.removeprefix(prefix)
        if name == key:
            continue
        off = _OFF.get(name)
        if name not in known or not (off is None or value in off):
            raise gguf.error(key, f"is {shorten(value)}, which is not supported")
    num_heads = config["num_attention_heads"]
    if num_heads < 1:
        return  # which the family refuses
    head_dim = config["head_dim"] or config["hidden_size"] // num_heads
    for name in ("rope.dimension_count", "attention.value_length"):
        size = gguf.get(prefix + name, int, head_dim)
        if size != head_dim:
            raise gguf.error(prefix + name, f"is {size}; heads of {head_dim} want it the same")


def _rope_scaling(gguf: Gguf, prefix: str) -> dict[str, Any] | None:
    """Return rope_scaling of a config.json; None where the frequencies stay as they are."""
    given = {key: gguf.get(f"{prefix}rope.scaling.{key}", kind) for key, kind in _SCALING.items()}
    factor = given["factor"] or 1.0  # llama.cpp's, too, takes 0 for none
    times = 1.0 if given["attn_factor"] is None else given["attn_factor"]
    kind = given["type"] or ("none" if factor == 1 else "linear")
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": given["original_context_length"],
            "attention_factor": times * yarn_attention_factor(factor),
            "beta_fast": given["yarn_beta_fast"],
            "beta_slow": given["yarn_beta_slow"],
        }
    if kind not in ("none", "linear"):
        raise gguf.error(
            f"{prefix}rope.scaling.type", f"is {shorten(kind)}, which is not supported"
        )
    if times != 1:
        raise gguf.error(f"{prefix}rope.scaling.attn_factor", f"is {times}, which is not supported")
    if kind == "none" or factor == 1:
        return None
    return {"rope_type": "linear", "factor": factor}


def _end_token_ids(gguf: Gguf) -> tuple[int, ...]:
    """Return the tokens that end a turn, those first that the file names."""
    named = [gguf.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    ids = [token_id for token_id in named if token_id is not None]
    tokens = gguf.array("tokenizer.ggml.tokens", str) or ()
    types = gguf.array("tokenizer.ggml.token_type", int) or ()
    for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=False)):
        if token_type == _CONTROL and token in _ENDS_OF_TURN:
            ids.append(token_id)
    return tuple(dict.fromkeys(ids))
