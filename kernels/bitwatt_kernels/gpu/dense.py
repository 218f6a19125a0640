"""Unpacked matmuls in Triton that sum in a fixed order, whatever the batch.

cuBLAS chooses its kernel, and with it the order of its sums, by the number of rows. Here every
tile walks in_features from first to last by the same instruction, so a token's result depends on
the token alone. With int8 operands sums are exact anyway: that is the int8 head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwatt_kernels.backend import QuantizedActivations
from bitwatt_kernels.errors import DtypeError, ShapeError
from bitwatt_kernels.gpu.best import best_in_tile
from bitwatt_kernels.gpu.configs import DenseConfig
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.tiles import tile_indices

__all__ = ["dense_linear", "dense_linear_kernel", "int8_linear", "linear_and_best"]


@triton.jit(do_not_specialize=["num_tokens"])
def dense_linear_kernel(
    x_ptr,  # [num_tokens, in_features]
    w_ptr,  # [out_features, in_features], in x's dtype
    x_scales_ptr,  # [num_tokens] float32
    w_scales_ptr,  # [out_features] float32
    bias_ptr,  # [out_features]
    residual_ptr,  # [num_tokens, out_features]
    y_ptr,  # [num_tokens, out_features]
    best_ptr,  # [num_tokens, tiles of out_features] int64, written if HAS_BEST
    num_tokens,
    out_features,
    in_features,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BEST: tl.constexpr,
    IS_INT8: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = x · wᵀ (/ x_scales · w_scales if IS_INT8) (+ bias) (+ residual). Grid (tiles,)."""
    tile = tl.program_id(0)
    n, m = tile_indices(tile, num_tokens, out_features, BLOCK_OUT, BLOCK_TOKENS, GROUP_TOKENS)
    n_read = tl.minimum(n, out_features - 1)
    m_read = tl.minimum(m, num_tokens - 1)
    k = tl.arange(0, BLOCK_IN)
    w_ptrs = w_ptr + n_read[:, None].to(tl.int64) * in_features + k[None, :]
    x_ptrs = x_ptr + m_read[None, :].to(tl.int64) * in_features + k[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()

    if IS_INT8:
        acc = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.int32)
    else:
        acc = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.float32)
    for start in range(0, in_features, BLOCK_IN):
        if HAS_TAIL:
            inside = start + k < in_features
            w = tl.load(w_ptrs, mask=inside[None, :], other=0)
            x = tl.load(x_ptrs, mask=inside[:, None], other=0)
        else:
            w = tl.load(w_ptrs)
            x = tl.load(x_ptrs)
        if IS_INT8:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
        w_ptrs += BLOCK_IN
        x_ptrs += BLOCK_IN
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    y = acc.to(tl.float32)
    if IS_INT8:
        y = tl.div_rn(y, tl.load(x_scales_ptr + m_read)[None, :])
        y *= tl.load(w_scales_ptr + n_read)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n_read)[:, None].to(tl.float32)
    offsets = m[None, :].to(tl.int64) * out_features + n[:, None]
    inside = (m < num_tokens)[None, :] & (n < out_features)[:, None]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    if HAS_BEST:
        place = m.to(tl.int64) * tl.cdiv(out_features, BLOCK_OUT) + tl.min(n, axis=0) // BLOCK_OUT
        tl.store(best_ptr + place, best_in_tile(y, n, out_features), mask=m < num_tokens)


def _launch(
    x: Tensor,
    weight: Tensor,
    x_scales: Tensor | None,
    w_scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    gpu: Gpu,
    config: DenseConfig | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return what is to be returned, and where out is given the best of each tile."""
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    if weight.shape != (out_features, in_features) or x.dtype != weight.dtype:
        raise ShapeError(
            f"activations are {x.dtype} {list(x.shape)}; "
            f"the weight is {weight.dtype} {list(weight.shape)}"
        )
    y = torch.empty(num_tokens, out_features, dtype=dtype, device=x.device) if out is None else out
    if y.shape != (num_tokens, out_features) or y.dtype != dtype or not y.is_contiguous():
        raise ShapeError(
            f"out is {y.dtype} {list(y.shape)}; expected contiguous {dtype} "
            f"[{num_tokens}, {out_features}]"
        )
    if residual is not None and (residual.shape != y.shape or not residual.is_contiguous()):
        raise ShapeError(f"residual has shape {list(residual.shape)}; expected {list(y.shape)}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ShapeError("activations and weight must be contiguous")
    if y.numel() == 0:
        return y, None
    config = gpu.configs.for_dense(num_tokens) if config is None else config
    tiles_out = triton.cdiv(out_features, config.block_out)
    tiles = tiles_out * triton.cdiv(num_tokens, config.block_tokens)
    best = None
    if out is not None:
        best = torch.empty(num_tokens, tiles_out, dtype=torch.int64, device=x.device)
    # A byte a value leaves room for twice the values in the same shared memory.
    block_in = config.block_in * 2 // x.element_size() if x.element_size() < 4 else 16
    dense_linear_kernel[(tiles,)](
        x,
        weight,
        y if x_scales is None else x_scales,
        y if w_scales is None else w_scales,
        y if bias is None else bias,
        y if residual is None else residual,
        y,
        y if best is None else best,
        num_tokens,
        out_features,
        in_features,
        BLOCK_OUT=config.block_out,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_IN=block_in,
        GROUP_TOKENS=8,
        HAS_TAIL=in_features % block_in != 0,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_BEST=best is not None,
        IS_INT8=x_scales is not None,
        PRECISION=gpu.dot_precision(x.dtype),
        PDL=gpu.pdl,
        **gpu.launch_options(config.num_warps, config.num_stages),
    )
    return y, best


def dense_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gpu: Gpu,
    *,
    dtype: torch.dtype | None = None,
    config: DenseConfig | None = None,
) -> Tensor:
    """Return x · weightᵀ (+ bias) (+ residual) in dtype, x's unless given; sums in float32.

    x         [T, in_features], in weight's dtype, contiguous
    weight    [out_features, in_features], contiguous
    residual  [T, out_features], or None
    Raises    ShapeError or DtypeError if the arguments don't fit together
    """
    if not x.is_floating_point():
        raise DtypeError(f"activations are {x.dtype}; expected a float dtype")
    return _launch(x, weight, None, None, bias, residual, dtype or x.dtype, gpu, config)[0]


def int8_linear(
    x: QuantizedActivations,
    codes: Tensor,
    scales: Tensor,
    gpu: Gpu,
    config: DenseConfig | None = None,
) -> Tensor:
    """Return float32(x.codes · codesᵀ) / x.scales · scales, [T, out_features] float32.

    codes   [out_features, in_features] int8
    scales  [out_features] float32
    """
    return _launch(x.codes, codes, x.scales, scales, None, None, torch.float32, gpu, config)[0]


def linear_and_best(
    x: Tensor | QuantizedActivations,
    weight: Tensor,
    scales: Tensor | None,
    out: Tensor,
    gpu: Gpu,
    config: DenseConfig | None = None,
) -> Tensor | None:
    """Write dense_linear, or int8_linear with scales, to out; return the best of each tile.

    out      [T, out_features] float32, contiguous
    Returns  [T, tiles] int64, as drawing.draw takes it; None of no tokens
    """
    values, x_scales = (x.codes, x.scales) if isinstance(x, QuantizedActivations) else (x, None)
    return _launch(values, weight, x_scales, scales, None, None, torch.float32, gpu, config, out)[1]
