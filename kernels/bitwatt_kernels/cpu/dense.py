"""Dense matmuls of the CPU's libraries: the fastest, and one whose rows don't know each other."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TILE_ROWS", "has_blocked_kernels", "has_tile_kernels", "linear", "tiled_linear"]

TILE_ROWS = 16


def has_blocked_kernels(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies this dtype natively here, from weights blocked for it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False


def has_tile_kernels(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies this dtype by AMX here."""
    if not has_blocked_kernels(dtype) or not torch.cpu._is_amx_tile_supported():
        return False
    return dtype == torch.bfloat16 or torch.cpu._is_amx_fp16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x · weightᵀ (+ bias), [T, out_features].

    weight  [out_features, in_features] in x's dtype, or blocked by oneDNN
    """
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · weightᵀ by matmuls of TILE_ROWS rows each, the last one padded with zeros.

    A library picks its kernel, and with it the order of its sums, by the matmul's shape. With
    one shape for all, a row's bits depend neither on the batch nor on the row's place in it.
    Shapes are linear()'s.
    """
    num_rows = x.shape[0]
    num_padded = -num_rows % TILE_ROWS
    if num_padded:
        x = F.pad(x, (0, 0, 0, num_padded))
    tiles = [linear(tile, weight) for tile in torch.split(x, TILE_ROWS)]
    return torch.cat(tiles)[:num_rows] if len(tiles) > 1 else tiles[0][:num_rows]
