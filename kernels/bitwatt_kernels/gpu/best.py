"""The best of floats as one integer: a larger float is a larger one, of equal floats the first."""

import triton
import triton.language as tl

__all__ = ["best_in_tile", "float_of", "index_of", "key_of"]

_LARGEST = tl.constexpr(0x7FFFFFFF)  # as a key a NaN's, above infinity's; as an index none's


@triton.jit
def key_of(x):
    """Return int32 in the order of float32; 0.0 and -0.0 are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _LARGEST)


@triton.jit
def float_of(key):
    """Return the float32 of an int32 key, or of a scalar one in any integer type."""
    bits = key.to(tl.int32)
    bits = bits ^ ((bits >> 31) & _LARGEST)
    return tl.max((tl.full([1], 0, tl.int32) + bits).to(tl.float32, bitcast=True))


@triton.jit
def best_in_tile(y, n, out_features):
    """Return each column's largest and its row, [BLOCK_TOKENS] int64: key ‖ falling index.

    A NaN is larger than all.

    y  [BLOCK_OUT, BLOCK_TOKENS] float32
    n  [BLOCK_OUT] int32, the rows' indexes; those from out_features on are none
    """
    has_nan = tl.max(((y != y) & (n < out_features)[:, None]).to(tl.int32), axis=0) > 0
    y = tl.where((y == y) & (n < out_features)[:, None], y, float("-inf"))
    top = tl.max(y, axis=0)
    index = tl.min(tl.where(y == top[None, :], n[:, None], _LARGEST), axis=0)
    key = tl.where(has_nan, _LARGEST, key_of(top))
    return (key.to(tl.int64) << 32) | (index ^ _LARGEST).to(tl.int64)


@triton.jit
def index_of(best):
    """Return the index that best_in_tile has put beside its key."""
    return (best & _LARGEST).to(tl.int32) ^ _LARGEST
