"""ternary_linear in Triton: int8 activations times packed 2-bit weights.

The product is computed transposed, Yᵀ = W · Xᵀ, so that the weights are the operand that tensor
cores take from registers, where they are unpacked, and a small batch is the narrow one.

The codes of a packed byte are used in place where that is free. With t = byte >> 4, planes 0 and
2 are byte & 3 and t & 3, planes 1 and 3 are byte & 12 and t & 12: four times their codes. Their
products are summed apart and divided by four once, at the end: one shift for sixteen weights.
The main loop then takes 0.62 instructions a weight for 8 tokens on sm_90, and 0.76 with a shift
a plane (tests/kernels/gpu/test_linear_machine_code.py counts them).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwatt_kernels.backend import QuantizedActivations
from bitwatt_kernels.errors import DtypeError, ShapeError
from bitwatt_kernels.gpu.configs import LinearConfig
from bitwatt_kernels.gpu.device import MAX_SPLIT_TILES, Gpu
from bitwatt_kernels.gpu.row_queue import RawRows, rows_at_once, take_rows
from bitwatt_kernels.gpu.tiles import recomputable, tile_indices
from bitwatt_kernels.packing import IN_FEATURES_MULTIPLE, TernaryWeight

__all__ = [
    "check_layout",
    "check_residual",
    "prefetch",
    "ternary_linear",
    "ternary_linear_kernel",
    "unpack_in_place",
]

# Programs a launch aims at for each multiprocessor when num_splits is left open.
PROGRAMS_PER_MULTIPROCESSOR = 2

# Of each row's share; times 128 rows a program and 264 programs it is still less than L2.
PREFETCH_BYTES = tl.constexpr(1024)


@triton.jit
def unpack_in_place(packed, INLINE_ASM: tl.constexpr):
    """Return planes 0 to 3 as int8: codes of 0 and 2, four times the codes of 1 and 3."""
    if INLINE_ASM:
        planes = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 high;
            shr.b32 high, $4, 4;
            and.b32 $0, $4, 0x03030303;
            and.b32 $1, $4, 0x0C0C0C0C;
            and.b32 $2, high, 0x03030303;
            and.b32 $3, high, 0x0C0C0C0C;
            }
            """,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        high = packed >> 4
        planes = (
            (packed & 0x03).to(tl.int8),
            (packed & 0x0C).to(tl.int8),
            (high & 0x03).to(tl.int8),
            (high & 0x0C).to(tl.int8),
        )
    return planes


@triton.jit
def _unpack(packed, INLINE_ASM: tl.constexpr):
    """Return planes 0 to 3 as int8 codes."""
    if INLINE_ASM:
        planes = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 shifted;
            and.b32 $0, $4, 0x03030303;
            shr.b32 shifted, $4, 2;
            and.b32 $1, shifted, 0x03030303;
            shr.b32 shifted, $4, 4;
            and.b32 $2, shifted, 0x03030303;
            shr.b32 shifted, $4, 6;
            and.b32 $3, shifted, 0x03030303;
            }
            """,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        planes = (
            (packed & 3).to(tl.int8),
            (packed >> 2 & 3).to(tl.int8),
            (packed >> 4 & 3).to(tl.int8),
            (packed >> 6).to(tl.int8),
        )
    return planes


@triton.jit
def prefetch(pointers):
    """Start bringing the lines of pointers into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _multiply(w, x, acc, BFLOAT16: tl.constexpr):
    """Return acc and the product of codes, int32 or, as exact, float32."""
    if BFLOAT16:
        acc = tl.dot(w.to(tl.bfloat16), x.to(tl.bfloat16), acc)
    else:
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    return acc


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def ternary_linear_kernel(
    x_ptr,  # [num_tokens, 4 * row_bytes] int8
    x_scales_ptr,  # [num_tokens] float32
    x_sums_ptr,  # [num_tokens] int32
    w_ptr,  # [out_features, row_bytes] uint8
    w_scales_ptr,  # [out_features] float32
    bias_ptr,  # [out_features] float32
    residual_ptr,  # [num_tokens, out_features]
    y_ptr,  # [num_tokens, out_features]
    sums_ptr,  # [tiles, BLOCK_OUT, BLOCK_TOKENS] int32, zero before and after
    counters_ptr,  # [tiles] int32, likewise
    raw_ptr,  # what take_rows reads if RAW, and then writes x of
    norm_ptr,
    queue_ptr,
    eps,
    num_tokens,
    out_features,
    row_bytes,
    num_splits,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    SPLIT_PLANES: tl.constexpr,
    BFLOAT16: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RAW: tl.constexpr,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    INLINE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[m, n] = (Σ_k x[m, k] · code[n, k] − x_sums[m]) / x_scales[m] · w_scales[n] (+ …).

    Grid (tiles, num_splits).
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n, m = tile_indices(tile, num_tokens, out_features, BLOCK_OUT, BLOCK_TOKENS, GROUP_TOKENS)
    # Rows past the edge read the last one; their results are not stored.
    n_read = tl.minimum(n, out_features - 1)
    m_read = tl.minimum(m, num_tokens - 1)

    steps = tl.cdiv(row_bytes, BLOCK_BYTES)
    steps_per_split = tl.cdiv(steps, num_splits)
    first = split * steps_per_split * BLOCK_BYTES
    last = tl.minimum(first + steps_per_split * BLOCK_BYTES, row_bytes)

    if PDL or (RAW and INLINE_ASM):  # noqa: SIM102  # this one is the compiler's
        # Weights depend on no activations: they travel while those are computed.
        if num_tokens <= BLOCK_TOKENS:
            rows = w_ptr + n_read[:, None].to(tl.int64) * row_bytes
            lines = tl.arange(0, 4) * 128
            for start in range(first, tl.minimum(last, first + PREFETCH_BYTES), 512):
                prefetch(rows + tl.minimum(start + lines, last - 1)[None, :])
    if PDL:
        tl.extra.cuda.gdc_wait()
    if RAW:
        take_rows(
            raw_ptr,
            norm_ptr,
            x_ptr,
            x_scales_ptr,
            x_sums_ptr,
            queue_ptr,
            num_tokens,
            row_bytes * 4,
            eps,
            tl.num_programs(0) * tl.num_programs(1),
            GATED,
            SILU,
            HAS_NORM,
            ROWS,
            ROW_BLOCK,
        )

    j = tl.arange(0, BLOCK_BYTES)
    w_ptrs = w_ptr + n_read[:, None].to(tl.int64) * row_bytes + (first + j)[None, :]
    x_ptrs = x_ptr + m_read[None, :].to(tl.int64) * (row_bytes * 4) + (first + j)[:, None]
    acc_dtype: tl.constexpr = tl.float32 if BFLOAT16 else tl.int32
    acc = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], acc_dtype)
    quadrupled = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], acc_dtype)
    for start in range(first, last, BLOCK_BYTES):
        if HAS_TAIL:
            inside = start + j < row_bytes
            packed = tl.load(w_ptrs, mask=inside[None, :], other=0)
            x0 = tl.load(x_ptrs, mask=inside[:, None], other=0)
            x1 = tl.load(x_ptrs + row_bytes, mask=inside[:, None], other=0)
            x2 = tl.load(x_ptrs + 2 * row_bytes, mask=inside[:, None], other=0)
            x3 = tl.load(x_ptrs + 3 * row_bytes, mask=inside[:, None], other=0)
        else:
            packed = tl.load(w_ptrs)
            x0 = tl.load(x_ptrs)
            x1 = tl.load(x_ptrs + row_bytes)
            x2 = tl.load(x_ptrs + 2 * row_bytes)
            x3 = tl.load(x_ptrs + 3 * row_bytes)
        if SPLIT_PLANES:
            w0, w1, w2, w3 = unpack_in_place(packed, INLINE_ASM)
            acc = _multiply(w0, x0, acc, BFLOAT16)
            quadrupled = _multiply(w1, x1, quadrupled, BFLOAT16)
            acc = _multiply(w2, x2, acc, BFLOAT16)
            quadrupled = _multiply(w3, x3, quadrupled, BFLOAT16)
        else:
            w0, w1, w2, w3 = _unpack(packed, INLINE_ASM)
            acc = _multiply(w0, x0, acc, BFLOAT16)
            acc = _multiply(w1, x1, acc, BFLOAT16)
            acc = _multiply(w2, x2, acc, BFLOAT16)
            acc = _multiply(w3, x3, acc, BFLOAT16)
        w_ptrs += BLOCK_BYTES
        x_ptrs += BLOCK_BYTES
    if BFLOAT16:
        acc = acc.to(tl.int32)
        quadrupled = quadrupled.to(tl.int32)
    if SPLIT_PLANES:
        acc += quadrupled >> 2
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    if IS_SPLIT:
        # Integer sums are exact in any order. The last program reads one tile, however many add.
        in_tile = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        shared = sums_ptr + tile * (BLOCK_OUT * BLOCK_TOKENS) + in_tile
        tl.atomic_add(shared, acc, sem="relaxed")
        tl.debug_barrier()  # every thread's sums, before one thread releases them
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
        if arrived != num_splits - 1:
            return
        tl.store(counters_ptr + tile, 0)
        acc = tl.load(shared, cache_modifier=".cg")
        tl.debug_barrier()  # every thread has read
        tl.store(shared, tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.int32))

    if INLINE_ASM:
        tile = recomputable(tile)
    n, m = tile_indices(tile, num_tokens, out_features, BLOCK_OUT, BLOCK_TOKENS, GROUP_TOKENS)
    n_read = tl.minimum(n, out_features - 1)
    m_read = tl.minimum(m, num_tokens - 1)
    acc -= tl.load(x_sums_ptr + m_read)[None, :]
    y = tl.div_rn(acc.to(tl.float32), tl.load(x_scales_ptr + m_read)[None, :])
    y *= tl.load(w_scales_ptr + n_read)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n_read)[:, None]
    offsets = m[None, :].to(tl.int64) * out_features + n[:, None]
    inside = (m < num_tokens)[None, :] & (n < out_features)[:, None]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


def check_layout(
    x: QuantizedActivations,
    weight_codes: Tensor,
    out_features: int,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raise ShapeError or DtypeError where a kernel can't read them as they lie in memory."""
    num_tokens, in_features = x.codes.shape
    if in_features % IN_FEATURES_MULTIPLE:
        raise ShapeError(
            f"in_features is {in_features}; it must be a multiple of {IN_FEATURES_MULTIPLE}"
        )
    if not (x.codes.is_contiguous() and weight_codes.is_contiguous()):
        raise ShapeError("activation and weight codes must be contiguous")
    if residual is not None:
        check_residual(residual, num_tokens, out_features, dtype)


def check_residual(
    residual: Tensor, num_tokens: int, out_features: int, dtype: torch.dtype
) -> None:
    """Raise ShapeError or DtypeError where it can't be added to an output of that shape."""
    if residual.dtype != dtype:
        raise DtypeError(f"residual is {residual.dtype}; the output is {dtype}")
    if residual.shape != (num_tokens, out_features) or not residual.is_contiguous():
        raise ShapeError(
            f"residual has shape {list(residual.shape)} and strides {residual.stride()}; "
            f"expected contiguous [{num_tokens}, {out_features}]"
        )


def _num_splits(config: LinearConfig, num_tiles: int, row_bytes: int, gpu: Gpu) -> int:
    steps = triton.cdiv(row_bytes, config.block_bytes)
    wanted = config.num_splits
    if wanted is None:
        wanted = gpu.num_multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // num_tiles
    num_sums = num_tiles * config.block_out * config.block_tokens
    if num_tiles > MAX_SPLIT_TILES or num_sums > len(gpu.sums):
        return 1
    steps_per_split = triton.cdiv(steps, max(1, min(wanted, steps)))
    return int(triton.cdiv(steps, steps_per_split))


def ternary_linear(
    x: QuantizedActivations | RawRows,
    weight: TernaryWeight,
    residual: Tensor | None,
    dtype: torch.dtype,
    gpu: Gpu,
    config: LinearConfig | None = None,
) -> Tensor:
    """Return float32(x.codes · Wᵀ) / x.scales · weight.scales (+ bias) (+ residual) in dtype.

    Sums in int32, so that every configuration gives the same bits.
    x        raw rows are normed and quantized by the same launch
    config   overrides the one tuned for this GPU, shape and number of tokens
    Returns  [T, out_features] dtype
    Raises   ShapeError or DtypeError if the arguments don't fit together
    Source   arXiv:2402.17764, section 2
    """
    raw = x if isinstance(x, RawRows) else None
    x = x.empty_quantized() if isinstance(x, RawRows) else x
    x.check_fit(weight.in_features, weight.group)
    num_tokens, in_features = x.codes.shape
    out_features, row_bytes = weight.codes.shape
    check_layout(x, weight.codes, out_features, residual, dtype)
    y = torch.empty(num_tokens, out_features, dtype=dtype, device=x.codes.device)
    if y.numel() == 0:
        return y
    if config is None:
        config = gpu.configs.for_linear(num_tokens, out_features, in_features)
    num_tiles = triton.cdiv(out_features, config.block_out) * triton.cdiv(
        num_tokens, config.block_tokens
    )
    num_splits = _num_splits(config, num_tiles, row_bytes, gpu)
    rows, row_block = rows_at_once(0 if raw is None else num_tokens)
    ternary_linear_kernel[(num_tiles, num_splits)](
        x.codes,
        x.scales,
        x.sums,
        weight.codes,
        weight.scales,
        weight.scales if weight.bias is None else weight.bias,
        y if residual is None else residual,
        y,
        gpu.sums,
        gpu.counters,
        x.codes if raw is None else raw.x,
        weight.scales if raw is None or raw.norm is None else raw.norm,
        gpu.queue,
        0.0 if raw is None else raw.eps,
        num_tokens,
        out_features,
        row_bytes,
        num_splits,
        BLOCK_OUT=config.block_out,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_BYTES=config.block_bytes,
        GROUP_TOKENS=8,
        SPLIT_PLANES=config.split_planes,
        BFLOAT16=config.bfloat16 and in_features <= config.most_exact_features,
        IS_SPLIT=num_splits > 1,
        HAS_TAIL=row_bytes % config.block_bytes != 0,
        HAS_BIAS=weight.bias is not None,
        HAS_RESIDUAL=residual is not None,
        RAW=raw is not None,
        GATED=raw is not None and raw.activation is not None,
        SILU=raw is not None and raw.activation == "silu",
        HAS_NORM=raw is not None and raw.norm is not None,
        ROWS=rows,
        ROW_BLOCK=row_block,
        INLINE_ASM=gpu.inline_asm,
        PDL=gpu.pdl,
        **gpu.launch_options(config.num_warps, config.num_stages),
    )
    return y
