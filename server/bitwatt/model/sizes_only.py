"""A backend that holds no weights, for building a model without its memory."""

from collections.abc import Sequence
from typing import Literal

import torch
from bitwatt_kernels.backend import LayerWeights, TernaryHead
from bitwatt_kernels.cpu.abi import DENSE_COLUMNS_PER_LINE
from bitwatt_kernels.cpu.prepared import padded_rows
from bitwatt_kernels.packing import TernaryWeight
from torch import Tensor

__all__ = ["SizesOnly"]

_INT8_COLUMNS_PER_LINE = 4


class SizesOnly:
    """What building asks of a Backend: it prepares nothing, and knows the bytes that would take.

    Built on it, a model asks its source for every tensor once, by name and shape, and holds none.

    name  the backend whose bytes it knows
    """

    batch_invariant = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = torch.device("meta")
        self._is_native = name == "native"

    def prepare_ternary(self, weight: TernaryWeight) -> int:
        num_codes = self._rows(weight.out_features) * weight.in_features
        scale_bytes = weight.scales.nbytes // weight.out_features * self._rows(weight.out_features)
        bias_bytes = 0 if weight.bias is None else 4 * self._rows(weight.out_features)
        return (num_codes if self.name == "torch" else num_codes // 4) + scale_bytes + bias_bytes

    def prepare_head(self, weight: Tensor, *, bits: Literal[8, 16] = 16) -> int:
        rows, columns = self._rows(weight.shape[0]), weight.shape[1]
        line = _INT8_COLUMNS_PER_LINE if bits == 8 else DENSE_COLUMNS_PER_LINE[weight.dtype]
        if self._is_native:
            columns += -columns % line
        return rows * columns + 4 * rows if bits == 8 else rows * columns * weight.element_size()

    def prepare_dense(self, weight: Tensor) -> int:
        return self.prepare_head(weight)

    def prepare_layers(self, layers: Sequence[LayerWeights[object]]) -> object:
        return layers

    def nbytes(self, prepared: object) -> int:
        if isinstance(prepared, Tensor):
            return prepared.nbytes
        if isinstance(prepared, TernaryHead):
            return self.nbytes(prepared.weight)
        assert isinstance(prepared, int)
        return prepared

    def _rows(self, count: int) -> int:
        return padded_rows(count) if self._is_native else count
