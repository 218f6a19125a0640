"""Paged attention in Triton: split over the context to decode, chunked to prefill.

A context is cut into splits of a fixed number of tokens. Each is reduced from nothing to a
maximum, a sum of exponentials and a weighted sum of values, and these are merged first to last.
Decode spreads the splits over programs; prefill walks them in one. Both run the same
tiles through the same code, so a token's result depends on its own context alone: not on the
batch, not on the way its prompt was chunked.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.gpu.attend import attend, merge, store
from bitwatt_kernels.gpu.configs import AttentionConfig
from bitwatt_kernels.gpu.device import MAX_SPLIT_TILES, Gpu
from bitwatt_kernels.gpu.kv_codes import CacheParts, cache_parts, quantize_heads
from bitwatt_kernels.gpu.rope import cache_token, rotated

__all__ = [
    "attention",
    "decode_attention_kernel",
    "decode_splits",
    "prefill_attention_kernel",
    "rotated_attention",
]

# Programs that decode aims at for each multiprocessor.
PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _merge_splits(
    partial_ptr,  # [num_splits, GROUP, DIM_BLOCK], and so on: of one sequence and head
    partial_max_ptr,
    partial_sum_ptr,
    num_splits,
    tile,  # of a split's, [BLOCK_ROWS, DIM_BLOCK]
    row,  # [BLOCK_ROWS]
    GROUP: tl.constexpr,
):
    """Return the sum and weighted values of the softmax over all splits, merged first to last."""
    maximum = tl.full([tile.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([tile.shape[0]], tl.float32)
    weighted = tl.zeros([tile.shape[0], tile.shape[1]], tl.float32)
    in_group = row < GROUP
    for i in tl.range(0, num_splits, loop_unroll_factor=4):
        other = i * GROUP
        maximum2 = tl.load(
            partial_max_ptr + other + row,
            mask=in_group,
            other=float("-inf"),
            cache_modifier=".cg",
        )
        total2 = tl.load(
            partial_sum_ptr + other + row, mask=in_group, other=0.0, cache_modifier=".cg"
        )
        weighted2 = tl.load(
            partial_ptr + other * tile.shape[1] + tile,
            mask=in_group[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
        maximum, total, weighted = merge(maximum, total, weighted, maximum2, total2, weighted2)
    return total, weighted


@triton.jit
def decode_splits(
    program,
    num_programs,
    kv_head,
    num_kv_heads,
    sequence,
    queries_ptr,  # this and the rest as decode_attention_kernel's
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    query_starts_ptr,
    context_lens_ptr,
    tables_ptr,
    out_ptr,
    partial_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    counters_ptr,
    rope_ptr,
    positions_ptr,
    slots_ptr,
    block_stride,
    table_stride,
    scale,
    max_splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    ROPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Reduce a program's splits of one sequence and head; the last program to arrive merges all."""
    context = tl.load(context_lens_ptr + sequence)
    token = tl.load(query_starts_ptr + sequence).to(tl.int64)
    has_token = tl.load(query_starts_ptr + sequence + 1) > token
    num_splits = tl.maximum(tl.cdiv(context, SPLIT_TOKENS), 1)
    if (program < num_splits) & has_token:
        row = tl.arange(0, BLOCK_ROWS)
        d = tl.arange(0, DIM_BLOCK)
        inside = (row < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        base = (token * num_kv_heads + kv_head) * (GROUP * HEAD_DIM)
        in_tile = row[:, None] * HEAD_DIM + d[None, :]
        positions = tl.zeros([BLOCK_ROWS], tl.int32) + (context - 1)
        HEAD_STRIDE: tl.constexpr = BLOCK_SIZE * (HEAD_DIM + 4 if INT8 else HEAD_DIM)
        keys = keys_ptr + kv_head * HEAD_STRIDE
        values = values_ptr + kv_head * HEAD_STRIDE
        key_scales = key_scales_ptr + kv_head * (HEAD_STRIDE // 4)
        value_scales = value_scales_ptr + kv_head * (HEAD_STRIDE // 4)
        if ROPE:
            start = queries_ptr + token * (num_kv_heads * (GROUP + 2) * HEAD_DIM)
            heads = start + kv_head * (GROUP * HEAD_DIM) + row[:, None] * HEAD_DIM
            position = tl.load(positions_ptr + token)
            queries = rotated(heads, d[None, :], inside, rope_ptr, position, HEAD_DIM)
            queries = queries.to(queries_ptr.dtype.element_ty)
            # Only the program that takes the context's end reads the token's own key.
            if program == (num_splits - 1) % num_programs:
                own = start + num_kv_heads * (GROUP * HEAD_DIM) + kv_head * HEAD_DIM
                cache_token(
                    own,
                    own + num_kv_heads * HEAD_DIM,
                    keys,
                    values,
                    key_scales,
                    value_scales,
                    rope_ptr,
                    position,
                    tl.load(slots_ptr + token),
                    block_stride,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    DIM_BLOCK,
                    INT8,
                )
            tl.debug_barrier()  # every thread's part of the key, before others read it
        else:
            queries = tl.load(queries_ptr + base + in_tile, mask=inside, other=0)
        query_scales = positions
        if INT8:
            queries, query_scales = quantize_heads(queries.to(tl.float32))
        table = tables_ptr + sequence.to(tl.int64) * table_stride
        if IS_SPLIT:
            pair = sequence * num_kv_heads + kv_head
            first = pair.to(tl.int64) * max_splits * GROUP
            partial_ptr += first * DIM_BLOCK
            partial_max_ptr += first
            partial_sum_ptr += first
            tile = row[:, None] * DIM_BLOCK + d[None, :]
            for split in range(program, num_splits, num_programs):
                maximum2, total2, weighted2 = attend(
                    queries,
                    query_scales,
                    positions,
                    keys,
                    values,
                    key_scales,
                    value_scales,
                    table,
                    block_stride,
                    scale,
                    split * SPLIT_TOKENS,
                    tl.minimum((split + 1) * SPLIT_TOKENS, context),
                    HEAD_DIM,
                    BLOCK_SIZE,
                    BLOCK_ROWS,
                    BLOCK_CONTEXT,
                    DIM_BLOCK,
                    PRECISION,
                    INT8,
                    queries_ptr.dtype.element_ty,
                )
                mine = split * GROUP
                in_group = row < GROUP
                tl.store(partial_max_ptr + mine + row, maximum2, mask=in_group)
                tl.store(partial_sum_ptr + mine + row, total2, mask=in_group)
                tl.store(partial_ptr + mine * DIM_BLOCK + tile, weighted2, mask=in_group[:, None])
            if PDL:
                tl.extra.cuda.gdc_launch_dependents()
            tl.debug_barrier()  # every thread's part, before one thread releases them
            arrived = tl.atomic_add(counters_ptr + pair, 1, sem="acq_rel")
            if arrived == tl.minimum(num_splits, num_programs) - 1:
                tl.store(counters_ptr + pair, 0)
                total, weighted = _merge_splits(
                    partial_ptr, partial_max_ptr, partial_sum_ptr, num_splits, tile, row, GROUP
                )
                store(out_ptr + base + in_tile, total, weighted, inside)
        else:
            _, total, weighted = attend(
                queries,
                query_scales,
                positions,
                keys,
                values,
                key_scales,
                value_scales,
                table,
                block_stride,
                scale,
                0,
                context,
                HEAD_DIM,
                BLOCK_SIZE,
                BLOCK_ROWS,
                BLOCK_CONTEXT,
                DIM_BLOCK,
                PRECISION,
                INT8,
                queries_ptr.dtype.element_ty,
            )
            if PDL:
                tl.extra.cuda.gdc_launch_dependents()
            store(out_ptr + base + in_tile, total, weighted, inside)


@triton.jit(do_not_specialize=["max_splits", "table_stride"])
def decode_attention_kernel(
    queries_ptr,  # [tokens, NUM_HEADS, HEAD_DIM]; queries ‖ keys ‖ values if ROPE
    keys_ptr,  # [num_blocks, kv heads, BLOCK_SIZE, HEAD_DIM]; of int8 as kv_codes lays it out
    values_ptr,
    key_scales_ptr,  # read if INT8
    value_scales_ptr,
    query_starts_ptr,  # [sequences + 1] int32
    context_lens_ptr,  # [sequences] int32
    tables_ptr,  # [sequences, table_stride] int32
    out_ptr,  # [tokens, NUM_HEADS, HEAD_DIM]
    partial_ptr,  # [sequences, kv heads, max_splits, GROUP, DIM_BLOCK] float32
    partial_max_ptr,  # [sequences, kv heads, max_splits, GROUP] float32
    partial_sum_ptr,  # likewise
    counters_ptr,  # [sequences * kv heads] int32, zero before and after
    rope_ptr,  # [max_model_len, HEAD_DIM] float32, cos ‖ sin; read if ROPE
    positions_ptr,  # [tokens] int64, likewise
    slots_ptr,  # [tokens] int64, likewise
    block_stride,
    table_stride,
    scale,
    max_splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    ROPE: tl.constexpr,
    PRECISION: tl.constexpr,
    INT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Softmax(q · kᵀ · scale) · v for one token a sequence; rotated and cached first if ROPE.

    Grid (programs, kv heads, sequences). The programs of a sequence and head take its splits in
    turn; the last to arrive merges them.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    decode_splits(
        tl.program_id(0),
        tl.num_programs(0),
        tl.program_id(1),
        tl.num_programs(1),
        tl.program_id(2),
        queries_ptr,
        keys_ptr,
        values_ptr,
        key_scales_ptr,
        value_scales_ptr,
        query_starts_ptr,
        context_lens_ptr,
        tables_ptr,
        out_ptr,
        partial_ptr,
        partial_max_ptr,
        partial_sum_ptr,
        counters_ptr,
        rope_ptr,
        positions_ptr,
        slots_ptr,
        block_stride,
        table_stride,
        scale,
        max_splits,
        GROUP,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK_ROWS,
        BLOCK_CONTEXT,
        SPLIT_TOKENS,
        DIM_BLOCK,
        IS_SPLIT,
        ROPE,
        PRECISION,
        INT8,
        PDL,
    )


@triton.jit(do_not_specialize=["num_sequences", "table_stride"])
def prefill_attention_kernel(
    queries_ptr,  # [tokens, NUM_HEADS, HEAD_DIM]
    keys_ptr,  # [num_blocks, kv heads, BLOCK_SIZE, HEAD_DIM]; of int8 as kv_codes lays it out
    values_ptr,
    key_scales_ptr,  # read if INT8
    value_scales_ptr,
    query_starts_ptr,  # [sequences + 1] int32
    context_lens_ptr,  # [sequences] int32
    tables_ptr,  # [sequences, table_stride] int32
    out_ptr,  # [tokens, NUM_HEADS, HEAD_DIM]
    block_stride,
    table_stride,
    scale,
    num_sequences,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    INT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Causal softmax(q · kᵀ · scale) · v for any number of tokens a sequence.

    Grid (tokens // TILE + sequences, kv heads) with TILE tokens a tile; sequence s owns the
    programs from query_starts[s] // TILE + s on, of which the last may have nothing to do.
    """
    TILE: tl.constexpr = BLOCK_ROWS // GROUP
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    low = 0
    high = num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_starts_ptr + middle) // TILE + middle <= program:
            low = middle
        else:
            high = middle - 1
    start = tl.load(query_starts_ptr + low)
    stop = tl.load(query_starts_ptr + low + 1)
    first = start + (program - start // TILE - low) * TILE
    if first >= stop:
        return

    context = tl.load(context_lens_ptr + low)
    row = tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, DIM_BLOCK)
    token = first + row // GROUP
    position = context - stop + token
    inside = ((row < TILE * GROUP) & (token < stop))[:, None] & (d < HEAD_DIM)[None, :]
    base = (first.to(tl.int64) * num_kv_heads + kv_head) * (GROUP * HEAD_DIM)
    in_tile = row // GROUP * (num_kv_heads * GROUP) + row % GROUP
    in_tile = in_tile[:, None] * HEAD_DIM + d[None, :]
    queries = tl.load(queries_ptr + base + in_tile, mask=inside, other=0)
    query_scales = position
    if INT8:
        queries, query_scales = quantize_heads(queries.to(tl.float32))
    HEAD_STRIDE: tl.constexpr = BLOCK_SIZE * (HEAD_DIM + 4 if INT8 else HEAD_DIM)
    last = tl.minimum(context, context - stop + first + TILE)
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS, DIM_BLOCK], tl.float32)
    for split_start in range(0, last, SPLIT_TOKENS):
        maximum2, total2, weighted2 = attend(
            queries,
            query_scales,
            position,
            keys_ptr + kv_head * HEAD_STRIDE,
            values_ptr + kv_head * HEAD_STRIDE,
            key_scales_ptr + kv_head * (HEAD_STRIDE // 4),
            value_scales_ptr + kv_head * (HEAD_STRIDE // 4),
            tables_ptr + low * table_stride,
            block_stride,
            scale,
            split_start,
            tl.minimum(split_start + SPLIT_TOKENS, last),
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_ROWS,
            BLOCK_CONTEXT,
            DIM_BLOCK,
            PRECISION,
            INT8,
            queries_ptr.dtype.element_ty,
        )
        maximum, total, weighted = merge(maximum, total, weighted, maximum2, total2, weighted2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    store(out_ptr + base + in_tile, total, weighted, inside)


def attention(
    queries: Tensor,
    kv_cache: Tensor,
    layout: StepLayout,
    scale: float,
    gpu: Gpu,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Return causal softmax(q · kᵀ · scale) · v, [T, H · D]; shapes as in Backend.attention.

    Tokens of padding sequences get zeros.
    config  overrides the one tuned for this GPU; split_tokens and block_context decide the bits
    Raises  ShapeError if the heads don't fit the cache or the kernels
    """
    return _attention(queries, cache_parts(kv_cache), layout, scale, gpu, config, None)


def rotated_attention(
    qkv: Tensor,
    rope: Tensor,
    kv_cache: Tensor,
    layout: StepLayout,
    num_heads: int,
    scale: float,
    gpu: Gpu,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Return attention(rope_and_cache(qkv)), [T, H · D], where every sequence brings one token.

    Raises  ShapeError if qkv does not have the features of the heads and the cache, a sequence
            brings more, or the heads don't fit the kernel
    """
    cache = cache_parts(kv_cache)
    num_kv_heads, head_dim = cache.num_kv_heads, cache.head_dim
    if qkv.shape[1] != (num_heads + 2 * num_kv_heads) * head_dim or not qkv.is_contiguous():
        raise ShapeError(
            f"qkv has shape {list(qkv.shape)}; expected contiguous [T, "
            f"({num_heads} + 2 · {num_kv_heads}) · {head_dim}]"
        )
    if layout.max_query_len > 1:
        raise ShapeError(f"a sequence brings {layout.max_query_len} tokens; the limit is 1")
    queries = qkv.view(len(qkv), -1, head_dim)[:, :num_heads]
    return _attention(queries, cache, layout, scale, gpu, config, rope)


def _attention(
    queries: Tensor,
    cache: CacheParts,
    layout: StepLayout,
    scale: float,
    gpu: Gpu,
    config: AttentionConfig | None,
    rope: Tensor | None,
) -> Tensor:
    """rope  rotates queries, which keys and values follow; None where that is done."""
    config = gpu.configs.attention if config is None else config
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = cache.num_kv_heads
    group = num_heads // num_kv_heads
    if head_dim != cache.head_dim or num_heads != group * num_kv_heads:
        raise ShapeError(
            f"queries have shape {list(queries.shape)}; the cache has {num_kv_heads} heads "
            f"of {cache.head_dim}"
        )
    num_sequences = layout.context_lens.shape[0]
    is_decode = layout.max_query_len <= 1
    fits = group <= config.decode.block_rows
    tile = config.decode if is_decode and fits else config.prefill
    if cache.is_int8 and not is_decode:
        tile = config.prefill_of_codes
    if group > tile.block_rows or num_sequences * num_kv_heads > MAX_SPLIT_TILES:
        raise ShapeError(
            f"{group} query heads a key-value head and {num_sequences} sequences of "
            f"{num_kv_heads}; the limits are {tile.block_rows} and "
            f"{MAX_SPLIT_TILES} sequences times heads"
        )
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    if num_tokens == 0:
        return out.flatten(1)
    shared = (
        queries,
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
        layout.query_starts,
        layout.context_lens,
    )
    strides = (cache.block_stride, layout.block_tables.stride(0), scale * math.log2(math.e))
    options = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": BLOCK_SIZE,
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_CONTEXT": config.block_context,
        "SPLIT_TOKENS": config.split_tokens,
        "DIM_BLOCK": cache.dim_block,
        "PRECISION": gpu.dot_precision(queries.dtype),
        "INT8": cache.is_int8,
        "PDL": gpu.pdl,
        **gpu.launch_options(tile.num_warps, tile.num_stages),
    }
    if not is_decode:
        grid = (num_tokens // (tile.block_rows // group) + num_sequences, num_kv_heads)
        prefill_attention_kernel[grid](
            *shared, layout.block_tables, out, *strides, num_sequences, **options
        )
        return out.flatten(1)

    num_splits = max(1, triton.cdiv(layout.max_context_len, config.split_tokens))
    # A tile's shared memory lets few programs share a multiprocessor: those that would only
    # find a short context cost a large batch more than they give.
    wanted = PROGRAMS_PER_MULTIPROCESSOR * gpu.num_multiprocessors
    num_programs = min(num_splits, triton.cdiv(wanted, num_sequences * num_kv_heads))
    num_partials = num_sequences * num_heads * num_splits if num_splits > 1 else 1
    partial = torch.empty(num_partials, cache.dim_block, dtype=torch.float32, device=out.device)
    partial_max, partial_sum = torch.empty(
        2, num_partials, dtype=torch.float32, device=out.device
    ).unbind()
    decode_attention_kernel[(num_programs, num_kv_heads, num_sequences)](
        *shared,
        layout.block_tables,
        out,
        partial,
        partial_max,
        partial_sum,
        gpu.counters,
        gpu.counters if rope is None else rope,
        layout.positions,
        layout.slots,
        *strides,
        num_splits,
        IS_SPLIT=num_splits > 1,
        ROPE=rope is not None,
        **options,
    )
    return out.flatten(1)
