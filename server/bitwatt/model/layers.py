"""One transformer layer, with ternary or with dense linears.

    h += o(sub_norm(attention(norm(h))))
    h += down(sub_norm(f(gate(norm(h))) · up(norm(h))))

The sub-norms are BitNet's; LLaMA has none. Queries, keys and values are one matrix, and gate and
up another. Both layers hold weights and call the backend: no state changes after construction.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from bitwatt_kernels.backend import Activation, Backend, StepLayout
from torch import Tensor

__all__ = ["DenseLayer", "Layer", "LayerShape", "TernaryLayer"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer knows of its model."""

    num_heads: int
    attention_scale: float
    activation: Activation
    eps: float


class Layer(Protocol):
    """One step of the residual stream."""

    def forward(self, h: Tensor, rope: Tensor, kv_cache: Tensor, layout: StepLayout) -> Tensor:
        """Return the stream after the layer, [T, hidden_size]; writes this layer's KV cache."""
        ...


@dataclass(frozen=True, slots=True)
class TernaryLayer:
    """Packed weights times int8 activations; the stream is rounded to dtype at each addition.

    qkv, o, gate_up, down  what backend.prepare_ternary returned
    """

    backend: Backend
    shape: LayerShape
    dtype: torch.dtype
    input_norm: Tensor
    qkv: object
    attention_sub_norm: Tensor | None
    o: object
    mlp_norm: Tensor
    gate_up: object
    mlp_sub_norm: Tensor | None
    down: object

    def forward(self, h: Tensor, rope: Tensor, kv_cache: Tensor, layout: StepLayout) -> Tensor:
        backend, shape, dtype = self.backend, self.shape, self.dtype
        x = backend.rms_norm_quantize(h, self.input_norm, shape.eps)
        qkv = backend.ternary_linear(x, self.qkv, None, dtype)
        q = backend.rope_and_cache(qkv, rope, kv_cache, layout, shape.num_heads)
        attended = backend.attention(q, kv_cache, layout, shape.attention_scale)
        if self.attention_sub_norm is None:
            x = backend.quantize(attended)
        else:
            x = backend.rms_norm_quantize(attended, self.attention_sub_norm, shape.eps)
        h = backend.ternary_linear(x, self.o, h, dtype)

        x = backend.rms_norm_quantize(h, self.mlp_norm, shape.eps)
        gate_up = backend.ternary_linear(x, self.gate_up, None, dtype)
        x = backend.gated_activation_quantize(
            gate_up, shape.activation, self.mlp_sub_norm, shape.eps
        )
        return backend.ternary_linear(x, self.down, h, dtype)


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """The same layer in 16 (or 32) bits, the baseline.

    qkv, o, gate_up, down  what backend.prepare_dense returned, in the stream's dtype
    """

    backend: Backend
    shape: LayerShape
    input_norm: Tensor
    qkv: Tensor
    attention_sub_norm: Tensor | None
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    mlp_sub_norm: Tensor | None
    down: Tensor

    def forward(self, h: Tensor, rope: Tensor, kv_cache: Tensor, layout: StepLayout) -> Tensor:
        backend, shape = self.backend, self.shape
        x = backend.rms_norm(h, self.input_norm, shape.eps)
        qkv = backend.dense_linear(x, self.qkv, None, None)
        q = backend.rope_and_cache(qkv, rope, kv_cache, layout, shape.num_heads)
        x = backend.attention(q, kv_cache, layout, shape.attention_scale)
        if self.attention_sub_norm is not None:
            x = backend.rms_norm(x, self.attention_sub_norm, shape.eps)
        h = backend.dense_linear(x, self.o, None, h)

        x = backend.rms_norm(h, self.mlp_norm, shape.eps)
        x = backend.gated_activation(
            backend.dense_linear(x, self.gate_up, None, None), shape.activation
        )
        if self.mlp_sub_norm is not None:
            x = backend.rms_norm(x, self.mlp_sub_norm, shape.eps)
        return backend.dense_linear(x, self.down, None, h)
