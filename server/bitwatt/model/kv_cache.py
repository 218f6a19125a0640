"""Keys and values of every layer, in blocks that sequences own."""

from math import prod

import torch
from bitwatt_kernels.backend import BLOCK_SIZE

from bitwatt.model.config import ModelConfig

__all__ = ["KVCache"]


class KVCache:
    """A pool of num_blocks blocks of BLOCK_SIZE tokens; a block id means the same in every layer.

    layers  [num_layers, 2, num_blocks, G, BLOCK_SIZE, D], keys then values; not initialized, for
            backends read nothing that was not written
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.layers = torch.empty(_shape(config, num_blocks), dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.layers.nbytes

    @staticmethod
    def bytes_per_block(config: ModelConfig, dtype: torch.dtype) -> int:
        """Return what one block takes, over all layers."""
        return prod(_shape(config, 1)) * dtype.itemsize


def _shape(config: ModelConfig, num_blocks: int) -> tuple[int, ...]:
    kv_heads, head_dim = config.num_kv_heads, config.head_dim
    return (config.num_layers, 2, num_blocks, kv_heads, BLOCK_SIZE, head_dim)
