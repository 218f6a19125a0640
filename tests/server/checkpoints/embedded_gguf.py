"""The embedded model as a GGUF file, its linears as I2_S."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from bitwatt import builtin
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.server.checkpoints.gguf_writer import Raw, Stored, store, write_gguf

__all__ = ["write_embedded"]

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.": "ffn_",
    "_proj": "",
}
_CONTROL = 3


def write_embedded(path: Path, **changes: Any) -> None:
    """Write the file; changes are keys of its metadata, None leaves one out."""
    config = _json("config.json")
    text = _json("tokenizer.json")
    tokens = sorted(text["model"]["vocab"], key=text["model"]["vocab"].__getitem__)
    special = {token["content"] for token in text["added_tokens"]}
    types = [_CONTROL if token in special else 1 for token in tokens]
    metadata = {
        "general.architecture": "bitnet-b1.58",
        "bitnet-b1.58.block_count": config["num_hidden_layers"],
        "bitnet-b1.58.context_length": config["max_position_embeddings"],
        "bitnet-b1.58.embedding_length": config["hidden_size"],
        "bitnet-b1.58.feed_forward_length": config["intermediate_size"],
        "bitnet-b1.58.attention.head_count": config["num_attention_heads"],
        "bitnet-b1.58.attention.head_count_kv": config["num_key_value_heads"],
        "bitnet-b1.58.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "bitnet-b1.58.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [Raw(5, kind.to_bytes(4, "little")) for kind in types],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in text["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": _json("tokenizer_config.json")["chat_template"],
        **changes,
    }
    tensors = load_file(builtin.TERNARY / "model.safetensors")
    stored = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            continue
        if f"{name}_scale" in tensors:
            shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None, None]
            codes = (tensor.numpy() >> shifts & 3).reshape(-1, tensor.shape[1])
            stored[_name(name)] = _i2_s(codes, tensors[f"{name}_scale"].numpy())
        else:
            stored[_name(name)] = store(
                tensor.float().numpy(), "F32" if tensor.dim() == 1 else "BF16"
            )
    write_gguf(path, {k: v for k, v in metadata.items() if v is not None}, stored)


def _json(name: str) -> Any:
    return json.loads((builtin.TERNARY / name).read_text())


def _name(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _i2_s(codes: NDArray[np.uint8], scale: NDArray[np.float32]) -> Stored:
    """Return codes of 0 to 2 in I2_S; gguf_writer.py has the same weight by weight."""
    first, second, third, fourth = np.moveaxis(codes.reshape(-1, 4, 32), 1, 0)
    packed = first << 6 | second << 4 | third << 2 | fourth
    tail = scale.astype("<f4").tobytes() + bytes(28)
    return Stored(36, codes.shape, packed.tobytes() + tail, np.empty(0, np.float32))
