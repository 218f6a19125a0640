"""BitLinear of BitNet b1.58 in plain torch: the oracle for quantize and ternary_linear."""

import torch
from torch import Tensor

from bitwatt_kernels.backend import QuantizedActivations
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.packing import TernaryWeight, unpack

__all__ = ["accumulate", "quantize", "rescale", "ternarize", "ternary_linear"]

QUANTIZATION_EPS = 1e-5
INT8_MAX = 127


def quantize(x: Tensor) -> QuantizedActivations:
    """Return x quantized per token to int8, rounding half to even.

    x       [T, K], any float dtype; computed in float32
    Source  arXiv:2402.17764, section 2; the authors' "Training Tips, Code and FAQ"
    """
    x = x.float()
    scales = INT8_MAX / x.abs().amax(dim=-1).clamp(min=QUANTIZATION_EPS)
    codes = (x * scales[:, None]).round().clamp(-128, INT8_MAX).to(torch.int8)
    return QuantizedActivations(codes, scales, codes.sum(dim=-1, dtype=torch.int32))


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a float matrix as int8 in {-1, 0, 1} and its float32 scale mean|W|.

    weight  [out_features, in_features], any float dtype; computed in float32
    Source  arXiv:2402.17764, section 2
    """
    weight = weight.float()
    scale = weight.abs().mean().clamp(min=QUANTIZATION_EPS)
    return (weight * (1.0 / scale)).round().clamp(-1, 1).to(torch.int8), scale


def accumulate(codes: Tensor, weight: Tensor) -> Tensor:
    """Return codes · weightᵀ exactly, [T, out_features] int32.

    codes   [T, in_features] int8
    weight  [out_features, in_features] int8
    """
    return codes.to(torch.int32) @ weight.to(torch.int32).T


def rescale(
    accumulators: Tensor,
    x: QuantizedActivations,
    weight: TernaryWeight,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the int32 accumulators as outputs: scaled in float32, rounded once to dtype."""
    y = accumulators.float() / x.scales[:, None] * weight.scales
    if weight.bias is not None:
        y = y + weight.bias
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)


def ternary_linear(
    x: QuantizedActivations, weight: TernaryWeight, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the output of one BitLinear; shapes and rounding as in Backend.ternary_linear.

    Raises  ShapeError if x and weight disagree on in_features
    """
    if x.codes.shape[-1] != weight.in_features:
        raise ShapeError(
            f"activations have {x.codes.shape[-1]} features; the weight takes {weight.in_features}"
        )
    return rescale(accumulate(x.codes, unpack(weight.codes)), x, weight, residual, dtype)
