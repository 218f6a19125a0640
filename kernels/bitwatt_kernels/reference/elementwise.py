"""Norms and gated activations in plain torch, float32 inside."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwatt_kernels.backend import Activation, QuantizedActivations
from bitwatt_kernels.reference.linear import quantize

__all__ = [
    "gated_activation",
    "gated_activation_quantize",
    "rms_norm",
    "rms_norm_float32",
    "rms_norm_quantize",
]


def rms_norm_float32(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return rms_norm(x) before it is rounded to x's dtype."""
    x = x.float()
    # Rounded once from float64, so that the order of the sum doesn't show.
    mean_square = x.double().square().mean(dim=-1, keepdim=True).float()
    return x * torch.rsqrt(mean_square + eps) * weight.float()


def _gated_activation_float32(gate_up: Tensor, activation: Activation) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    match activation:
        case "relu2":
            return F.relu(gate).square() * up
        case "silu":
            return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean x² + eps) · weight, per token.

    x       [T, K]
    weight  [K]
    Source  arXiv:1910.07467
    """
    return rms_norm_float32(x, weight, eps).to(x.dtype)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, *, group: int | None = None
) -> QuantizedActivations:
    """Return quantize(rms_norm(x)) with no rounding in between."""
    return quantize(rms_norm_float32(x, weight, eps), group=group)


def gated_activation(gate_up: Tensor, activation: Activation) -> Tensor:
    """Return f(gate) · up, [T, F], for gate_up [T, 2 · F] = gate ‖ up."""
    return _gated_activation_float32(gate_up, activation).to(gate_up.dtype)


def gated_activation_quantize(
    gate_up: Tensor,
    activation: Activation,
    weight: Tensor | None,
    eps: float,
    *,
    group: int | None = None,
) -> QuantizedActivations:
    """Return f(gate) · up, RMS-normed by weight [F] unless None, quantized."""
    y = _gated_activation_float32(gate_up, activation)
    return quantize(y if weight is None else rms_norm_float32(y, weight, eps), group=group)
