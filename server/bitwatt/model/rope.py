"""The table of rotary angles a model reads, stretched as its config says."""

import math

import torch
from torch import Tensor

from bitwatt.model.config import Llama3RopeScaling, ModelConfig

__all__ = ["rope_table"]


def rope_table(config: ModelConfig, device: torch.device) -> Tensor:
    """Return cos ‖ sin of each position's angles, [max_model_len, head_dim] float32.

    Source  arXiv:2104.09864, with the pairs (i, i + head_dim / 2)
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        frequencies = _stretch(frequencies, config.rope_scaling)
    angles = torch.arange(config.max_model_len, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)


def _stretch(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Return low frequencies divided by the factor, high ones as they are, a blend between.

    Source  "The Llama 3 Herd of Models", arXiv:2407.21783, and its published code
    """
    turns = scaling.original_max_model_len * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
