"""Keys and values of every layer, in blocks that sequences own."""

from math import prod

import torch
from bitwatt_kernels.kv_blocks import cache_shape

from bitwatt.model.config import ModelConfig

__all__ = ["KVCache"]


class KVCache:
    """A pool of num_blocks blocks of BLOCK_SIZE tokens; a block id means the same in every layer.

    layers  [num_layers, ...], a layer's as bitwatt_kernels.kv_blocks has it; not initialized, for
            backends read nothing that was not written
    Raises  ShapeError where the model's head_dim is not one that dtype takes
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.layers = torch.empty(_shape(config, num_blocks, dtype), dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.layers.nbytes

    @staticmethod
    def bytes_per_block(config: ModelConfig, dtype: torch.dtype) -> int:
        """Return what one block takes, over all layers; raises as the class does."""
        return prod(_shape(config, 1, dtype)) * dtype.itemsize


def _shape(config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> tuple[int, ...]:
    layer = cache_shape(num_blocks, config.num_kv_heads, config.head_dim, dtype)
    return (config.num_layers, *layer)
