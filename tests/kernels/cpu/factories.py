"""Random weights, and steps over a cache of KV blocks, for the native kernels' tests."""

import torch
from bitwatt_kernels.backend import (
    BLOCK_SIZE,
    Backend,
    LayerWeights,
    QuantizedActivations,
    StepLayout,
)
from bitwatt_kernels.packing import TernaryWeight, pack
from torch import Tensor

from tests.factories import make_step_layout

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_ternary(
    out_features: int,
    in_features: int,
    *,
    bias: bool = False,
    seed: int = 0,
    group: int | None = None,
    scales_dtype: torch.dtype = torch.float32,
) -> TernaryWeight:
    g = make_generator(seed)
    weight = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8, generator=g)
    shape = (out_features,) if group is None else (out_features, in_features // group)
    scales = torch.rand(shape, generator=g) + 0.1
    if group is not None:  # as files have them: zeros, and codes that are the other way round
        scales *= torch.randint(-1, 2, shape, generator=g)
    return TernaryWeight(
        pack(weight),
        scales.to(scales_dtype),
        torch.randn(out_features, generator=g) if bias else None,
    )


def make_activations(num_tokens: int, in_features: int, *, seed: int = 0) -> Tensor:
    """Return [num_tokens, in_features] float32 with a wide spread of magnitudes per token."""
    g = make_generator(seed)
    return torch.randn(num_tokens, in_features, generator=g) * torch.exp(
        torch.randn(num_tokens, 1, generator=g) * 3
    )


def make_extreme_codes(
    num_tokens: int, in_features: int, *, group: int | None = None
) -> QuantizedActivations:
    """Return activations whose codes are -128 and 127 alone: what could overflow, would."""
    codes = torch.where(torch.arange(in_features) % 3 == 0, 127, -128).to(torch.int8)
    codes = codes.repeat(num_tokens, 1)
    sums = codes.unflatten(1, (-1, group or in_features)).sum(dim=2, dtype=torch.int32)
    if group is None:
        sums = sums[:, 0]
    return QuantizedActivations(codes, torch.ones(sums.shape), sums)


def make_layout(
    context_lens: list[int], query_lens: list[int], *, extra_tokens: int = 0, seed: int = 0
) -> tuple[StepLayout, int]:
    """Return a step's layout over shuffled blocks, and the number of blocks of its cache."""
    used = [-(-n // BLOCK_SIZE) for n in context_lens]
    num_blocks = sum(used) + 3
    order = torch.randperm(num_blocks, generator=make_generator(seed)).to(torch.int32)
    tables = torch.full((len(used), max([1, *used])), -1, dtype=torch.int32)
    first = 0
    for row, count in enumerate(used):
        tables[row, :count] = order[first : first + count]
        first += count
    layout = make_step_layout(tables, context_lens, query_lens, extra_tokens=extra_tokens)
    return layout, num_blocks


def make_cache(
    num_blocks: int, num_groups: int, head_dim: int, dtype: torch.dtype, *, seed: int = 0
) -> Tensor:
    shape = (2, num_blocks, num_groups, BLOCK_SIZE, head_dim)
    return torch.randn(shape, generator=make_generator(seed)).to(dtype)


def make_layer(
    backend: Backend,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    is_bitnet: bool = True,
    group: int | None = None,
    seed: int = 0,
) -> LayerWeights[object]:
    """Return a ternary layer as BitNet has it, or as LLaMA: no sub-norms, SiLU, and biases here.

    group  of the scales, where a row has several
    """
    attended = num_heads * head_dim
    g = make_generator(seed)

    def linear(out_features: int, in_features: int) -> object:
        nonlocal seed
        seed += 1
        weight = make_ternary(out_features, in_features, bias=not is_bitnet, group=group, seed=seed)
        return backend.prepare_ternary(weight)

    return LayerWeights(
        num_heads=num_heads,
        attention_scale=head_dim**-0.5,
        activation="relu2" if is_bitnet else "silu",
        eps=1e-5,
        input_norm=torch.randn(hidden_size, generator=g),
        qkv=linear(attended + 2 * num_kv_heads * head_dim, hidden_size),
        attention_sub_norm=torch.randn(attended, generator=g) if is_bitnet else None,
        o=linear(hidden_size, attended),
        mlp_norm=torch.randn(hidden_size, generator=g),
        gate_up=linear(2 * intermediate_size, hidden_size),
        mlp_sub_norm=torch.randn(intermediate_size, generator=g) if is_bitnet else None,
        down=linear(hidden_size, intermediate_size),
    )
