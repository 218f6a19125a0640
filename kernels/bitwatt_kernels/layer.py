"""What a layer computes, operation by operation, ternary or dense.

    h += o(sub_norm(attention(norm(h))))
    h += down(sub_norm(f(gate(norm(h))) · up(norm(h))))

The sub-norms are BitNet's; LLaMA has none. Qwen3's attention norms each head's query and key. Where
linears norm their own inputs (NormedParts), what comes before such a norm is rounded to the
stream's dtype. The stream is rounded to it at each addition. A ternary linear reads its input in
int8, quantized with no rounding in between, by the groups of its scales where a row has several; a
dense one reads it in the stream's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from bitwatt_kernels.backend import (
    Activation,
    Backend,
    DenseLinear,
    LayerWeights,
    NormedParts,
    QuantizedActivations,
    StepLayout,
    TernaryHead,
)

__all__ = ["LayersByOperations", "has_normed_parts", "ternary_head"]

W = TypeVar("W", contravariant=True)  # a linear's prepared weight
X = TypeVar("X")  # what a linear reads


class _Linear(Protocol[W, X]):
    """A linear, and the operations that end in what it reads."""

    def norm(self, x: Tensor, weight: Tensor | None, eps: float, reader: W) -> X:
        """Return x as reader reads it, normed unless weight is None."""
        ...

    def gated_activation(
        self, gate_up: Tensor, activation: Activation, weight: Tensor | None, eps: float, reader: W
    ) -> X:
        """Return f(gate) · up as reader reads it, normed unless weight is None."""
        ...

    def linear(self, x: X, weight: W, residual: Tensor | None) -> Tensor: ...


def _run(
    linear: _Linear[W, X],
    backend: Backend,
    h: Tensor,
    layers: Sequence[LayerWeights[W]],
    rope: Tensor,
    kv_caches: Tensor,
    layout: StepLayout,
) -> Tensor:
    def project(
        x: Tensor,
        norm: Tensor | None,
        eps: float,
        weight: W | NormedParts[W],
        residual: Tensor | None,
    ) -> Tensor:
        if not isinstance(weight, NormedParts):
            return linear.linear(linear.norm(x, norm, eps, weight), weight, residual)
        if norm is not None:
            x = backend.rms_norm(x, norm, eps)
        parts = [
            linear.linear(linear.norm(x, own_norm, weight.eps, part), part, residual)
            for own_norm, part in zip(weight.norms, weight.weights, strict=True)
        ]
        return torch.cat(parts, dim=1)

    for layer, kv_cache in zip(layers, kv_caches, strict=True):
        qkv = project(h, layer.input_norm, layer.eps, layer.qkv, None)
        q = backend.rope_and_cache(qkv, rope, kv_cache, layout, layer.num_heads, layer.head_norms)
        attended = backend.attention(q, kv_cache, layout, layer.attention_scale)
        h = project(attended, layer.attention_sub_norm, layer.eps, layer.o, h)

        gate_up = project(h, layer.mlp_norm, layer.eps, layer.gate_up, None)
        if isinstance(layer.down, NormedParts):
            gated = backend.gated_activation(gate_up, layer.activation)
            h = project(gated, layer.mlp_sub_norm, layer.eps, layer.down, h)
        else:
            x = linear.gated_activation(
                gate_up, layer.activation, layer.mlp_sub_norm, layer.eps, layer.down
            )
            h = linear.linear(x, layer.down, h)
    return h


class _Prepared(Protocol):
    """What prepare_ternary of a backend whose layers are operations returns."""

    @property
    def group(self) -> int | None:
        """How many neighbours along a row share a scale; None where a row has one."""
        ...


@dataclass(frozen=True, slots=True)
class _Ternary:
    backend: Backend
    dtype: torch.dtype

    def norm(
        self, x: Tensor, weight: Tensor | None, eps: float, reader: object
    ) -> QuantizedActivations:
        group = cast(_Prepared, reader).group
        if weight is None:
            return self.backend.quantize(x, group=group)
        return self.backend.rms_norm_quantize(x, weight, eps, group=group)

    def gated_activation(
        self,
        gate_up: Tensor,
        activation: Activation,
        weight: Tensor | None,
        eps: float,
        reader: object,
    ) -> QuantizedActivations:
        group = cast(_Prepared, reader).group
        return self.backend.gated_activation_quantize(gate_up, activation, weight, eps, group=group)

    def linear(self, x: QuantizedActivations, weight: object, residual: Tensor | None) -> Tensor:
        return self.backend.ternary_linear(x, weight, residual, self.dtype)


@dataclass(frozen=True, slots=True)
class _Dense:
    backend: Backend

    def norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        reader: DenseLinear,  # noqa: ARG002
    ) -> Tensor:
        return x if weight is None else self.backend.rms_norm(x, weight, eps)

    def gated_activation(
        self,
        gate_up: Tensor,
        activation: Activation,
        weight: Tensor | None,
        eps: float,
        reader: DenseLinear,
    ) -> Tensor:
        return self.norm(self.backend.gated_activation(gate_up, activation), weight, eps, reader)

    def linear(self, x: Tensor, weight: DenseLinear, residual: Tensor | None) -> Tensor:
        return self.backend.dense_linear(x, weight.weight, weight.bias, residual)


def has_normed_parts(layer: LayerWeights[object]) -> bool:
    """Return whether a linear of the layer is NormedParts."""
    linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return any(isinstance(linear, NormedParts) for linear in linears)


def ternary_head(backend: Backend, x: Tensor, head: TernaryHead[object]) -> Tensor:
    """Return logits [T, vocab_size] float32: a ternary linear's, of x quantized as it reads it."""
    x_quantized = backend.quantize(x, group=cast(_Prepared, head.weight).group)
    return backend.ternary_linear(x_quantized, head.weight, None, torch.float32)


class LayersByOperations:
    """A backend's layers, ternary and dense, as calls of its own operations."""

    def dense_layers(
        self,
        h: Tensor,
        layers: Sequence[LayerWeights[DenseLinear]],
        rope: Tensor,
        kv_caches: Tensor,
        layout: StepLayout,
    ) -> Tensor:
        backend = cast(Backend, self)
        return _run(_Dense(backend), backend, h, layers, rope, kv_caches, layout)

    def prepare_layers(self, layers: Sequence[LayerWeights[object]]) -> object:
        return tuple(layers)

    def ternary_layers(
        self, h: Tensor, layers: object, rope: Tensor, kv_caches: Tensor, layout: StepLayout
    ) -> Tensor:
        assert isinstance(layers, tuple)
        backend = cast(Backend, self)
        return _run(_Ternary(backend, h.dtype), backend, h, layers, rope, kv_caches, layout)
