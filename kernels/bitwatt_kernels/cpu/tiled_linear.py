"""Dense matmuls whose rows don't know each other."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TILE_ROWS", "tiled_linear"]

TILE_ROWS = 16


def tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · weightᵀ by matmuls of TILE_ROWS rows each, the last one padded with zeros.

    A library picks its kernel, and with it the order of its sums, by the matmul's shape. With
    one shape for all, a row's bits depend neither on the batch nor on the row's place in it.

    x        [T, in_features], in weight's dtype
    weight   [out_features, in_features]
    Returns  [T, out_features]
    """
    num_rows = x.shape[0]
    num_padded = -num_rows % TILE_ROWS
    if num_padded:
        x = F.pad(x, (0, 0, 0, num_padded))
    out = x.new_empty(x.shape[0], weight.shape[0])
    transposed = weight.T
    for first in range(0, x.shape[0], TILE_ROWS):
        rows = slice(first, first + TILE_ROWS)
        torch.mm(x[rows], transposed, out=out[rows])
    return out[:num_rows]
