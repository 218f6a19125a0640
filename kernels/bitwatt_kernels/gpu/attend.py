"""The softmax over a run of paged context, which decode and prefill attention share."""

import triton
import triton.language as tl

__all__ = ["attend", "merge", "store"]


@triton.jit
def merge(maximum, total, weighted, maximum2, total2, weighted2):
    """Return the softmax state of two runs of context; an empty one is (-inf, 0, 0)."""
    top = tl.maximum(maximum, maximum2)
    reference = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2(maximum - reference)
    shrink2 = tl.exp2(maximum2 - reference)
    total = total * shrink + total2 * shrink2
    weighted = weighted * shrink[:, None] + weighted2 * shrink2[:, None]
    return top, total, weighted


@triton.jit
def attend(
    queries,  # [BLOCK_ROWS, DIM_BLOCK]; their codes if INT8
    query_scales,  # [BLOCK_ROWS] float32, read if INT8
    positions,  # [BLOCK_ROWS], last token each row sees
    keys_ptr,  # of this key-value head
    values_ptr,
    key_scales_ptr,  # likewise, read if INT8
    value_scales_ptr,
    table_ptr,  # blocks of this sequence
    block_stride,
    scale,  # of scores in base 2
    start,
    stop,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    INT8: tl.constexpr,
    DTYPE: tl.constexpr,  # of activations
):
    """Return the maximum, sum and weighted values of the softmax over context start to stop."""
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS, DIM_BLOCK], tl.float32)
    d = tl.arange(0, DIM_BLOCK)
    for first in range(start, stop, BLOCK_CONTEXT):
        t = first + tl.arange(0, BLOCK_CONTEXT)
        block = tl.load(table_ptr + t // BLOCK_SIZE, mask=t < stop, other=0).to(tl.int64)
        offsets = block * block_stride + t % BLOCK_SIZE * HEAD_DIM
        if DIM_BLOCK == HEAD_DIM:
            keys_mask = (t < stop)[None, :]
            values_mask = (t < stop)[:, None]
        else:
            keys_mask = (t < stop)[None, :] & (d < HEAD_DIM)[:, None]
            values_mask = (t < stop)[:, None] & (d < HEAD_DIM)[None, :]
        keys = tl.load(keys_ptr + offsets[None, :] + d[:, None], mask=keys_mask, other=0)
        values = tl.load(values_ptr + offsets[:, None] + d[None, :], mask=values_mask, other=0)
        if INT8:
            place = block * (block_stride // 4) + t % BLOCK_SIZE
            key_scales = tl.load(key_scales_ptr + place, mask=t < stop, other=0.0)
            value_scales = tl.load(value_scales_ptr + place, mask=t < stop, other=0.0)
            scores = tl.dot(queries, keys, out_dtype=tl.int32).to(tl.float32)
            scores = scores * (query_scales * scale)[:, None] * key_scales[None, :]
            values = values.to(tl.float32) * value_scales[:, None]
        else:
            scores = tl.dot(queries, keys.to(DTYPE), input_precision=PRECISION) * scale
        scores = tl.where(t[None, :] <= positions[:, None], scores, float("-inf"))
        top = tl.maximum(maximum, tl.max(scores, axis=1))
        reference = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2(maximum - reference)
        weights = tl.exp2(scores - reference[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        weighted = weighted * shrink[:, None]
        weighted = tl.dot(
            weights.to(DTYPE),
            values.to(DTYPE),
            weighted,
            input_precision=PRECISION,
        )
        maximum = top
    return maximum, total, weighted


@triton.jit
def store(out_ptrs, total, weighted, mask):
    """Store what the softmax has weighted, over its sum; an empty one gives zeros."""
    y = tl.div_rn(weighted, tl.where(total == 0.0, 1.0, total)[:, None])
    tl.store(out_ptrs, y.to(out_ptrs.dtype.element_ty), mask=mask)
