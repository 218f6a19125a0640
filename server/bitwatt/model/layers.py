"""A model's layers, of ternary or of dense linears, as bitwatt_kernels/layer.py has them.

Both hold weights and call the backend: no state changes after construction.
"""

from dataclasses import dataclass
from typing import Protocol

from bitwatt_kernels.backend import Backend, LayerWeights, StepLayout
from torch import Tensor

from bitwatt.model.kv_cache import KVCache

__all__ = ["DenseLayers", "Layers", "TernaryLayers"]


class Layers(Protocol):
    """All of a model's layers."""

    def forward(self, h: Tensor, rope: Tensor, kv_cache: KVCache, layout: StepLayout) -> Tensor:
        """Return the residual stream after them, [T, hidden_size]; writes the KV cache."""
        ...


@dataclass(frozen=True, slots=True)
class TernaryLayers:
    """Packed weights times int8 activations, in whatever pieces the backend runs them.

    prepared  what backend.prepare_layers returned
    """

    backend: Backend
    prepared: object

    def forward(self, h: Tensor, rope: Tensor, kv_cache: KVCache, layout: StepLayout) -> Tensor:
        return self.backend.ternary_layers(h, self.prepared, rope, kv_cache.layers, layout)


@dataclass(frozen=True, slots=True)
class DenseLayers:
    """The same in 16 (or 32) bits, the baseline: linears in the stream's dtype."""

    backend: Backend
    layers: tuple[LayerWeights[Tensor], ...]

    def forward(self, h: Tensor, rope: Tensor, kv_cache: KVCache, layout: StepLayout) -> Tensor:
        for layer, layer_cache in zip(self.layers, kv_cache.by_layer, strict=True):
            h = self._layer(h, layer, rope, layer_cache, layout)
        return h

    def _layer(
        self,
        h: Tensor,
        layer: LayerWeights[Tensor],
        rope: Tensor,
        kv_cache: Tensor,
        layout: StepLayout,
    ) -> Tensor:
        backend, eps = self.backend, layer.eps
        x = backend.rms_norm(h, layer.input_norm, eps)
        qkv = backend.dense_linear(x, layer.qkv, None, None)
        q = backend.rope_and_cache(qkv, rope, kv_cache, layout, layer.num_heads)
        x = backend.attention(q, kv_cache, layout, layer.attention_scale)
        if layer.attention_sub_norm is not None:
            x = backend.rms_norm(x, layer.attention_sub_norm, eps)
        h = backend.dense_linear(x, layer.o, None, h)

        x = backend.rms_norm(h, layer.mlp_norm, eps)
        x = backend.gated_activation(
            backend.dense_linear(x, layer.gate_up, None, None), layer.activation
        )
        if layer.mlp_sub_norm is not None:
            x = backend.rms_norm(x, layer.mlp_sub_norm, eps)
        return backend.dense_linear(x, layer.down, None, h)
