"""Ternary layers of steps that decode, with what surrounds each linear inside its kernel.

A step of one sequence reads 9 MB a layer on a 2-billion-parameter model, some microseconds; ten
launches would take as long again. What is left is what a layer's sums depend on one after another.
Up to MAX_TOKENS every program norms and quantizes all rows anew; up to MAX_QUEUED_TOKENS each row
is one program's. So are, of more, the rows that linears of many programs read where a step
decodes; others have a launch of their own. The bits are those of the operations one by one.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import torch
import triton
from torch import Tensor

from bitwatt_kernels.backend import LayerWeights, StepLayout
from bitwatt_kernels.gpu.attention import attention, rotated_attention
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.elementwise import gated_activation_quantize, quantize, rms_norm_quantize
from bitwatt_kernels.gpu.linear import ternary_linear
from bitwatt_kernels.gpu.normed_linear import MAX_TOKENS, normed_linear
from bitwatt_kernels.gpu.rope import rope_and_cache
from bitwatt_kernels.gpu.row_queue import MAX_QUEUED_TOKENS, RawRows
from bitwatt_kernels.kv_blocks import head_dim_of
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
    """Return the residual stream after the layers, [T, hidden_size], as Backend.ternary_layers.

    T  at least 1
    """
    queues = len(h) <= MAX_QUEUED_TOKENS
    # Of the four, qkv and gate_up have the most programs, and the narrowest rows.
    queues_stream = queues or layout.max_query_len <= 1
    for layer, kv_cache in zip(layers, kv_caches, strict=True):
        qkv = _linear(h, layer.input_norm, layer.eps, layer.qkv, None, queues_stream, gpu)
        attended = _attention(qkv, layer, rope, kv_cache, layout, gpu)
        h = _linear(attended, layer.attention_sub_norm, layer.eps, layer.o, h, queues, gpu)
        if len(h) <= MAX_TOKENS:
            h = _mlp_of_fewest(h, layer, gpu)
        else:
            h = _mlp(h, layer, queues, queues_stream, gpu)
    return h


def _linear(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    weight: Any,
    residual: Tensor | None,
    is_queued: bool,
    gpu: Gpu,
) -> Tensor:
    """Return weight of x, normed unless norm is None, plus residual, in x's dtype.

    is_queued  whether the linear's programs norm and quantize rows, if more than MAX_TOKENS
    """
    if len(x) <= MAX_TOKENS:
        return normed_linear(x, norm, eps, weight, residual, x.dtype, gpu)
    if is_queued:
        return ternary_linear(RawRows(x, norm, eps), weight, residual, x.dtype, gpu)
    rows = quantize(x, gpu) if norm is None else rms_norm_quantize(x, norm, eps, gpu)
    return ternary_linear(rows, weight, residual, x.dtype, gpu)


def _attention(
    qkv: Tensor,
    layer: LayerWeights[TernaryWeight],
    rope: Tensor,
    kv_cache: Tensor,
    layout: StepLayout,
    gpu: Gpu,
) -> Tensor:
    scale = layer.attention_scale
    # Masks of a padded head_dim cost registers, which the rotating kernel spills on sm_100.
    head_dim = head_dim_of(kv_cache)
    is_whole = head_dim == triton.next_power_of_2(head_dim)
    if layout.max_query_len <= 1 and layer.head_norms is None and is_whole:
        return rotated_attention(qkv, rope, kv_cache, layout, layer.num_heads, scale, gpu)
    queries = rope_and_cache(qkv, rope, kv_cache, layout, layer.num_heads, gpu, layer.head_norms)
    return attention(queries, kv_cache, layout, scale, gpu)


def _mlp_of_fewest(h: Tensor, layer: LayerWeights[TernaryWeight], gpu: Gpu) -> Tensor:
    """Return h and the MLP's part, of at most MAX_TOKENS, with f(gate) · up behind gate_up."""
    gate_up, down = cast(TernaryWeight, layer.gate_up), cast(TernaryWeight, layer.down)
    gated = normed_linear(
        h,
        layer.mlp_norm,
        layer.eps,
        gate_up,
        None,
        torch.float32,
        gpu,
        activation=layer.activation,
    )
    return normed_linear(gated, layer.mlp_sub_norm, layer.eps, down, h, h.dtype, gpu)


def _mlp(
    h: Tensor, layer: LayerWeights[TernaryWeight], queues: bool, queues_stream: bool, gpu: Gpu
) -> Tensor:
    """Return h and the MLP's part, with f(gate) · up before down."""
    gate_up = _linear(h, layer.mlp_norm, layer.eps, layer.gate_up, None, queues_stream, gpu)
    down, norm = cast(TernaryWeight, layer.down), layer.mlp_sub_norm
    if queues:
        rows = RawRows(gate_up, norm, layer.eps, layer.activation)
        return ternary_linear(rows, down, h, h.dtype, gpu)
    gated = gated_activation_quantize(gate_up, layer.activation, norm, layer.eps, gpu)
    return ternary_linear(gated, down, h, h.dtype, gpu)
