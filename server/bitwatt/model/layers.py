"""One transformer layer, with ternary or with dense linears, as bitwatt_kernels/layer.py has it.

Both hold weights and call the backend: no state changes after construction.
"""

from dataclasses import dataclass
from typing import Protocol

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
    """Packed weights times int8 activations, in whatever pieces the backend runs it.

    prepared  what backend.prepare_layer returned
    """

    backend: Backend
    prepared: object

    def forward(self, h: Tensor, rope: Tensor, kv_cache: Tensor, layout: StepLayout) -> Tensor:
        return self.backend.ternary_layer(h, self.prepared, rope, kv_cache, layout)


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """The same layer in 16 (or 32) bits, the baseline.

    Queries, keys and values are one matrix, and gate and up another.

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
