"""RMSNorm and quantization of a linear's rows by the linear's own programs, from one queue.

A launch of their own would cost as much as the rows do. Programs take rows until none is left, then
wait until every row is done. Only a program that runs can have taken a row, and it waits for
nothing before the row is done: so the wait ends however few programs run at the same time.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from bitwatt_kernels.backend import Activation, QuantizedActivations
from bitwatt_kernels.gpu.elementwise import activate, check_row_op, empty_quantized, round_to_int8

__all__ = ["MAX_QUEUED_TOKENS", "RawRows", "rows_at_once", "take_rows"]

MAX_QUEUED_TOKENS = 256
"""By arithmetic: of more rows that are wide, or whose readers have few programs, a kernel of their
own costs less, which has more warps."""

_ROW_BLOCK = 1024  # features at once: with more, sums spill on sm_100


def rows_at_once(num_rows: int) -> tuple[int, int]:
    """Return how many rows a program takes at once, and how many features of each it reads at once.

    What a row takes is a few waits, which many rows wait together.
    """
    return (1, _ROW_BLOCK) if num_rows <= MAX_QUEUED_TOKENS else (4, _ROW_BLOCK)


@dataclass(frozen=True, slots=True)
class RawRows:
    """What a linear reads before it is normed and quantized.

    x           [T, in_features]; gate ‖ up, twice as wide, with activation
    norm        [in_features] float32, or None to quantize x as it is
    activation  f of f(gate) · up
    """

    x: Tensor
    norm: Tensor | None
    eps: float
    activation: Activation | None = None

    def empty_quantized(self) -> QuantizedActivations:
        """Return memory for the rows' codes; ShapeError or DtypeError if they can't be read."""
        num_tokens, num_features = self.x.shape
        if self.activation is not None:
            num_features //= 2
        check_row_op(self.x, self.norm, num_features)
        return empty_quantized(num_tokens, num_features, self.x.device, None)


@triton.jit
def _values(
    row_ptrs,
    norm_ptr,
    k,
    num_features,
    factor,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Return features k of rows, gated if GATED, times factor and norm if HAS_NORM."""
    inside = k < num_features
    x = tl.load(row_ptrs + k, mask=inside, other=0).to(tl.float32)
    if GATED:
        up = tl.load(row_ptrs + num_features + k, mask=inside, other=0).to(tl.float32)
        x = activate(x, SILU) * up
    if HAS_NORM:
        x = x * factor * tl.load(norm_ptr + k, mask=inside, other=0).to(tl.float32)
    return x


@triton.jit
def _quantize_rows(
    row,  # [ROWS]
    raw_ptr,
    norm_ptr,
    codes_ptr,
    scales_ptr,
    sums_ptr,
    num_rows,
    num_features,
    eps,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store rows' codes, scales and sums, as rms_norm_kernel or gated_activation_kernel does."""
    # Rows past the last one read that; their results are not stored.
    is_row = row < num_rows
    read = tl.minimum(row, num_rows - 1).to(tl.int64)
    row_ptrs = raw_ptr + (read * (2 * num_features if GATED else num_features))[:, None]
    codes_ptrs = codes_ptr + (read * num_features)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    factor = tl.full([ROWS, 1], 1.0, tl.float32)
    if HAS_NORM:
        squares = tl.zeros([ROWS, BLOCK], tl.float64)
        for first in range(0, num_features, BLOCK):
            x = _values(row_ptrs, norm_ptr, first + i, num_features, factor, GATED, SILU, False)
            wide = x.to(tl.float64)
            squares += wide * wide
        mean_square = (tl.sum(squares, axis=1) / num_features).to(tl.float32)
        factor = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]
    largest = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, num_features, BLOCK):
        y = _values(row_ptrs, norm_ptr, first + i, num_features, factor, GATED, SILU, HAS_NORM)
        largest = tl.maximum(largest, tl.abs(y))
    scale = tl.div_rn(1.0, tl.maximum(tl.max(largest, axis=1), 1e-5)) * 127.0
    sums = tl.zeros([ROWS, BLOCK], tl.int32)
    for first in range(0, num_features, BLOCK):
        k = first + i
        y = _values(row_ptrs, norm_ptr, k, num_features, factor, GATED, SILU, HAS_NORM)
        codes = round_to_int8(y * scale[:, None])
        tl.store(codes_ptrs + k, codes, mask=is_row[:, None] & (k < num_features))
        sums += codes.to(tl.int32)
    tl.store(scales_ptr + read, scale, mask=is_row)
    tl.store(sums_ptr + read, tl.sum(sums, axis=1), mask=is_row)


@triton.jit
def take_rows(
    raw_ptr,  # [num_rows, num_features], or gate ‖ up if GATED
    norm_ptr,  # [num_features] float32
    codes_ptr,  # [num_rows, num_features] int8
    scales_ptr,  # [num_rows] float32
    sums_ptr,  # [num_rows] int32
    queue_ptr,  # [2] int32, turns taken and turns done; zero before and after
    num_rows,
    num_features,
    eps,
    num_programs,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norm and quantize ROWS rows a turn until none is left; return when all are to be read."""
    num_turns = tl.cdiv(num_rows, ROWS)
    taken = tl.atomic_add(queue_ptr, 1, sem="relaxed")
    while taken < num_turns:
        _quantize_rows(
            taken * ROWS + tl.arange(0, ROWS),
            raw_ptr,
            norm_ptr,
            codes_ptr,
            scales_ptr,
            sums_ptr,
            num_rows,
            num_features,
            eps,
            GATED,
            SILU,
            HAS_NORM,
            ROWS,
            BLOCK,
        )
        tl.debug_barrier()  # every thread's codes, before one thread releases them
        tl.atomic_add(queue_ptr + 1, 1, sem="release")
        taken = tl.atomic_add(queue_ptr, 1, sem="relaxed")
    # Each program asks in vain once. Who does so last of all sets the count back.
    if taken == num_turns + num_programs - 1:
        tl.store(queue_ptr, 0)
    done = tl.atomic_add(queue_ptr + 1, 0, sem="acquire")
    while done < num_turns:
        done = tl.atomic_add(queue_ptr + 1, 0, sem="acquire")
    # What has passed counts on, so that those behind still find the rows done.
    passed = tl.atomic_add(queue_ptr + 1, 1, sem="relaxed")
    if passed == num_turns + num_programs - 1:
        tl.store(queue_ptr + 1, 0)
