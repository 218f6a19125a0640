"""Weights as the native kernels read them; layouts in csrc/coded_linear.h and csrc/dense.h."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwatt_kernels.cpu.abi import DENSE_COLUMNS_PER_LINE, ROW_BLOCK_ROWS

__all__ = ["PreparedDense", "PreparedInt8Head", "PreparedTernary", "padded_rows"]


def padded_rows(num_rows: int) -> int:
    """Return the rows that num_rows take in whole row blocks."""
    return -(-num_rows // ROW_BLOCK_ROWS) * ROW_BLOCK_ROWS


@dataclass(frozen=True, slots=True)
class PreparedTernary:
    """A ternary matrix in row blocks, two bits a weight.

    blocks  [rows / 32 · in_features / 16 · 128] uint8, 64-byte aligned; rows padded to whole blocks
    scales  [rows / 32, groups, 32] float32, or float16 of several groups; zeros past out_features
    bias    [rows] float32, or None
    group   columns that share a row's scale, or None for all of them
    """

    blocks: Tensor
    scales: Tensor
    bias: Tensor | None
    out_features: int
    in_features: int
    group: int | None

    @property
    def nbytes(self) -> int:
        bias_bytes = 0 if self.bias is None else self.bias.nbytes
        return self.blocks.nbytes + self.scales.nbytes + bias_bytes


@dataclass(frozen=True, slots=True)
class PreparedDense:
    """A dense matrix in its own dtype, an embedding too: row blocks of 32, column by column.

    blocks  [bytes] uint8, 64-byte aligned: [rows / 32][lines][32][columns_per_line] of dtype
    """

    blocks: Tensor
    dtype: torch.dtype
    out_features: int
    in_features: int

    @property
    def columns_per_line(self) -> int:
        return DENSE_COLUMNS_PER_LINE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


@dataclass(frozen=True, slots=True)
class PreparedInt8Head:
    """A head rounded to int8: W[n, k] ≈ (codes[n, k] - 128) · scales[n].

    blocks   [rows / 32 · columns / 4 · 128] uint8 codes, 64-byte aligned
    scales   [rows] float32
    dtype    of the matrix that was rounded, and of its rows as embeddings
    columns  hidden_size, padded to whole lines
    """

    blocks: Tensor
    scales: Tensor
    dtype: torch.dtype
    vocab_size: int
    hidden_size: int
    columns: int

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.scales.nbytes
