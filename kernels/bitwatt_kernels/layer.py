"""What a layer computes, operation by operation, ternary or dense.

    h += o(sub_norm(attention(norm(h))))
    h += down(sub_norm(f(gate(norm(h))) · up(norm(h))))

The sub-norms are BitNet's; LLaMA has none. The stream is rounded to its dtype at each addition.
A ternary linear reads its input in int8, quantized with no rounding in between, by the groups of
its scales where a row has several; a dense one reads it in the stream's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from bitwatt_kernels.backend import (
    Activation,
    Backend,
    LayerWeights,
    QuantizedActivations,
    StepLayout,
)

__all__ = ["DenseLayersByOperations", "LayersByOperations"]

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
    for layer, kv_cache in zip(layers, kv_caches, strict=True):
        x = linear.norm(h, layer.input_norm, layer.eps, layer.qkv)
        qkv = linear.linear(x, layer.qkv, None)
        q = backend.rope_and_cache(qkv, rope, kv_cache, layout, layer.num_heads)
        attended = backend.attention(q, kv_cache, layout, layer.attention_scale)
        x = linear.norm(attended, layer.attention_sub_norm, layer.eps, layer.o)
        h = linear.linear(x, layer.o, h)

        x = linear.norm(h, layer.mlp_norm, layer.eps, layer.gate_up)
        gate_up = linear.linear(x, layer.gate_up, None)
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

    def norm(self, x: Tensor, weight: Tensor | None, eps: float, reader: Tensor) -> Tensor:  # noqa: ARG002
        return x if weight is None else self.backend.rms_norm(x, weight, eps)

    def gated_activation(
        self,
        gate_up: Tensor,
        activation: Activation,
        weight: Tensor | None,
        eps: float,
        reader: Tensor,
    ) -> Tensor:
        return self.norm(self.backend.gated_activation(gate_up, activation), weight, eps, reader)

    def linear(self, x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        return self.backend.dense_linear(x, weight, None, residual)


class DenseLayersByOperations:
    """A backend's layers of dense linears as calls of its own operations."""

    def dense_layers(
        self,
        h: Tensor,
        layers: Sequence[LayerWeights[Tensor]],
        rope: Tensor,
        kv_caches: Tensor,
        layout: StepLayout,
    ) -> Tensor:
        backend = cast(Backend, self)
        return _run(_Dense(backend), backend, h, layers, rope, kv_caches, layout)


class LayersByOperations(DenseLayersByOperations):
    """A backend's layers, ternary and dense, as calls of its own operations."""

    def prepare_layers(
        self, layers: Sequence[LayerWeights[object]]
    ) -> tuple[LayerWeights[object], ...]:
        return tuple(layers)

    def ternary_layers(
        self, h: Tensor, layers: object, rope: Tensor, kv_caches: Tensor, layout: StepLayout
    ) -> Tensor:
        assert isinstance(layers, tuple)
        backend = cast(Backend, self)
        return _run(_Ternary(backend, h.dtype), backend, h, layers, rope, kv_caches, layout)
