"""Which rows and columns of a matmul a program computes."""

import triton
import triton.language as tl

__all__ = ["recomputable", "tile_indices"]


@triton.jit
def tile_indices(
    tile,
    num_tokens,
    out_features,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
):
    """Return the output features [BLOCK_OUT] and tokens [BLOCK_TOKENS] of a tile, in int32.

    Tiles that follow each other share weights: GROUP_TOKENS tiles of tokens come before the next
    tile of output features. At the edges both run past the matrix.
    """
    tiles_out = tl.cdiv(out_features, BLOCK_OUT)
    tiles_tokens = tl.cdiv(num_tokens, BLOCK_TOKENS)
    first_in_group = tile // (GROUP_TOKENS * tiles_out) * GROUP_TOKENS
    group = tl.minimum(tiles_tokens - first_in_group, GROUP_TOKENS)
    in_group = tile % (GROUP_TOKENS * tiles_out)
    n = in_group // group * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m = (first_in_group + in_group % group) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    return n, m


@triton.jit
def recomputable(index):
    """Return index, so that what follows from it is not kept in registers from where it was known.

    Rows and tokens of a tile, kept through the loop over weights, went through local memory.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [index], dtype=tl.int32, is_pure=False, pack=1
    )
