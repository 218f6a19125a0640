"""Makes the kernels' row blocks of weights, once, at load; reads a head's rows as embeddings."""

import ctypes
from typing import Literal

import torch
from torch import Tensor

from bitwatt_kernels.cpu.abi import DENSE_COLUMNS_PER_LINE, DTYPES, ROW_BLOCK_ROWS
from bitwatt_kernels.cpu.library import check, dtype_of
from bitwatt_kernels.cpu.prepared import (
    PreparedDense,
    PreparedInt8Head,
    PreparedTernary,
    padded_rows,
)
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.packing import IN_FEATURES_MULTIPLE, TernaryWeight
from bitwatt_kernels.reference.head import quantize_head

__all__ = ["RowBlocks"]

_ALIGNMENT = 64
# Weights lie side by side in areas of so many bytes, from a huge page's start: one by one, matrices
# of a few MB would mostly lie in small pages, and a step that reads them all wait for the TLB.
_AREA_BYTES = 64 << 20
_HUGE_PAGE_BYTES = 2 << 20
_INT8_COLUMNS_PER_LINE = 4
_INT8_HEAD_ROWS = 8192  # rounded at once: float32 of a whole vocabulary would take gigabytes


class RowBlocks:
    """Makes and reads row blocks on the threads of a backend's context.

    The context is borrowed: it is the backend's to destroy, and so this is not to be used after
    the backend is gone.
    """

    def __init__(self, library: ctypes.CDLL, context: ctypes.c_void_p) -> None:
        self._library = library
        self._context = context
        self._free = torch.empty(0, dtype=torch.uint8)  # what is left of the last area

    def ternary(self, weight: TernaryWeight) -> PreparedTernary:
        """Return the weight repacked into row blocks: two bits a weight, and the only copy kept.

        weight.codes may lie in a mapped file; its pages are read once.
        """
        N, K = weight.out_features, weight.in_features
        if K == 0 or K % IN_FEATURES_MULTIPLE:
            raise ShapeError(
                f"in_features is {K}; the kernels take multiples of {IN_FEATURES_MULTIPLE}"
            )
        rows = padded_rows(N)
        blocks = self.allocate(rows * K // 4)
        codes = weight.codes.contiguous()
        check(self._library.bw_repack(self._context, codes.data_ptr(), blocks.data_ptr(), N, K))
        bias = None if weight.bias is None else _padded(weight.bias, rows)
        scales = _padded(weight.scales.view(N, -1), rows)
        scales = self._placed(scales.view(-1, ROW_BLOCK_ROWS, scales.shape[1]).transpose(1, 2))
        return PreparedTernary(blocks, scales, bias, N, K, weight.group)

    def head(
        self, weight: Tensor, *, bits: Literal[8, 16] = 16
    ) -> PreparedDense | PreparedInt8Head:
        """Return the head in row blocks; a tied embedding's rows are read from them too."""
        dtype_of(weight)
        return self._int8_head(weight) if bits == 8 else self.dense(weight)

    def dense(self, weight: Tensor) -> PreparedDense:
        """Return [out_features, in_features] in row blocks, in its own dtype."""
        dtype_of(weight)
        columns_per_line = DENSE_COLUMNS_PER_LINE[weight.dtype]
        N, K = weight.shape
        columns = _padded_to(K, columns_per_line)
        blocks = self.allocate(padded_rows(N) * columns * weight.element_size())
        self._block_rows(weight, blocks, columns_per_line)
        return PreparedDense(blocks, weight.dtype, N, K)

    def _int8_head(self, weight: Tensor) -> PreparedInt8Head:
        vocab_size, hidden = weight.shape
        columns = _padded_to(hidden, _INT8_COLUMNS_PER_LINE)
        rows = padded_rows(vocab_size)
        blocks, scales = self.allocate(rows * columns), torch.zeros(rows)
        for first in range(0, vocab_size, _INT8_HEAD_ROWS):
            head = quantize_head(weight[first : first + _INT8_HEAD_ROWS])
            codes = head.codes.view(torch.uint8).bitwise_xor_(0x80)
            self._block_rows(codes, blocks[first * columns :], _INT8_COLUMNS_PER_LINE)
            scales[first : first + len(head.scales)] = head.scales
        return PreparedInt8Head(blocks, scales, weight.dtype, vocab_size, hidden, columns)

    def _block_rows(self, matrix: Tensor, blocks: Tensor, columns_per_line: int) -> None:
        matrix = matrix.contiguous()
        check(
            self._library.bw_block_rows(
                self._context,
                matrix.data_ptr(),
                blocks.data_ptr(),
                *matrix.shape,
                matrix.element_size(),
                columns_per_line,
            )
        )

    def embed(self, token_ids: Tensor, embedding: PreparedDense | PreparedInt8Head) -> Tensor:
        """Return rows of what head() made, [T, hidden_size] in the dtype it was made of."""
        if isinstance(embedding, PreparedDense):
            shape = (embedding.out_features, embedding.in_features)
            return self._gather(
                token_ids, embedding.blocks, embedding.dtype, shape, embedding.columns_per_line
            )
        shape = (embedding.vocab_size, embedding.columns)
        codes = self._gather(
            token_ids, embedding.blocks, torch.uint8, shape, _INT8_COLUMNS_PER_LINE
        )
        rows = codes[:, : embedding.hidden_size].float() - 128
        return rows.mul_(embedding.scales[token_ids, None]).to(embedding.dtype)

    def ternary_rows(
        self, token_ids: Tensor, weight: PreparedTernary, dtype: torch.dtype
    ) -> Tensor:
        """Return rows of what ternary() made, [T, in_features] of dtype: code · scale, rounded."""
        token_ids = token_ids.contiguous()
        out = torch.empty(len(token_ids), weight.in_features, dtype=dtype)
        check(
            self._library.bw_ternary_rows(
                self._context,
                token_ids.data_ptr(),
                weight.blocks.data_ptr(),
                weight.scales.data_ptr(),
                out.data_ptr(),
                DTYPES[dtype],
                len(token_ids),
                weight.out_features,
                weight.in_features,
                weight.group or weight.in_features,
                DTYPES[weight.scales.dtype],
            )
        )
        return out

    def _gather(
        self,
        token_ids: Tensor,
        blocks: Tensor,
        dtype: torch.dtype,
        shape: tuple[int, int],
        columns_per_line: int,
    ) -> Tensor:
        """Return rows of a matrix of shape that _block_rows blocked, [T, columns] of dtype."""
        token_ids = token_ids.contiguous()
        out = torch.empty(len(token_ids), shape[1], dtype=dtype)
        check(
            self._library.bw_embed(
                self._context,
                token_ids.data_ptr(),
                blocks.data_ptr(),
                out.data_ptr(),
                len(token_ids),
                *shape,
                out.element_size(),
                columns_per_line,
            )
        )
        return out

    def allocate(self, num_bytes: int) -> Tensor:
        """Return [num_bytes] uint8, aligned to a vector, in huge pages where there are any.

        It is part of an area, which is freed with the last of its parts.
        """
        if num_bytes >= _AREA_BYTES:
            return self.area(num_bytes)
        num_taken = _padded_to(num_bytes, _ALIGNMENT)
        if num_taken > len(self._free):
            self._free = self.area(_AREA_BYTES)
        part, self._free = self._free[:num_bytes], self._free[num_taken:]
        return part

    def _placed(self, values: Tensor) -> Tensor:
        """Return the values as they are, in memory of allocate."""
        placed = self.allocate(values.nbytes).view(values.dtype).view(values.shape)
        return placed.copy_(values)

    def area(self, num_bytes: int) -> Tensor:
        """Return [num_bytes] uint8 of its own from a huge page's start, none of it touched yet."""
        with torch.inference_mode(False):  # parts of it are written later, in either mode
            buffer = torch.empty(num_bytes + _HUGE_PAGE_BYTES, dtype=torch.uint8)
        start = -buffer.data_ptr() % _HUGE_PAGE_BYTES
        # The advice takes whole pages alone: past the end it is of memory that stays untouched.
        self._library.bw_advise_huge_pages(buffer[start:].data_ptr(), len(buffer) - start)
        return buffer[start : start + num_bytes]


def _padded_to(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _padded(values: Tensor, num_rows: int) -> Tensor:
    padded = torch.zeros(num_rows, *values.shape[1:], dtype=values.dtype)
    padded[: len(values)] = values
    return padded
