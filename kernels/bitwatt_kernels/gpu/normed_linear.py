"""RMSNorm, quantization and ternary_linear in one kernel, for a few tokens; after it, f(gate) · up.

Every program norms and quantizes the rows anew, from L2: a few kilobytes, where a launch of its own
would cost as much as the matmul. Each number is what the kernels one by one give: a row's sum of
squares is of float64, its largest is of whatever order, its codes are rounded alike, and int32 sums
are exact. No reduction is split over programs.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwatt_kernels.backend import Activation
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.elementwise import activate, round_to_int8
from bitwatt_kernels.gpu.linear import check_residual, prefetch, unpack_in_place
from bitwatt_kernels.packing import TernaryWeight

__all__ = [
    "MAX_TOKENS",
    "NormedLinearConfig",
    "config_for",
    "norm_and_scale",
    "normed_linear",
    "normed_linear_kernel",
    "normed_tile",
    "prefetch_weights",
]

MAX_TOKENS = 8
_PREFETCH_BYTES = tl.constexpr(2048)  # of each row: less than L2 over all programs
_WIDTH = tl.constexpr(8)  # of a tile of tokens: the narrowest that tensor cores take


@dataclass(frozen=True, slots=True)
class NormedLinearConfig:
    """How it is launched; no choice changes its result.

    tokens      tokens quantized: 1, or 8
    block_out   output features of a program
    block_bytes packed bytes of a row read in one step of the loop
    block_in    features normed at once
    unroll      such blocks read before the first is used
    """

    tokens: int
    block_out: int
    block_bytes: int
    block_in: int
    unroll: int
    num_warps: int
    num_stages: int


# By the machine code, for no spills; not measured.
_ONE = NormedLinearConfig(1, 16, 128, 512, 4, 1, 3)
_FEW = NormedLinearConfig(8, 32, 128, 512, 2, 4, 3)


def config_for(num_tokens: int, *, is_gated: bool = False) -> NormedLinearConfig:
    """Return how num_tokens, at most MAX_TOKENS, are launched; gate and up take two sums."""
    config = _ONE if num_tokens == 1 else _FEW
    return replace(config, block_bytes=config.block_bytes // 2) if is_gated else config


@triton.jit
def _normed(x_ptr, norm_ptr, k, inside, reciprocal, HAS_NORM: tl.constexpr):
    """Return x, normed if HAS_NORM; pointers, k, inside and reciprocal of one shape."""
    x = tl.load(x_ptr + k, mask=inside, other=0).to(tl.float32)
    if HAS_NORM:
        x = x * reciprocal * tl.load(norm_ptr + k, mask=inside, other=0).to(tl.float32)
    return x


@triton.jit
def _packed(w_ptrs, inside, HAS_TAIL: tl.constexpr):
    return tl.load(w_ptrs, mask=inside, other=0) if HAS_TAIL else tl.load(w_ptrs)


@triton.jit
def _finish(acc, scale, w_scales_ptr, bias_ptr, n, HAS_BIAS: tl.constexpr):
    y = tl.div_rn(acc.to(tl.float32), scale) * tl.load(w_scales_ptr + n)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n)[:, None]
    return y


@triton.jit
def prefetch_weights(
    tile,
    w_ptr,  # [out_features, row_bytes] uint8; gate ‖ up if GATED, out_features each
    out_features,
    row_bytes,
    BLOCK_OUT: tl.constexpr,
    GATED: tl.constexpr,
):
    """Start bringing the first bytes of a tile's rows into L2."""
    n = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    n = tl.minimum(n, out_features - 1)
    lines = tl.arange(0, 4) * 128
    for start in range(0, tl.minimum(row_bytes, _PREFETCH_BYTES), 512):
        line = tl.minimum(start + lines, row_bytes - 1)[None, :]
        prefetch(w_ptr + n[:, None].to(tl.int64) * row_bytes + line)
        if GATED:
            prefetch(w_ptr + (n + out_features)[:, None].to(tl.int64) * row_bytes + line)


@triton.jit
def norm_and_scale(
    x_ptr,  # [num_tokens, in_features]
    norm_ptr,  # [in_features] float32
    num_tokens,
    in_features,
    eps,
    TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Return what each row is multiplied by to be normed, and then to be quantized, [TOKENS]."""
    rows = tl.minimum(tl.arange(0, TOKENS), num_tokens - 1) * in_features
    reciprocal = tl.full([TOKENS], 1.0, tl.float32)
    i = tl.arange(0, BLOCK_IN)
    if HAS_NORM:
        squares = tl.zeros([TOKENS, BLOCK_IN], tl.float64)
        for first in tl.range(0, in_features, BLOCK_IN, loop_unroll_factor=UNROLL):
            inside = (first + i < in_features)[None, :]
            x = tl.load(x_ptr + rows[:, None] + (first + i)[None, :], mask=inside, other=0)
            wide = x.to(tl.float32).to(tl.float64)
            squares += wide * wide
        mean_square = (tl.sum(squares, axis=1) / in_features).to(tl.float32)
        reciprocal = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    largest = tl.zeros([TOKENS, BLOCK_IN], tl.float32)
    for first in tl.range(0, in_features, BLOCK_IN, loop_unroll_factor=UNROLL):
        k = (first + i)[None, :]
        y = _normed(
            x_ptr + rows[:, None], norm_ptr, k, k < in_features, reciprocal[:, None], HAS_NORM
        )
        largest = tl.maximum(largest, tl.abs(y))
    scale = tl.div_rn(1.0, tl.maximum(tl.max(largest, axis=1), 1e-5)) * 127.0
    return reciprocal, scale


@triton.jit
def normed_tile(
    tile,
    reciprocal,  # what norm_and_scale returns
    scale,
    x_ptr,  # the rest as normed_linear_kernel's
    norm_ptr,
    w_ptr,
    w_scales_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    num_tokens,
    out_features,
    row_bytes,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    INLINE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Store BLOCK_OUT output features of every token; see normed_linear_kernel."""
    n = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    n_read = tl.minimum(n, out_features - 1)
    # Tokens past the last are the last one again; their results are not stored.
    rows = tl.minimum(tl.arange(0, TOKENS), num_tokens - 1) * (row_bytes * 4)
    j = tl.arange(0, BLOCK_BYTES)
    w_ptrs = w_ptr + n_read[:, None].to(tl.int64) * row_bytes + j[None, :]
    up_ptrs = w_ptr + (n_read + out_features)[:, None].to(tl.int64) * row_bytes + j[None, :]
    acc = tl.zeros([BLOCK_OUT, _WIDTH], tl.int32)
    quadrupled = tl.zeros([BLOCK_OUT, _WIDTH], tl.int32)
    up = tl.zeros([BLOCK_OUT, _WIDTH], tl.int32)
    up_quadrupled = tl.zeros([BLOCK_OUT, _WIDTH], tl.int32)
    sums = tl.zeros([TOKENS], tl.int32)
    for start in range(0, row_bytes, BLOCK_BYTES):
        inside = start + j < row_bytes
        w = unpack_in_place(_packed(w_ptrs, inside[None, :], HAS_TAIL), INLINE_ASM)
        if GATED:
            v = unpack_in_place(_packed(up_ptrs, inside[None, :], HAS_TAIL), INLINE_ASM)
        for plane in tl.static_range(4):
            k = (plane * row_bytes + start + j)[:, None]
            y = _normed(
                x_ptr + rows[None, :], norm_ptr, k, inside[:, None], reciprocal[None, :], HAS_NORM
            )
            codes = round_to_int8(y * scale[None, :])
            sums += tl.sum(codes.to(tl.int32), axis=0)
            if TOKENS == 1:
                codes = tl.broadcast_to(codes, [BLOCK_BYTES, _WIDTH])
            if plane % 2 == 0:
                acc = tl.dot(w[plane], codes, acc, out_dtype=tl.int32)
                if GATED:
                    up = tl.dot(v[plane], codes, up, out_dtype=tl.int32)
            else:
                quadrupled = tl.dot(w[plane], codes, quadrupled, out_dtype=tl.int32)
                if GATED:
                    up_quadrupled = tl.dot(v[plane], codes, up_quadrupled, out_dtype=tl.int32)
        w_ptrs += BLOCK_BYTES
        up_ptrs += BLOCK_BYTES
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    acc += (quadrupled >> 2) - sums[None, :]
    y = _finish(acc, scale[None, :], w_scales_ptr, bias_ptr, n_read, HAS_BIAS)
    m = tl.arange(0, _WIDTH)
    offsets = m[None, :] * out_features + n[:, None]
    inside = (m < num_tokens)[None, :] & (n < out_features)[:, None]
    if GATED:
        up += (up_quadrupled >> 2) - sums[None, :]
        up_y = _finish(up, scale[None, :], w_scales_ptr, bias_ptr, n_read + out_features, HAS_BIAS)
        dtype = x_ptr.dtype.element_ty  # both are rounded, as where each is stored
        y = activate(y.to(dtype).to(tl.float32), SILU) * up_y.to(dtype).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def normed_linear_kernel(
    x_ptr,  # [num_tokens, 4 * row_bytes]
    norm_ptr,  # [4 * row_bytes] float32
    w_ptr,  # [out_features, row_bytes] uint8; gate ‖ up if GATED, out_features each
    w_scales_ptr,  # a row's, float32
    bias_ptr,  # a row's, float32
    residual_ptr,  # [num_tokens, out_features]
    y_ptr,  # [num_tokens, out_features]
    num_tokens,
    out_features,
    row_bytes,
    eps,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    INLINE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = quantized(norm(x)) · codesᵀ, scaled (+ bias) (+ residual); f(gate) · up of it if GATED.

    Grid (tiles of out_features,).
    """
    tile = tl.program_id(0)
    if INLINE_ASM:  # weights depend on no activations: they travel while those are normed
        prefetch_weights(tile, w_ptr, out_features, row_bytes, BLOCK_OUT, GATED)
    if PDL:
        tl.extra.cuda.gdc_wait()
    reciprocal, scale = norm_and_scale(
        x_ptr, norm_ptr, num_tokens, row_bytes * 4, eps, TOKENS, BLOCK_IN, UNROLL, HAS_NORM
    )
    normed_tile(
        tile,
        reciprocal,
        scale,
        x_ptr,
        norm_ptr,
        w_ptr,
        w_scales_ptr,
        bias_ptr,
        residual_ptr,
        y_ptr,
        num_tokens,
        out_features,
        row_bytes,
        TOKENS,
        BLOCK_OUT,
        BLOCK_BYTES,
        HAS_TAIL,
        HAS_NORM,
        HAS_BIAS,
        HAS_RESIDUAL,
        GATED,
        SILU,
        INLINE_ASM,
        PDL,
    )


def normed_linear(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    weight: TernaryWeight,
    residual: Tensor | None,
    dtype: torch.dtype,
    gpu: Gpu,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """Return ternary_linear(rms_norm_quantize(x)), or with activation f(gate) · up of that.

    x           [T, in_features], T up to MAX_TOKENS, contiguous
    norm        [in_features], or None to quantize x as it is
    residual    [T, out_features] dtype, or None; not with activation
    activation  takes the first half of the rows as gate; each half is rounded to x's dtype first
    Returns     [T, out_features], or half as many, dtype
    Raises      ShapeError or DtypeError if the arguments don't fit together
    """
    if x.dim() != 2 or not x.is_contiguous() or not 1 <= len(x) <= MAX_TOKENS:
        raise ShapeError(
            f"activations have shape {list(x.shape)}; expected contiguous [1…{MAX_TOKENS}, K]"
        )
    num_tokens, in_features = x.shape
    if weight.group is not None or weight.in_features != in_features:
        raise ShapeError(
            f"activations have {in_features} features; the weight has {weight.in_features}, "
            f"in groups of {weight.group}"
        )
    if norm is not None and norm.shape != (in_features,):
        raise ShapeError(f"norm weight has shape {list(norm.shape)}; expected [{in_features}]")
    rows, row_bytes = weight.codes.shape
    out_features = rows if activation is None else rows // 2
    y = torch.empty(num_tokens, out_features, dtype=dtype, device=x.device)
    if residual is not None:
        if activation is not None:
            raise ShapeError("a residual can't be added to a gated activation")
        check_residual(residual, num_tokens, out_features, dtype)
    config = config_for(num_tokens, is_gated=activation is not None)
    normed_linear_kernel[(triton.cdiv(out_features, config.block_out),)](
        x,
        weight.scales if norm is None else norm,
        weight.codes,
        weight.scales,
        weight.scales if weight.bias is None else weight.bias,
        y if residual is None else residual,
        y,
        num_tokens,
        out_features,
        row_bytes,
        eps,
        TOKENS=config.tokens,
        BLOCK_OUT=config.block_out,
        BLOCK_BYTES=config.block_bytes,
        BLOCK_IN=config.block_in,
        UNROLL=config.unroll,
        HAS_TAIL=row_bytes % config.block_bytes != 0,
        HAS_NORM=norm is not None,
        HAS_BIAS=weight.bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=activation is not None,
        SILU=activation == "silu",
        INLINE_ASM=gpu.inline_asm,
        PDL=gpu.pdl,
        **gpu.launch_options(config.num_warps, config.num_stages),
    )
    return y
