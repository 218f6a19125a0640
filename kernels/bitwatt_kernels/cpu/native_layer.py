"""Ternary layers' weights and a step's layout, as csrc/layer.h reads them."""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitwatt_kernels.backend import Activation, LayerWeights, StepLayout
from bitwatt_kernels.cpu.prepared import PreparedTernary
from bitwatt_kernels.errors import DtypeError, ShapeError

__all__ = ["ACTIVATIONS", "CacheView", "NativeLayers", "RopeTable", "Step"]

ACTIVATIONS: dict[Activation, int] = {"relu2": 0, "silu": 1}  # as in csrc/calls.h


class _Matrix(ctypes.Structure):
    _fields_: ClassVar = [
        ("blocks", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("N", c_int),
        ("K", c_int),
    ]

    @classmethod
    def of(cls, weight: object) -> "_Matrix":
        assert isinstance(weight, PreparedTernary)
        bias = None if weight.bias is None else weight.bias.data_ptr()
        return cls(
            weight.blocks.data_ptr(),
            weight.scales.data_ptr(),
            bias,
            weight.out_features,
            weight.in_features,
        )


class _Layer(ctypes.Structure):
    _fields_: ClassVar = [
        ("qkv", _Matrix),
        ("o", _Matrix),
        ("gate_up", _Matrix),
        ("down", _Matrix),
        ("input_norm", c_void_p),
        ("attention_sub_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("mlp_sub_norm", c_void_p),
        ("num_heads", c_int),
        ("num_groups", c_int),
        ("head_dim", c_int),
        ("activation", c_int),
        ("eps", c_float),
        ("attention_scale", c_float),
    ]


class Step(ctypes.Structure):
    """A StepLayout's pointers: valid as long as its tensors are."""

    _fields_: ClassVar = [
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("num_tokens", c_int),
        ("num_sequences", c_int),
        ("max_blocks", c_int),
    ]

    @classmethod
    def of(cls, layout: StepLayout) -> "Step":
        return cls(
            layout.positions.data_ptr(),
            layout.slots.data_ptr(),
            layout.query_starts.data_ptr(),
            layout.context_lens.data_ptr(),
            layout.block_tables.data_ptr(),
            layout.positions.shape[0],
            layout.context_lens.shape[0],
            layout.block_tables.shape[1],
        )


class CacheView(ctypes.Structure):
    _fields_: ClassVar = [("data", c_void_p), ("num_blocks", c_int64), ("dtype", c_int)]


class RopeTable(ctypes.Structure):
    _fields_: ClassVar = [("rows", c_void_p), ("num_rows", c_int64)]


@dataclass(frozen=True, slots=True)
class NativeLayers:
    """A model's layers, of one shape: weights, kept alive, and structures that point at them."""

    weights: tuple[LayerWeights[object], ...]
    layers: "ctypes.Array[_Layer]"

    @classmethod
    def of(cls, weights: Sequence[LayerWeights[object]]) -> "NativeLayers":
        """Raises ShapeError or DtypeError where the parts don't fit each other."""
        layers = [_layer(layer) for layer in weights]
        shapes = {(layer.qkv.K, layer.num_groups, layer.head_dim) for layer in layers}
        if len(shapes) != 1:
            raise ShapeError(f"layers of several shapes: {sorted(shapes)}")
        return cls(tuple(weights), (_Layer * len(layers))(*layers))

    @property
    def hidden_size(self) -> int:
        return int(self.layers[0].qkv.K)

    @property
    def num_groups(self) -> int:
        return int(self.layers[0].num_groups)

    @property
    def head_dim(self) -> int:
        return int(self.layers[0].head_dim)


def _layer(weights: LayerWeights[object]) -> _Layer:
    qkv, o, gate_up, down = (
        _Matrix.of(w) for w in (weights.qkv, weights.o, weights.gate_up, weights.down)
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
    return _Layer(
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
    )


def _norm(weight: Tensor | None, width: int) -> int | None:
    if weight is None:
        return None
    if weight.dtype != torch.float32:
        raise DtypeError(f"a layer's norms are float32, not {weight.dtype}")
    if weight.shape != (width,) or not weight.is_contiguous():
        raise ShapeError(f"weight has shape {list(weight.shape)}; expected [{width}]")
    return weight.data_ptr()
