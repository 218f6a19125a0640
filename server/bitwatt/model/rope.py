"""The table of rotary angles a model reads, stretched as its config says."""

import math

import torch
from bitwatt_kernels.reference import attention as reference
from torch import Tensor

from bitwatt.model.config import Llama3RopeScaling, ModelConfig, RopeDivisors

__all__ = ["rope_table"]


def rope_table(config: ModelConfig, device: torch.device) -> Tensor:
    """Return cos ‖ sin of each position's angles, [max_model_len, head_dim] float32."""
    scaling = config.rope_scaling
    table = reference.rope_table(
        config.max_model_len,
        config.head_dim,
        config.rope_theta,
        stretch=None if scaling is None else lambda frequencies: _stretch(frequencies, scaling),
    )
    return table.to(device)


def _stretch(frequencies: Tensor, scaling: Llama3RopeScaling | RopeDivisors) -> Tensor:
    """Return each frequency divided: by its own divisor, or as Llama 3.1 does.

    That divides low frequencies by the factor, leaves high ones as they are, and blends between.
    Source  "The Llama 3 Herd of Models", arXiv:2407.21783, and its published code
    """
    if isinstance(scaling, RopeDivisors):
        return frequencies / torch.tensor(scaling.divisors)
    turns = scaling.original_max_model_len * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
