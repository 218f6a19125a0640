"""What a ternary layer computes, operation by operation.

    h += o(sub_norm(attention(norm(h))))
    h += down(sub_norm(f(gate(norm(h))) · up(norm(h))))

The sub-norms are BitNet's; LLaMA has none. The stream is rounded to its dtype at each addition.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from bitwatt_kernels.backend import Backend, LayerWeights, StepLayout

__all__ = ["LayersByOperations"]


class LayersByOperations:
    """A backend's layers as calls of its own operations."""

    def prepare_layers(
        self, layers: Sequence[LayerWeights[object]]
    ) -> tuple[LayerWeights[object], ...]:
        return tuple(layers)

    def ternary_layers(
        self, h: Tensor, layers: object, rope: Tensor, kv_caches: Tensor, layout: StepLayout
    ) -> Tensor:
        assert isinstance(layers, tuple)
        backend = cast(Backend, self)
        for layer, kv_cache in zip(layers, kv_caches, strict=True):
            h = _layer(backend, h, layer, rope, kv_cache, layout)
        return h


def _layer(
    backend: Backend,
    h: Tensor,
    layer: LayerWeights[object],
    rope: Tensor,
    kv_cache: Tensor,
    layout: StepLayout,
) -> Tensor:
    x = backend.rms_norm_quantize(h, layer.input_norm, layer.eps)
    qkv = backend.ternary_linear(x, layer.qkv, None, h.dtype)
    q = backend.rope_and_cache(qkv, rope, kv_cache, layout, layer.num_heads)
    attended = backend.attention(q, kv_cache, layout, layer.attention_scale)
    if layer.attention_sub_norm is None:
        x = backend.quantize(attended)
    else:
        x = backend.rms_norm_quantize(attended, layer.attention_sub_norm, layer.eps)
    h = backend.ternary_linear(x, layer.o, h, h.dtype)

    x = backend.rms_norm_quantize(h, layer.mlp_norm, layer.eps)
    gate_up = backend.ternary_linear(x, layer.gate_up, None, h.dtype)
    x = backend.gated_activation_quantize(gate_up, layer.activation, layer.mlp_sub_norm, layer.eps)
    return backend.ternary_linear(x, layer.down, h, h.dtype)
