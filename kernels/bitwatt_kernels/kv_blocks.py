"""How a layer's keys and values lie in the blocks of its KV cache: as floats, or as 8-bit codes.

Floats are [2, num_blocks, G, BLOCK_SIZE, D], keys then values. Of codes, a block's keys or values
of one head are D codes a token and then a float32 scale a token, as bytes:

    keys    [D / 4][BLOCK_SIZE][4] uint8, the code plus 128: a token's four neighbours lie where the
            kernels' lines of 8-bit weights have a row's, and are multiplied as these are
    values  [BLOCK_SIZE][D] int8
    scales  [BLOCK_SIZE] float32, behind either

A head of a token is code · scale, the code x · 127 / max|x| rounded half to even.
"""

import torch
from torch import Tensor

from bitwatt_kernels.backend import BLOCK_SIZE
from bitwatt_kernels.errors import ShapeError

__all__ = ["cache_shape", "dequantize", "head_dim_of", "quantize_heads", "read_rows", "write"]

_SCALE_BYTES = 4
_NEIGHBOURS = 4  # codes of a key that lie together
_SMALLEST_PEAK = 1e-30  # under which 127 / max|x| would leave float32


def cache_shape(
    num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """Return that of a layer: [2, num_blocks, G, BLOCK_SIZE, D], or [2, num_blocks, G, bytes].

    Raises  ShapeError where head_dim is not one that int8 takes
    """
    if dtype != torch.int8:
        return 2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim
    if head_dim % _NEIGHBOURS:
        raise ShapeError(f"head_dim is {head_dim}; a cache in int8 takes multiples of 4")
    return 2, num_blocks, num_kv_heads, BLOCK_SIZE * (head_dim + _SCALE_BYTES)


def head_dim_of(kv_cache: Tensor) -> int:
    """Return D of a layer's cache.

    Raises  ShapeError where its shape is none of cache_shape's
    """
    shape = kv_cache.shape
    if kv_cache.dtype != torch.int8:
        if len(shape) == 5 and shape[0] == 2 and shape[3] == BLOCK_SIZE:
            return shape[4]
    elif len(shape) == 4 and shape[0] == 2:
        head_dim, rest = divmod(shape[3], BLOCK_SIZE)
        if rest == 0 and head_dim > _SCALE_BYTES and head_dim % _NEIGHBOURS == 0:
            return head_dim - _SCALE_BYTES
    raise ShapeError(
        f"the cache is {kv_cache.dtype} {list(shape)}; expected [2, num_blocks, heads, "
        f"{BLOCK_SIZE}, head_dim], of int8 [2, num_blocks, heads, {BLOCK_SIZE} · (head_dim + 4)]"
    )


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes int8, as x [..., D], and scales float32 [...], by which a code is multiplied.

    A head with an infinite value or a NaN has codes of 0 and NaN as its scale: it is NaN as a
    whole, and no other head is.
    """
    x = x.float()
    peak = x.abs().amax(dim=-1)
    is_finite = peak.isfinite()
    peak = peak.clamp(min=_SMALLEST_PEAK)
    codes = (x * (torch.full_like(peak, 127.0) / peak)[..., None]).round()
    codes = codes.masked_fill(~is_finite[..., None], 0.0).to(torch.int8)
    return codes, (peak * (1 / 127)).masked_fill(~is_finite, torch.nan)


def write(kv_cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write tokens' keys and values [T, G, D] where their slots [T] int64 say, all at least 0."""
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    if kv_cache.dtype != torch.int8:
        kv_cache[0, block, :, offset] = keys.to(kv_cache.dtype)
        kv_cache[1, block, :, offset] = values.to(kv_cache.dtype)
        return
    lines, value_codes, scales = _parts(kv_cache)
    codes, scales[0, block, :, offset] = quantize_heads(keys)
    stored = (codes.short() + 128).to(torch.uint8)
    num_lines = lines.shape[2]
    lines[block, :, :, offset] = stored.view(*keys.shape[:2], num_lines, _NEIGHBOURS)
    value_codes[block, :, offset], scales[1, block, :, offset] = quantize_heads(values)


def dequantize(kv_cache: Tensor) -> Tensor:
    """Return a cache of int8 as [2, num_blocks, G, BLOCK_SIZE, D] float64: exact products."""
    lines, values, scales = _parts(kv_cache)
    keys = lines.transpose(2, 3).flatten(3).double() - 128
    return torch.stack([keys, values.double()]) * scales.double()[..., None]


def read_rows(kv_cache: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values [..., D] at rows [...] of (block · G + head) · BLOCK_SIZE + offset.

    In the cache's dtype; those of int8 in float32, each product rounded once.
    """
    if kv_cache.dtype != torch.int8:
        keys, values = kv_cache.view(2, -1, kv_cache.shape[4])
        embed = torch.nn.functional.embedding
        return embed(rows, keys), embed(rows, values)
    num_kv_heads = kv_cache.shape[2]
    head, offset = rows // BLOCK_SIZE, rows % BLOCK_SIZE
    block, head = head // num_kv_heads, head % num_kv_heads
    lines, value_codes, scales = _parts(kv_cache)
    keys = lines[block, head, :, offset].flatten(-2).float() - 128
    values = value_codes[block, head, offset].float()
    key_scales, value_scales = scales[:, block, head, offset][..., None]
    return keys * key_scales, values * value_scales


def _parts(kv_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of a cache of int8, [2, blocks, G, bytes].

    The keys' lines [blocks, G, D / 4, BLOCK_SIZE, 4] uint8, the values' codes [blocks, G,
    BLOCK_SIZE, D] int8, and the scales of both [2, blocks, G, BLOCK_SIZE] float32.
    """
    num_codes = kv_cache.shape[-1] - BLOCK_SIZE * _SCALE_BYTES
    keys, values = kv_cache[..., :num_codes]
    lines = keys.view(torch.uint8).unflatten(-1, (-1, BLOCK_SIZE, _NEIGHBOURS))
    scales = kv_cache[..., num_codes:].view(torch.float32)
    return lines, values.unflatten(-1, (BLOCK_SIZE, -1)), scales
