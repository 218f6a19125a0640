"""Norms, gated activations and quantization in Triton: one program a token, one pass over it.

A row stays in registers between its sums and its last use. Norms sum squares in float64, so that
the order of the sum doesn't show, and every other step rounds as the reference does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwatt_kernels.backend import Activation, QuantizedActivations
from bitwatt_kernels.errors import DtypeError, ShapeError
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.reference.linear import check_group

__all__ = [
    "activate",
    "check_row_op",
    "empty_quantized",
    "gated_activation",
    "gated_activation_kernel",
    "gated_activation_quantize",
    "quantize",
    "quantize_kernel",
    "rms_norm",
    "rms_norm_kernel",
    "rms_norm_quantize",
    "round_to_int8",
    "row_block",
]

MAX_FEATURES = 65536  # a row of float32 in the registers of 16 warps, 128 a thread


@triton.jit
def _store_quantized(y, row, k, num_features, codes_ptr, scales_ptr, sums_ptr, GROUP: tl.constexpr):
    """Store row y as int8 codes round(y · s), s = 127 / max(max|y|, 1e-5), with s and Σ codes.

    Each of GROUP numbers in turn; all of them if GROUP is their block.
    """
    GROUPS: tl.constexpr = y.shape[0] // GROUP
    if GROUPS == 1:  # as a row of groups it would not stay in registers
        scale = tl.div_rn(1.0, tl.maximum(tl.max(tl.abs(y)), 1e-5)) * 127.0
        codes = round_to_int8(y * scale)
        tl.store(codes_ptr + row * num_features + k, codes, mask=k < num_features)
        tl.store(scales_ptr + row, scale)
        tl.store(sums_ptr + row, tl.sum(codes.to(tl.int32)))
    else:
        y = tl.reshape(y, [GROUPS, GROUP])
        k = tl.reshape(k, [GROUPS, GROUP])
        scales = tl.div_rn(1.0, tl.maximum(tl.max(tl.abs(y), axis=1), 1e-5)) * 127.0
        codes = round_to_int8(y * scales[:, None])
        tl.store(codes_ptr + row * num_features + k, codes, mask=k < num_features)
        num_groups = tl.cdiv(num_features, GROUP)
        g = tl.arange(0, GROUPS)
        tl.store(scales_ptr + row * num_groups + g, scales, mask=g < num_groups)
        sums = tl.sum(codes.to(tl.int32), axis=1)
        tl.store(sums_ptr + row * num_groups + g, sums, mask=g < num_groups)


@triton.jit
def round_to_int8(y):
    """Return y rounded half to even, which adding and taking away 1.5 · 2²³ does."""
    rounded = (y + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(rounded, -128.0), 127.0).to(tl.int8)


@triton.jit
def _rms_norm(x, k, num_features, weight_ptr, eps):
    """Return x / sqrt(mean x² + eps) · weight of a float32 row."""
    wide = x.to(tl.float64)
    mean_square = (tl.sum(wide * wide) / num_features).to(tl.float32)
    weight = tl.load(weight_ptr + k, mask=k < num_features, other=0).to(tl.float32)
    return x * tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps)) * weight


@triton.jit
def activate(gate, SILU: tl.constexpr):
    """Return silu(gate), or relu(gate)², in float32."""
    if SILU:
        gate = gate / (1.0 + tl.exp(-gate))
    else:
        gate = tl.maximum(gate, 0.0)
        gate = gate * gate
    return gate


@triton.jit
def _gated(gate_up_ptr, row, k, num_features, SILU: tl.constexpr):
    """Return f(gate) · up of one row, in float32."""
    start = gate_up_ptr + row * (2 * num_features)
    gate = tl.load(start + k, mask=k < num_features, other=0).to(tl.float32)
    up = tl.load(start + num_features + k, mask=k < num_features, other=0).to(tl.float32)
    return activate(gate, SILU) * up


@triton.jit
def quantize_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    sums_ptr,
    num_features,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """codes, scales and sums of a row of x [tokens, num_features]. Grid (tokens,)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + row * num_features + k, mask=k < num_features, other=0).to(tl.float32)
    _store_quantized(x, row, k, num_features, codes_ptr, scales_ptr, sums_ptr, GROUP)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,  # y, or codes if QUANTIZE
    scales_ptr,
    sums_ptr,
    num_features,
    eps,
    QUANTIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = x / sqrt(mean x² + eps) · weight of a row, rounded to y's dtype or quantized.

    Grid (tokens,).
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + row * num_features + k, mask=k < num_features, other=0).to(tl.float32)
    y = _rms_norm(x, k, num_features, weight_ptr, eps)
    if QUANTIZE:
        _store_quantized(y, row, k, num_features, y_ptr, scales_ptr, sums_ptr, GROUP)
    else:
        y_ptrs = y_ptr + row * num_features + k
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=k < num_features)


@triton.jit
def gated_activation_kernel(
    gate_up_ptr,
    weight_ptr,
    y_ptr,  # y, or codes if QUANTIZE
    scales_ptr,
    sums_ptr,
    num_features,
    eps,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = f(gate) · up of a row of gate ‖ up, RMS-normed if NORM, rounded or quantized.

    Grid (tokens,).
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y = _gated(gate_up_ptr, row, k, num_features, SILU)
    if NORM:
        y = _rms_norm(y, k, num_features, weight_ptr, eps)
    if QUANTIZE:
        _store_quantized(y, row, k, num_features, y_ptr, scales_ptr, sums_ptr, GROUP)
    else:
        y_ptrs = y_ptr + row * num_features + k
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=k < num_features)


def row_block(num_features: int) -> tuple[int, int]:
    """Return the block and the warps that hold a row of num_features.

    Raises  ShapeError above 65536 features
    """
    if num_features > MAX_FEATURES:
        raise ShapeError(f"a row has {num_features} features; the limit is {MAX_FEATURES}")
    block = max(128, triton.next_power_of_2(num_features))
    return block, min(16, max(1, block // 512))


def check_row_op(x: Tensor, weight: Tensor | None, num_features: int) -> None:
    """Raise ShapeError or DtypeError unless rows x can be normed by weight and quantized."""
    if x.dim() != 2 or not x.is_contiguous():
        raise ShapeError(f"activations have shape {list(x.shape)}; expected contiguous [T, K]")
    if not x.is_floating_point():
        raise DtypeError(f"activations are {x.dtype}; expected a float dtype")
    if weight is not None and weight.shape != (num_features,):
        raise ShapeError(f"norm weight has shape {list(weight.shape)}; expected [{num_features}]")


def empty_quantized(
    num_tokens: int, num_features: int, device: torch.device, group: int | None
) -> QuantizedActivations:
    """Return memory for quantized rows; ShapeError if their groups can't be."""
    check_group(num_features, group)
    if group is not None and group & (group - 1):
        raise ShapeError(f"groups have {group} features; the Triton kernels take powers of two")
    shape = (num_tokens,) if group is None else (num_tokens, num_features // group)
    return QuantizedActivations(
        torch.empty(num_tokens, num_features, dtype=torch.int8, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
    )


def quantize(x: Tensor, gpu: Gpu, *, group: int | None = None) -> QuantizedActivations:
    """Return x [T, K] quantized to int8 per token or group of K, rounding half to even.

    Source  arXiv:2402.17764, section 2
    """
    check_row_op(x, None, x.shape[-1])
    num_tokens, num_features = x.shape
    out = empty_quantized(num_tokens, num_features, x.device, group)
    block, num_warps = row_block(num_features)
    if num_tokens:
        quantize_kernel[(num_tokens,)](
            x,
            out.codes,
            out.scales,
            out.sums,
            num_features,
            GROUP=group or block,
            BLOCK=block,
            PDL=gpu.pdl,
            **gpu.launch_options(num_warps),
        )
    return out


def _launch_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    y: Tensor,
    scales: Tensor,
    sums: Tensor,
    gpu: Gpu,
    group: int | None = None,
) -> None:
    num_tokens, num_features = x.shape
    block, num_warps = row_block(num_features)
    if num_tokens:
        rms_norm_kernel[(num_tokens,)](
            x,
            weight,
            y,
            scales,
            sums,
            num_features,
            eps,
            QUANTIZE=y.dtype == torch.int8,
            GROUP=group or block,
            BLOCK=block,
            PDL=gpu.pdl,
            **gpu.launch_options(num_warps),
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float, gpu: Gpu) -> Tensor:
    """Return x / sqrt(mean x² + eps) · weight, per token, [T, K] in x's dtype.

    Source  arXiv:1910.07467
    """
    check_row_op(x, weight, x.shape[-1])
    y = torch.empty_like(x)
    _launch_rms_norm(x, weight, eps, y, y, y, gpu)
    return y


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, gpu: Gpu, *, group: int | None = None
) -> QuantizedActivations:
    """Return quantize(rms_norm(x)) with no rounding in between."""
    check_row_op(x, weight, x.shape[-1])
    out = empty_quantized(x.shape[0], x.shape[1], x.device, group)
    _launch_rms_norm(x, weight, eps, out.codes, out.scales, out.sums, gpu, group)
    return out


def _launch_gated(
    gate_up: Tensor,
    activation: Activation,
    weight: Tensor | None,
    eps: float,
    y: Tensor,
    scales: Tensor,
    sums: Tensor,
    gpu: Gpu,
    group: int | None = None,
) -> None:
    num_tokens, num_features = y.shape
    block, num_warps = row_block(num_features)
    if num_tokens:
        gated_activation_kernel[(num_tokens,)](
            gate_up,
            gate_up if weight is None else weight,
            y,
            scales,
            sums,
            num_features,
            eps,
            SILU=activation == "silu",
            NORM=weight is not None,
            QUANTIZE=y.dtype == torch.int8,
            GROUP=group or block,
            BLOCK=block,
            PDL=gpu.pdl,
            **gpu.launch_options(num_warps),
        )


def gated_activation(gate_up: Tensor, activation: Activation, gpu: Gpu) -> Tensor:
    """Return f(gate) · up, [T, F] in gate_up's dtype, for gate_up [T, 2 · F] = gate ‖ up."""
    num_tokens, num_features = gate_up.shape[0], gate_up.shape[-1] // 2
    check_row_op(gate_up, None, num_features)
    y = torch.empty(num_tokens, num_features, dtype=gate_up.dtype, device=gate_up.device)
    _launch_gated(gate_up, activation, None, 0.0, y, y, y, gpu)
    return y


def gated_activation_quantize(
    gate_up: Tensor,
    activation: Activation,
    weight: Tensor | None,
    eps: float,
    gpu: Gpu,
    *,
    group: int | None = None,
) -> QuantizedActivations:
    """Return f(gate) · up, RMS-normed by weight [F] unless None, quantized."""
    num_tokens, num_features = gate_up.shape[0], gate_up.shape[-1] // 2
    check_row_op(gate_up, weight, num_features)
    out = empty_quantized(num_tokens, num_features, gate_up.device, group)
    _launch_gated(gate_up, activation, weight, eps, out.codes, out.scales, out.sums, gpu, group)
    return out
