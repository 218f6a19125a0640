"""Models of random weights, for benchmarks and tests."""

from itertools import product

import torch
from bitwatt_kernels.backend import Backend
from bitwatt_kernels.packing import TernaryWeight
from torch import Tensor

from bitwatt.model.build import Weights, build_transformer
from bitwatt.model.config import ModelConfig
from bitwatt.model.transformer import Transformer

__all__ = ["random_model"]

# Every byte that holds four codes below 3.
_BYTES = [a | b << 2 | c << 4 | d << 6 for a, b, c, d in product(range(3), repeat=4)]


class _RandomSource:
    """Draws tensors on a device; ternary codes are drawn packed, with no float masters."""

    is_ternary = True

    def __init__(self, config: ModelConfig, device: torch.device, seed: int) -> None:
        self.config = config
        self.notices: list[str] = []
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._bytes = torch.tensor(_BYTES, dtype=torch.uint8, device=device)

    def dense(self, _name: str, /, *shape: int) -> Tensor:
        if len(shape) == 1:  # a norm
            return torch.ones(shape, device=self._device)
        return torch.randn(shape, generator=self._generator, device=self._device) * 0.02

    def ternary(self, _name: str, /, out_features: int, in_features: int) -> TernaryWeight:
        drawn = torch.randint(
            len(_BYTES),
            (out_features, in_features // 4),
            generator=self._generator,
            device=self._device,
            dtype=torch.uint8,
        )
        codes = self._bytes[drawn.int()]
        scales = torch.full((out_features,), (1.5 / in_features) ** 0.5, device=self._device)
        return TernaryWeight(codes, scales)


def random_model(
    config: ModelConfig, *, weights: Weights, backend: Backend, dtype: torch.dtype, seed: int
) -> Transformer:
    """Return a model of the config's shape with uniformly random ternary linears.

    The same seed gives the same weights in both forms, on one kind of device.
    """
    source = _RandomSource(config, backend.device, seed)
    return build_transformer(source, weights=weights, backend=backend, dtype=dtype)
