"""Models of random weights, for benchmarks and tests."""

from random import Random

import torch
from bitwatt_kernels.backend import Backend
from bitwatt_kernels.packing import VALID_BYTES, TernaryWeight
from torch import Tensor

from bitwatt.model.build import build_transformer
from bitwatt.model.config import HeadBits, ModelConfig, Weights
from bitwatt.model.padding import padded
from bitwatt.model.transformer import Transformer

__all__ = ["random_model"]

# Values drawn once and repeated, from another start in each tensor: a copy costs less than a
# draw. As many as the embedding has, up to this; odd, so that the rows of a matrix differ.
_MAX_POOL_SIZE = (1 << 22) + 1


class _RandomSource:
    """Draws tensors on a device; ternary codes are drawn packed, with no float masters."""

    is_ternary = True

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        seed: int,
        group: int | None,
        *,
        has_ternary_head: bool,
    ) -> None:
        self.config = config
        self._group = group
        self._has_ternary_head = has_ternary_head
        self.notices: list[str] = []
        self._device = device
        self._starts = Random(seed)  # noqa: S311
        generator = torch.Generator(device).manual_seed(seed)
        self._size = min(_MAX_POOL_SIZE, config.vocab_size * config.hidden_size | 1)
        drawn = torch.randint(len(VALID_BYTES), (self._size,), generator=generator, device=device)
        self._bytes = torch.tensor(VALID_BYTES, dtype=torch.uint8, device=device)[drawn]
        normal = torch.randn(self._size, generator=generator, device=device)
        self._normal = (normal * 0.02).bfloat16()

    def dense(self, _name: str, /, *shape: int, fits: torch.dtype) -> Tensor:  # noqa: ARG002
        if len(shape) == 1:  # a norm
            return torch.ones(shape, device=self._device)
        return self._fill(self._normal, *shape)

    def stores_ternary(self, _name: str, /) -> bool:
        return self._has_ternary_head

    def ternary(
        self,
        _name: str,
        /,
        out_features: int,
        in_features: int,
        *,
        fits: torch.dtype,  # noqa: ARG002
    ) -> TernaryWeight:
        codes = self._fill(self._bytes, out_features, padded(in_features) // 4)
        size = (1.5 / in_features) ** 0.5
        scales = torch.full((out_features,), size, device=self._device)
        if self._group is not None:  # in float16, as files have them
            scales = scales.half()[:, None].repeat(1, in_features // self._group)
        return TernaryWeight(codes, scales)

    def _fill(self, pool: Tensor, rows: int, columns: int) -> Tensor:
        start = self._starts.randrange(self._size)
        end = start + rows * columns
        if end <= self._size:
            return pool[start:end].clone().view(rows, columns)
        return pool.repeat(-(-end // self._size))[start:end].view(rows, columns)


def random_model(
    config: ModelConfig,
    *,
    weights: Weights,
    backend: Backend,
    dtype: torch.dtype,
    seed: int,
    head_bits: HeadBits = 16,
    group: int | None = None,
    has_ternary_head: bool = False,
) -> Transformer:
    """Return a model of the config's shape with uniformly random ternary linears.

    The same seed gives the same weights in both forms, on one kind of device.

    group             weights that share a scale, or None for all of a row
    has_ternary_head  embedding and head are ternary too
    """
    source = _RandomSource(config, backend.device, seed, group, has_ternary_head=has_ternary_head)
    return build_transformer(
        source, weights=weights, backend=backend, dtype=dtype, head_bits=head_bits
    )
