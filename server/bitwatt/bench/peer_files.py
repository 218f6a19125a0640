"""Random weights in the files that other engines read: the shapes of presets, for timing alone.

Every code is legal and every scale alike, so that logits stay small.

Source  block formats: github.com/ggml-org/ggml, src/ggml-common.h; IQ2_BN: ik_llama.cpp's
        ggml/src/ggml-common.h (a float32 scale a row, then two bits a weight)
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitwatt.checkpoints.gguf_writer import GgufWriter, MetadataValue
from bitwatt.model.config import ModelConfig

__all__ = ["FORMATS", "write_bf16_folder", "write_gguf"]

_FOUR_CODES = torch.tensor(
    [a | b << 2 | c << 4 | d << 6 for a, b, c, d in itertools.product(range(3), repeat=4)],
    dtype=torch.uint8,
)
_DEVIATION = 0.02  # of embeddings and dense weights


def _codes(rows: int, num_bytes: int) -> Tensor:
    return _FOUR_CODES[torch.randint(len(_FOUR_CODES), (rows, num_bytes))]


def _scales(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return a scale a row in bytes, at which a product's sums are as large as its inputs."""
    return torch.full((rows, 1), (1.5 / columns) ** 0.5, dtype=dtype).view(torch.uint8)


def _f16(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns) * _DEVIATION).half().view(torch.uint8)


def _q8_0(rows: int, columns: int) -> Tensor:
    blocks = rows * columns // 32
    scale = torch.full((blocks, 1), _DEVIATION / 42, dtype=torch.float16).view(torch.uint8)
    return torch.cat([scale, torch.randint(-127, 128, (blocks, 32)).to(torch.uint8)], dim=1)


def _tq2_0(rows: int, columns: int) -> Tensor:
    scales = _scales(rows, columns, torch.float16).repeat_interleave(columns // 256, dim=0)
    return torch.cat([_codes(len(scales), 64), scales], dim=1)


def _q2_0(rows: int, columns: int) -> Tensor:
    scales = _scales(rows, columns, torch.float16).repeat_interleave(columns // 64, dim=0)
    return torch.cat([scales, _codes(len(scales), 16)], dim=1)


def _iq2_bn(rows: int, columns: int) -> Tensor:
    return torch.cat([_scales(rows, columns, torch.float32), _codes(rows, columns // 4)], dim=1)


@dataclass(frozen=True, slots=True)
class _Format:
    """A type of tensors, by its number in the file."""

    type_id: int
    random: Callable[[int, int], Tensor]


FORMATS = {
    "F16": _Format(1, _f16),
    "Q8_0": _Format(8, _q8_0),
    "TQ2_0": _Format(35, _tq2_0),
    "Q2_0": _Format(42, _q2_0),
    "IQ2_BN": _Format(135, _iq2_bn),
}


def write_gguf(path: Path, config: ModelConfig, linears: str, embedding: str) -> None:
    """Write a model of the shape with a tied embedding, as the formats of FORMATS say.

    A shape with sub-norms is llama.cpp's `bitnet`, whose activation is SiLU, and else its `llama`.
    """
    architecture = "bitnet" if config.has_sub_norms else "llama"
    torch.manual_seed(0)
    with GgufWriter(path.parent) as writer:

        def add(name: str, how: str, rows: int, columns: int) -> None:
            data = FORMATS[how].random(rows, columns).contiguous()
            writer.add(
                f"{name}.weight", (rows, columns), FORMATS[how].type_id, data.numpy().tobytes()
            )

        def add_norm(name: str, size: int) -> None:
            writer.add(f"{name}.weight", (size,), 0, torch.ones(size).numpy().tobytes())

        add("token_embd", embedding, config.vocab_size, config.hidden_size)
        add_norm("output_norm", config.hidden_size)
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        for layer in range(config.num_layers):
            block = f"blk.{layer}"
            for name, rows, columns in (
                ("attn_q", queries, config.hidden_size),
                ("attn_k", keys, config.hidden_size),
                ("attn_v", keys, config.hidden_size),
                ("attn_output", config.hidden_size, queries),
                ("ffn_gate", config.intermediate_size, config.hidden_size),
                ("ffn_up", config.intermediate_size, config.hidden_size),
                ("ffn_down", config.hidden_size, config.intermediate_size),
            ):
                add(f"{block}.{name}", linears, rows, columns)
            add_norm(f"{block}.attn_norm", config.hidden_size)
            add_norm(f"{block}.ffn_norm", config.hidden_size)
            if config.has_sub_norms:
                add_norm(f"{block}.attn_sub_norm", queries)
                add_norm(f"{block}.ffn_sub_norm", config.intermediate_size)
        metadata: dict[str, MetadataValue] = {
            "general.architecture": architecture,
            "tokenizer.ggml.model": "no_vocab",
            f"{architecture}.vocab_size": config.vocab_size,
            f"{architecture}.context_length": config.max_model_len,
            f"{architecture}.embedding_length": config.hidden_size,
            f"{architecture}.block_count": config.num_layers,
            f"{architecture}.feed_forward_length": config.intermediate_size,
            f"{architecture}.attention.head_count": config.num_heads,
            f"{architecture}.attention.head_count_kv": config.num_kv_heads,
            f"{architecture}.attention.key_length": config.head_dim,
            f"{architecture}.attention.value_length": config.head_dim,
            f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            f"{architecture}.rope.dimension_count": config.head_dim,
            f"{architecture}.rope.freq_base": config.rope_theta,
        }
        writer.finish(path, metadata)


def write_bf16_folder(folder: Path, config: ModelConfig) -> None:
    """Write a Hugging Face folder of bfloat16 masters, which its reader makes ternary."""
    torch.manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns) * _DEVIATION).bfloat16()

    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    tensors = {
        "model.embed_tokens.weight": random(config.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    for layer in range(config.num_layers):
        block = f"model.layers.{layer}"
        tensors |= {
            f"{block}.self_attn.q_proj.weight": random(queries, hidden),
            f"{block}.self_attn.k_proj.weight": random(keys, hidden),
            f"{block}.self_attn.v_proj.weight": random(keys, hidden),
            f"{block}.self_attn.o_proj.weight": random(hidden, queries),
            f"{block}.mlp.gate_proj.weight": random(inner, hidden),
            f"{block}.mlp.up_proj.weight": random(inner, hidden),
            f"{block}.mlp.down_proj.weight": random(hidden, inner),
            f"{block}.input_layernorm.weight": torch.ones(hidden).bfloat16(),
            f"{block}.post_attention_layernorm.weight": torch.ones(hidden).bfloat16(),
            f"{block}.self_attn.attn_sub_norm.weight": torch.ones(queries).bfloat16(),
            f"{block}.mlp.ffn_sub_norm.weight": torch.ones(inner).bfloat16(),
        }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = {
        "architectures": ["BitNetForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": inner,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_model_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "relu2",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(told))
