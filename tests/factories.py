"""Small configs and steps, for tests of models and kernels. Needs what a GPU image has, no more."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from bitwatt.model.config import ModelConfig
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from torch import Tensor

__all__ = ["make_model_config", "make_step_layout", "moved"]


def make_model_config(*, is_llama: bool = False, **changes: Any) -> ModelConfig:
    """Return the config of a tiny model, a BitNet or a LLaMA, every size its own."""
    given: dict[str, Any] = {
        "architecture": "LlamaForCausalLM" if is_llama else "BitNetForCausalLM",
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "max_model_len": 256,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "activation": "silu" if is_llama else "relu2",
        "has_sub_norms": not is_llama,
        "is_tied": True,
    }
    return ModelConfig(**(given | changes))


def make_step_layout(
    block_tables: Tensor,
    context_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    extra_tokens: int = 0,
) -> StepLayout:
    """Return the layout of a step in which each sequence brings the last tokens of its context.

    block_tables  [sequences, blocks] int32
    context_lens  tokens in the cache after the step; 0 pads: its tokens have no slot
    query_lens    tokens of the step
    extra_tokens  padding after the last sequence
    """
    positions, slots = [], []
    for table, context_len, query_len in zip(block_tables, context_lens, query_lens, strict=True):
        if context_len:
            new = torch.arange(context_len - query_len, context_len)
            positions.append(new)
            slots.append(table[new // BLOCK_SIZE].long() * BLOCK_SIZE + new % BLOCK_SIZE)
        else:
            positions.append(torch.zeros(query_len, dtype=torch.int64))
            slots.append(torch.full((query_len,), -1))
    positions.append(torch.zeros(extra_tokens, dtype=torch.int64))
    slots.append(torch.full((extra_tokens,), -1))
    return StepLayout(
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        query_starts=torch.tensor([0, *query_lens]).cumsum(0).int(),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=block_tables,
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
    )


def moved(layout: StepLayout, device: torch.device) -> StepLayout:
    """Return the layout with its tensors on device."""
    values = {field.name: getattr(layout, field.name) for field in fields(layout)}
    tensors = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
    return replace(layout, **tensors)
