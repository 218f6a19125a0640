"""A linear layer trained through its ternary or binary weights and int8 activations (BitNet)."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 1e-5


def straight_through(x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """Return `quantized`, to the last bit, with the gradient of `x`, which is finite."""
    return quantized.detach() + (x - x.detach())


def weight_scale(weight: torch.Tensor) -> torch.Tensor:
    """Return the mean magnitude of the weights, a float32 scalar of at least EPSILON."""
    return weight.float().abs().mean().clamp(min=EPSILON)


def ternary_codes(weight: torch.Tensor) -> torch.Tensor:
    """Return the nearest codes −1, 0 or 1 of weight / weight_scale(weight), as float32."""
    return (weight.float() / weight_scale(weight)).round().clamp(-1, 1)


def binary_codes(weight: torch.Tensor) -> torch.Tensor:
    """Return 1 for weights above their mean, −1 for the others, as float32.

    Source   "BitNet: Scaling 1-bit Transformers for Large Language Models", section 2.1
    """
    weight = weight.float()
    return torch.where(weight > weight.mean(), 1.0, -1.0)


class Codes(Protocol):
    """What makes a weight's codes, of −1, 0 and 1 at most."""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor: ...


class BitLinear(nn.Module):
    """y = x_q @ codes.T / s · scale, where x_q = round(x · s) and s = 127 / max|x| of the row.

    The matrix product runs on integers: in float32 it is exact, in bfloat16 (under autocast) its
    operands are, and each sum is rounded once. Gradients pass straight through both roundings and
    take the scales for constants.

    Source   "The Era of 1-bit LLMs: Training Tips, Code and FAQ", section 3
    """

    def __init__(self, in_features: int, out_features: int, codes: Codes = ternary_codes) -> None:
        super().__init__()
        self.codes = codes
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features] in float32 from x [..., in_features] of any float type."""
        x = x.float()
        factor = 127 / x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=EPSILON)
        scaled = x * factor
        x_codes = straight_through(scaled, scaled.round().clamp(-128, 127))

        scale = weight_scale(self.weight.detach())
        w_codes = straight_through(self.weight / scale, self.codes(self.weight))

        return F.linear(x_codes, w_codes).float() / factor * scale
