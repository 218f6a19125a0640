"""The table of rotary angles a model reads, stretched as its config says."""

import math

import torch
from bitwatt_kernels.reference import attention as reference
from torch import Tensor

from bitwatt.model.config import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    RopeDivisors,
    RopeScaling,
    YarnRopeScaling,
)

__all__ = ["rope_divisors", "rope_table"]


def rope_table(config: ModelConfig, device: torch.device) -> Tensor:
    """Return cos ‖ sin of each position's angles, [max_model_len, head_dim] float32."""
    scaling = config.rope_scaling
    table = reference.rope_table(
        config.max_model_len,
        config.head_dim,
        config.rope_theta,
        stretch=None if scaling is None else lambda f: _stretch(f, scaling, config.rope_theta),
    )
    if isinstance(scaling, YarnRopeScaling):
        table *= scaling.attention_factor
    return table.to(device)


def rope_divisors(config: ModelConfig) -> Tensor:
    """Return what each rotary frequency is divided by, [head_dim / 2] float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return torch.ones_like(frequencies)
    return frequencies / _stretch(frequencies, config.rope_scaling, config.rope_theta)


def _stretch(frequencies: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Return each frequency divided: by one divisor or its own, or as Llama 3.1 or YaRN do.

    These divide low frequencies by the factor, leave high ones as they are, and blend between.
    """
    match scaling:
        case RopeDivisors():
            return frequencies / torch.tensor(scaling.divisors)
        case LinearRopeScaling():
            return frequencies / scaling.factor
        case Llama3RopeScaling():
            kept = _kept_by_llama3(frequencies, scaling)
        case YarnRopeScaling():
            kept = _kept_by_yarn(len(frequencies), scaling, theta)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _kept_by_llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Return the share of each frequency that stays.

    Source  "The Llama 3 Herd of Models", arXiv:2407.21783, and its published code
    """
    turns = scaling.original_max_model_len * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_by_yarn(count: int, scaling: YarnRopeScaling, theta: float) -> Tensor:
    """Return the share of each of count frequencies that stays.

    It falls along the frequencies' indexes, from the one of beta_fast turns within the first
    context to the one of beta_slow.
    Source  arXiv:2309.00071, section 3.2, and its published code for rounding and bounds
    """
    head_dim = 2 * count

    def index(turns: float) -> float:
        ratio = scaling.original_max_model_len / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncates:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    indexes = torch.arange(count, dtype=torch.float32)
    return 1 - ((indexes - first) / (last - first)).clamp(0, 1)
