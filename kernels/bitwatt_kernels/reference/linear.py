"""BitLinear of BitNet b1.58 in plain torch: the oracle for quantize and ternary_linear."""

from collections.abc import Iterable

import torch
from torch import Tensor

from bitwatt_kernels.backend import QuantizedActivations
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.packing import IN_FEATURES_MULTIPLE, TernaryWeight, unpack

__all__ = [
    "accumulate",
    "check_group",
    "quantize",
    "rescale",
    "sum_groups",
    "ternarize",
    "ternary_linear",
]

QUANTIZATION_EPS = 1e-5
INT8_MAX = 127


def check_group(num_features: int, group: int | None) -> None:
    """Raise ShapeError unless features make two or more groups of whole 64s, or group is None."""
    if group is None:
        return
    is_size = group > 0 and group % IN_FEATURES_MULTIPLE == 0
    if not is_size or num_features % group or num_features < 2 * group:
        raise ShapeError(
            f"{num_features} features don't make two or more groups of {group}, "
            f"which must be a multiple of {IN_FEATURES_MULTIPLE}"
        )


def quantize(x: Tensor, *, group: int | None = None) -> QuantizedActivations:
    """Return x quantized to int8 per token, or per group of its features, rounding half to even.

    x       [T, K], any float dtype; computed in float32
    Source  arXiv:2402.17764, section 2; the authors' "Training Tips, Code and FAQ"
    """
    num_features = x.shape[-1]
    check_group(num_features, group)
    width = group or num_features
    x = x.float().reshape(len(x), num_features // width, width)
    scales = INT8_MAX / x.abs().amax(dim=-1).clamp(min=QUANTIZATION_EPS)
    codes = (x * scales[..., None]).round().clamp(-128, INT8_MAX).to(torch.int8)
    sums = codes.sum(dim=-1, dtype=torch.int32)
    if group is None:
        scales, sums = scales[:, 0], sums[:, 0]
    return QuantizedActivations(codes.flatten(-2), scales, sums)


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
    return _finish(y, weight, residual, dtype)


def sum_groups(accumulators: Iterable[Tensor], x: QuantizedActivations, scales: Tensor) -> Tensor:
    """Return the groups' int32 accumulators scaled and added up in their order, in float32.

    accumulators  [T, out_features] of each group
    scales        [out_features, groups], the weight's
    """
    y = torch.zeros(len(x.codes), len(scales), device=scales.device)
    steps = 1.0 / x.scales
    for i, accumulator in enumerate(accumulators):
        y += accumulator.float() * steps[:, i, None] * scales[:, i]
    return y


def _finish(
    y: Tensor, weight: TernaryWeight, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
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
    x.check_fit(weight.in_features, weight.group)
    values = unpack(weight.codes)
    if weight.group is None:
        return rescale(accumulate(x.codes, values), x, weight, residual, dtype)
    groups = zip(
        torch.split(x.codes, weight.group, 1), torch.split(values, weight.group, 1), strict=True
    )
    y = sum_groups((accumulate(codes, part) for codes, part in groups), x, weight.scales)
    return _finish(y, weight, residual, dtype)
