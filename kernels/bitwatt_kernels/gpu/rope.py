"""rope_and_cache in Triton: norm and rotate queries and keys, write keys and values.

One program a token. Norms sum squares in float64, so that the order of the sum doesn't show.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwatt_kernels.backend import BLOCK_SIZE, HeadNorms, StepLayout
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.kv_codes import cache_parts, quantize_heads

__all__ = ["cache_token", "rope_and_cache", "rope_and_cache_kernel", "rotated"]


@triton.jit
def _rotate(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rotated(heads_ptr, d, mask, rope_ptr, position, HEAD_DIM: tl.constexpr):
    """Return heads rotated to a position, in float32, [.., DIM_BLOCK].

    heads_ptr  where each begins, [.., 1]
    d          [1, DIM_BLOCK]
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    is_first = d < HALF
    i = tl.where(is_first, d, d - HALF)
    cos = tl.load(rope_ptr + position * HEAD_DIM + i, mask=d < HEAD_DIM, other=0)
    sin = tl.load(rope_ptr + position * HEAD_DIM + HALF + i, mask=d < HEAD_DIM, other=0)
    x = tl.load(heads_ptr + d, mask=mask, other=0).to(tl.float32)
    other = tl.load(heads_ptr + tl.where(is_first, d + HALF, i), mask=mask, other=0).to(tl.float32)
    return tl.where(is_first, x * cos - other * sin, x * cos + other * sin)


@triton.jit
def cache_token(
    key_ptr,  # of one head
    value_ptr,
    keys_ptr,  # of the cache's same head
    values_ptr,
    key_scales_ptr,  # likewise, written if INT8
    value_scales_ptr,
    rope_ptr,
    position,
    slot,
    block_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    INT8: tl.constexpr,
):
    """Write one head's rotated key and its value to the cache; nothing for a slot of -1."""
    d = tl.arange(0, DIM_BLOCK)[None, :]
    mask = (d < HEAD_DIM) & (slot >= 0)
    none = tl.zeros([1, 1], tl.int32)
    key = rotated(key_ptr + none, d, mask, rope_ptr, position, HEAD_DIM)
    value = tl.load(value_ptr + d, mask=mask, other=0)
    place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * HEAD_DIM + d
    if INT8:
        key, key_scale = quantize_heads(key)
        value, value_scale = quantize_heads(value.to(tl.float32))
        of_slot = slot // BLOCK_SIZE * (block_stride // 4) + slot % BLOCK_SIZE
        of_slot += tl.zeros([1], tl.int32)
        tl.store(key_scales_ptr + of_slot, key_scale, mask=of_slot >= 0)
        tl.store(value_scales_ptr + of_slot, value_scale, mask=of_slot >= 0)
    tl.store(keys_ptr + place, key.to(keys_ptr.dtype.element_ty), mask=mask)
    tl.store(values_ptr + place, value.to(values_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm(first, second, weight_ptr, i, eps, HALF: tl.constexpr):
    """Return the halves of heads, each head normed by the weight."""
    wide_first, wide_second = first.to(tl.float64), second.to(tl.float64)
    squares = tl.sum(wide_first * wide_first + wide_second * wide_second, axis=1)
    mean_square = (squares / (2 * HALF)).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]
    in_half = i < HALF
    weight = tl.load(weight_ptr + i, mask=in_half, other=0)[None, :]
    second_weight = tl.load(weight_ptr + HALF + i, mask=in_half, other=0)[None, :]
    return first * inverse * weight, second * inverse * second_weight


@triton.jit
def _quantize_halves(first, second, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Return the halves of heads as codes, and each head's scale, [HEADS]."""
    both = tl.reshape(tl.join(first, second), [HEADS, 2 * HALF])
    codes, scales = quantize_heads(both)
    first, second = tl.split(tl.reshape(codes, [HEADS, HALF, 2]))
    return first, second, scales


@triton.jit
def rope_and_cache_kernel(
    qkv_ptr,  # [tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM]
    rope_ptr,  # [max_model_len, HEAD_DIM] float32, cos ‖ sin
    positions_ptr,  # [tokens] int64
    slots_ptr,  # [tokens] int64
    queries_ptr,  # [tokens, NUM_HEADS, HEAD_DIM]
    keys_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    values_ptr,  # likewise; of int8 as kv_codes lays it out
    key_scales_ptr,  # written if INT8
    value_scales_ptr,
    query_norm_ptr,  # [HEAD_DIM] float32, read if NORM
    key_norm_ptr,  # likewise
    block_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    KV_HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    INT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """(a, b) ← (a · cos − b · sin, b · cos + a · sin) for the halves a, b of each head.

    Grid (tokens,). A slot of -1 writes nothing to the cache.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, HALF_BLOCK)
    in_half = i < HALF
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    position = tl.load(positions_ptr + token)
    cos = tl.load(rope_ptr + position * HEAD_DIM + i, mask=in_half, other=0)[None, :]
    sin = tl.load(rope_ptr + position * HEAD_DIM + HALF + i, mask=in_half, other=0)[None, :]
    start = qkv_ptr + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)

    heads = tl.arange(0, HEADS_BLOCK)
    offsets = heads[:, None] * HEAD_DIM + i[None, :]
    inside = (heads < NUM_HEADS)[:, None] & in_half[None, :]
    first = tl.load(start + offsets, mask=inside, other=0).to(tl.float32)
    second = tl.load(start + offsets + HALF, mask=inside, other=0).to(tl.float32)
    if NORM:
        first, second = _norm(first, second, query_norm_ptr, i, eps, HALF)
    first, second = _rotate(first, second, cos, sin)
    out = queries_ptr + token * (NUM_HEADS * HEAD_DIM) + offsets
    tl.store(out, first.to(queries_ptr.dtype.element_ty), mask=inside)
    tl.store(out + HALF, second.to(queries_ptr.dtype.element_ty), mask=inside)

    slot = tl.load(slots_ptr + token)
    kv_heads = tl.arange(0, KV_HEADS_BLOCK)
    offsets = kv_heads[:, None] * HEAD_DIM + i[None, :]
    inside = (kv_heads < NUM_KV_HEADS)[:, None] & in_half[None, :] & (slot >= 0)
    keys = start + NUM_HEADS * HEAD_DIM + offsets
    first = tl.load(keys, mask=inside, other=0).to(tl.float32)
    second = tl.load(keys + HALF, mask=inside, other=0).to(tl.float32)
    if NORM:
        first, second = _norm(first, second, key_norm_ptr, i, eps, HALF)
    first, second = _rotate(first, second, cos, sin)
    HEAD_STRIDE: tl.constexpr = BLOCK_SIZE * (HEAD_DIM + 4 if INT8 else HEAD_DIM)
    place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * HEAD_DIM
    cached = place + kv_heads[:, None] * HEAD_STRIDE + i[None, :]
    scaled = slot // BLOCK_SIZE * (block_stride // 4) + slot % BLOCK_SIZE
    scaled += kv_heads * (HEAD_STRIDE // 4)
    is_written = (kv_heads < NUM_KV_HEADS) & (slot >= 0)
    dtype = keys_ptr.dtype.element_ty
    if INT8:
        first, second, scales = _quantize_halves(first, second, KV_HEADS_BLOCK, HALF_BLOCK)
        tl.store(key_scales_ptr + scaled, scales, mask=is_written)
    tl.store(keys_ptr + cached, first.to(dtype), mask=inside)
    tl.store(keys_ptr + cached + HALF, second.to(dtype), mask=inside)
    values = keys + NUM_KV_HEADS * HEAD_DIM
    first = tl.load(values, mask=inside, other=0)
    second = tl.load(values + HALF, mask=inside, other=0)
    if INT8:
        first, second, scales = _quantize_halves(
            first.to(tl.float32), second.to(tl.float32), KV_HEADS_BLOCK, HALF_BLOCK
        )
        tl.store(value_scales_ptr + scaled, scales, mask=is_written)
    tl.store(values_ptr + cached, first.to(dtype), mask=inside)
    tl.store(values_ptr + cached + HALF, second.to(dtype), mask=inside)


def rope_and_cache(
    qkv: Tensor,
    rope: Tensor,
    kv_cache: Tensor,
    layout: StepLayout,
    num_heads: int,
    gpu: Gpu,
    head_norms: HeadNorms | None = None,
) -> Tensor:
    """Rotate queries and keys, write keys and values to the cache, return queries [T, H, D].

    Tokens whose slot is -1 are padding and write nothing. Shapes as in Backend.rope_and_cache.
    Raises  ShapeError if qkv does not have the features of the heads and the cache
    Source  arXiv:2104.09864, with the pairs (i, i + D / 2)
    """
    cache = cache_parts(kv_cache)
    num_tokens = qkv.shape[0]
    num_kv_heads, head_dim = cache.num_kv_heads, cache.head_dim
    if qkv.shape[1] != (num_heads + 2 * num_kv_heads) * head_dim or not qkv.is_contiguous():
        raise ShapeError(
            f"qkv has shape {list(qkv.shape)}; expected contiguous [T, "
            f"({num_heads} + 2 · {num_kv_heads}) · {head_dim}]"
        )
    queries = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        rope_and_cache_kernel[(num_tokens,)](
            qkv,
            rope,
            layout.positions,
            layout.slots,
            queries,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            rope if head_norms is None else head_norms.queries,
            rope if head_norms is None else head_norms.keys,
            cache.block_stride,
            0.0 if head_norms is None else head_norms.eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=BLOCK_SIZE,
            HEADS_BLOCK=triton.next_power_of_2(num_heads),
            KV_HEADS_BLOCK=triton.next_power_of_2(num_kv_heads),
            HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
            NORM=head_norms is not None,
            INT8=cache.is_int8,
            PDL=gpu.pdl,
            **gpu.launch_options(4),
        )
    return queries
