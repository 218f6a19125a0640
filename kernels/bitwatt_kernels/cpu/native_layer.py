"""Ternary layers' weights and a step's layout, as csrc/layer.h reads them."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwatt_kernels.backend import HeadNorms, LayerWeights, StepLayout
from bitwatt_kernels.cpu.abi import ACTIVATIONS, DTYPES, Layer, Matrix, StepCall
from bitwatt_kernels.cpu.prepared import PreparedTernary
from bitwatt_kernels.errors import DtypeError, ShapeError

__all__ = ["NativeLayers", "head_norm_pointers", "step_call"]


@dataclass(frozen=True, slots=True)
class NativeLayers:
    """A model's layers, of one shape: weights, kept alive, and structures that point at them."""

    weights: tuple[LayerWeights[object], ...]
    layers: "ctypes.Array[Layer]"

    @classmethod
    def of(cls, weights: Sequence[LayerWeights[object]]) -> "NativeLayers":
        """Raises ShapeError or DtypeError where the parts don't fit each other."""
        layers = [_layer(layer) for layer in weights]
        shapes = {(layer.qkv.K, layer.G, layer.D) for layer in layers}
        if len(shapes) != 1:
            raise ShapeError(f"layers of several shapes: {sorted(shapes)}")
        return cls(tuple(weights), (Layer * len(layers))(*layers))

    @property
    def hidden_size(self) -> int:
        return int(self.layers[0].qkv.K)

    @property
    def num_groups(self) -> int:
        return int(self.layers[0].G)

    @property
    def head_dim(self) -> int:
        return int(self.layers[0].D)


def step_call(layout: StepLayout) -> StepCall:
    """Return the layout as the kernels read it: valid as long as its tensors are."""
    return StepCall(
        layout.positions.data_ptr(),
        layout.slots.data_ptr(),
        layout.query_starts.data_ptr(),
        layout.context_lens.data_ptr(),
        layout.block_tables.data_ptr(),
        layout.positions.shape[0],
        layout.context_lens.shape[0],
        layout.block_tables.shape[1],
    )


def _layer(weights: LayerWeights[object]) -> Layer:
    qkv, o, gate_up, down = (
        _matrix(w) for w in (weights.qkv, weights.o, weights.gate_up, weights.down)
    )
    head_dim = o.K // weights.num_heads
    num_groups = (qkv.N - o.K) // (2 * head_dim)
    hidden = qkv.K
    qkv_width = (weights.num_heads + 2 * num_groups) * head_dim
    widths = (o.N, gate_up.K, down.N, 2 * down.K, qkv_width)
    if widths != (hidden, hidden, hidden, gate_up.N, qkv.N):
        raise ShapeError(
            f"linears of shapes {[[m.N, m.K] for m in (qkv, o, gate_up, down)]} "
            f"don't make a layer of {weights.num_heads} heads"
        )
    return Layer(
        qkv,
        o,
        gate_up,
        down,
        _norm(weights.input_norm, hidden),
        _norm(weights.attention_sub_norm, o.K),
        _norm(weights.mlp_norm, hidden),
        _norm(weights.mlp_sub_norm, down.K),
        weights.num_heads,
        num_groups,
        head_dim,
        ACTIVATIONS[weights.activation],
        weights.eps,
        weights.attention_scale,
        *head_norm_pointers(weights.head_norms, head_dim),
        0.0 if weights.head_norms is None else weights.head_norms.eps,
    )


def head_norm_pointers(norms: HeadNorms | None, head_dim: int) -> tuple[int | None, int | None]:
    """Return where the weights of queries and keys lie; raises as NativeLayers.of does."""
    if norms is None:
        return None, None
    return _norm(norms.queries, head_dim), _norm(norms.keys, head_dim)


def _matrix(weight: object) -> Matrix:
    assert isinstance(weight, PreparedTernary)
    return Matrix(
        weight.blocks.data_ptr(),
        weight.scales.data_ptr(),
        None if weight.bias is None else weight.bias.data_ptr(),
        weight.out_features,
        weight.in_features,
        weight.group or weight.in_features,
        DTYPES[weight.scales.dtype],
    )


def _norm(weight: Tensor | None, width: int) -> int | None:
    if weight is None:
        return None
    if weight.dtype != torch.float32:
        raise DtypeError(f"a layer's norms are float32, not {weight.dtype}")
    if weight.shape != (width,) or not weight.is_contiguous():
        raise ShapeError(f"weight has shape {list(weight.shape)}; expected [{width}]")
    return weight.data_ptr()
