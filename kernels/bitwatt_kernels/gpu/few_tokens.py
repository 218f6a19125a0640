"""Ternary layers of a few tokens, with what surrounds each linear inside its kernel.

A step of one sequence reads 9 MB a layer on a 2-billion-parameter model, some microseconds; ten
launches would take as long again. What is left is what a layer's sums depend on one after another.
The bits are those of the operations one by one.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import torch
import triton
from torch import Tensor

from bitwatt_kernels.backend import LayerWeights, StepLayout
from bitwatt_kernels.gpu.attention import attention, rotated_attention
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.normed_linear import normed_linear
from bitwatt_kernels.gpu.rope import rope_and_cache
from bitwatt_kernels.packing import TernaryWeight

__all__ = ["are_fusable", "run_layers"]


def are_fusable(
    layers: Sequence[LayerWeights[Any]],
) -> TypeGuard[Sequence[LayerWeights[TernaryWeight]]]:
    """Return whether every linear is one matrix with a scale a row, which reads what is normed."""
    linears = [(w.qkv, w.o, w.gate_up, w.down) for w in layers]
    return all(
        isinstance(linear, TernaryWeight) and linear.group is None
        for layer in linears
        for linear in layer
    )


def run_layers(
    h: Tensor,
    layers: Sequence[LayerWeights[TernaryWeight]],
    rope: Tensor,
    kv_caches: Tensor,
    layout: StepLayout,
    gpu: Gpu,
) -> Tensor:
    """Return the residual stream after the layers, [T, hidden_size], as Backend.ternary_layers."""
    dtype = h.dtype
    for layer, kv_cache in zip(layers, kv_caches, strict=True):
        weight = cast(TernaryWeight, layer.qkv)
        qkv = normed_linear(h, layer.input_norm, layer.eps, weight, None, dtype, gpu)
        scale = layer.attention_scale
        # Masks of a padded head_dim cost registers, which the rotating kernel spills on sm_100.
        head_dim = kv_cache.shape[4]
        is_whole = head_dim == triton.next_power_of_2(head_dim)
        if layout.max_query_len <= 1 and layer.head_norms is None and is_whole:
            attended = rotated_attention(qkv, rope, kv_cache, layout, layer.num_heads, scale, gpu)
        else:
            queries = rope_and_cache(
                qkv, rope, kv_cache, layout, layer.num_heads, gpu, layer.head_norms
            )
            attended = attention(queries, kv_cache, layout, scale, gpu)
        weight = cast(TernaryWeight, layer.o)
        h = normed_linear(attended, layer.attention_sub_norm, layer.eps, weight, h, dtype, gpu)
        weight = cast(TernaryWeight, layer.gate_up)
        gated = normed_linear(
            h,
            layer.mlp_norm,
            layer.eps,
            weight,
            None,
            torch.float32,
            gpu,
            activation=layer.activation,
        )
        weight = cast(TernaryWeight, layer.down)
        h = normed_linear(gated, layer.mlp_sub_norm, layer.eps, weight, h, dtype, gpu)
    return h
