"""Keys and values as 8-bit codes in the blocks of a GPU's cache: the numbers of kv_blocks.

A block's keys or values of one head are [BLOCK_SIZE][D] int8 and then [BLOCK_SIZE] float32 scales,
so that a token's codes lie together. Codes and scales are bit for bit kv_blocks.quantize_heads'.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwatt_kernels.backend import BLOCK_SIZE
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.gpu.elementwise import round_to_int8
from bitwatt_kernels.kv_blocks import head_dim_of

__all__ = ["CacheParts", "cache_parts", "quantize_heads"]

_NARROWEST = 32  # values of a row that tensor cores multiply as int8


@triton.jit
def quantize_heads(x):
    """Return codes int8, as x [R, D] float32, and scales float32 [R]; see kv_blocks."""
    peak = tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=1)
    is_finite = peak < float("inf")
    clamped = tl.where(is_finite, tl.maximum(peak, 1e-30), 1.0)
    x = tl.where(is_finite[:, None], x, 0.0)
    codes = round_to_int8(x * tl.div_rn(tl.zeros_like(clamped) + 127.0, clamped)[:, None])
    return codes, tl.where(is_finite, clamped * (1.0 / 127.0), float("nan"))


@dataclass(frozen=True, slots=True)
class CacheParts:
    """A layer's cache as kernels take it.

    keys, values  from the first element on
    key_scales, value_scales  float32, from the first block's first on; of floats the keys again
    block_stride  elements of a block
    is_int8       whether elements are codes
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor
    block_stride: int
    num_kv_heads: int
    head_dim: int
    is_int8: bool

    @property
    def dim_block(self) -> int:
        """Return head_dim as a kernel's tiles have it."""
        narrowest = _NARROWEST if self.is_int8 else 1
        return max(narrowest, int(triton.next_power_of_2(self.head_dim)))


def cache_parts(kv_cache: Tensor) -> CacheParts:
    """Return its parts; ShapeError unless blocks are contiguous, of an even head_dim."""
    head_dim = head_dim_of(kv_cache)
    is_int8 = kv_cache.dtype == torch.int8
    strides = (kv_cache.shape[3], 1) if is_int8 else (BLOCK_SIZE * head_dim, head_dim, 1)
    if kv_cache.stride()[2:] != strides or head_dim % 2:
        raise ShapeError(
            f"kv_cache has strides {kv_cache.stride()} for shape {list(kv_cache.shape)}; "
            "expected contiguous blocks of an even head_dim"
        )
    keys, values = kv_cache[0], kv_cache[1]
    key_scales = value_scales = keys
    if is_int8:
        first = BLOCK_SIZE * head_dim // 4
        key_scales, value_scales = (
            half.view(torch.float32)[..., first:] for half in (keys, values)
        )
    return CacheParts(
        keys,
        values,
        key_scales,
        value_scales,
        kv_cache.stride(1),
        kv_cache.shape[2],
        head_dim,
        is_int8,
    )
