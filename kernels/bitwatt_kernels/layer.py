"""What a ternary layer computes, operation by operation.

    h += o(sub_norm(attention(norm(h))))
    h += down(sub_norm(f(gate(norm(h))) · up(norm(h))))

The sub-norms are BitNet's; LLaMA has none. The stream is rounded to its dtype at each addition.
"""

from typing import cast

from torch import Tensor

from bitwatt_kernels.backend import Backend, StepLayout, TernaryLayerWeights

__all__ = ["LayerByOperations"]


class LayerByOperations:
    """A backend's layer as calls of its own operations."""

    def prepare_layer(self, layer: TernaryLayerWeights) -> TernaryLayerWeights:
        return layer

    def ternary_layer(
        self, h: Tensor, layer: object, rope: Tensor, kv_cache: Tensor, layout: StepLayout
    ) -> Tensor:
        assert isinstance(layer, TernaryLayerWeights)
        backend = cast(Backend, self)
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
        x = backend.gated_activation_quantize(
            gate_up, layer.activation, layer.mlp_sub_norm, layer.eps
        )
        return backend.ternary_linear(x, layer.down, h, h.dtype)
