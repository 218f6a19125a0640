"""Rotary embedding and causal attention over a paged KV cache, in plain torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from bitwatt_kernels import kv_blocks
from bitwatt_kernels.backend import BLOCK_SIZE, HeadNorms, StepLayout
from bitwatt_kernels.reference.elementwise import rms_norm_float32

__all__ = ["attention", "gather_keys_values", "rope_and_cache", "rope_table"]


def rope_table(
    max_model_len: int,
    head_dim: int,
    theta: float,
    *,
    stretch: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return cos ‖ sin of position · frequency, [max_model_len, head_dim] float32.

    The frequencies are theta^(-2i / head_dim), changed by stretch where it is given.
    Source  arXiv:2104.09864, with the pairs (i, i + head_dim / 2)
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if stretch is not None:
        frequencies = stretch(frequencies)
    angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_and_cache(
    qkv: Tensor,
    rope: Tensor,
    kv_cache: Tensor,
    layout: StepLayout,
    num_heads: int,
    head_norms: HeadNorms | None = None,
) -> Tensor:
    """Rotate queries and keys, write keys and values to the cache, return queries [T, H, D].

    Tokens whose slot is -1 are padding and write nothing. Shapes as in Backend.rope_and_cache.
    """
    head_dim = kv_blocks.head_dim_of(kv_cache)
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q = heads[:, :num_heads]
    k, v = heads[:, num_heads:].chunk(2, dim=1)
    cos, sin = rope[layout.positions][:, None].chunk(2, dim=-1)  # [T, 1, D / 2]
    if head_norms is not None:
        q = rms_norm_float32(q, head_norms.queries, head_norms.eps)
        k = rms_norm_float32(k, head_norms.keys, head_norms.eps)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    written = layout.slots >= 0
    kv_blocks.write(kv_cache, layout.slots[written], rotate(k)[written], v[written])
    return rotate(q).to(qkv.dtype)


def gather_keys_values(kv_cache: Tensor, blocks: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the first num_tokens keys and values of a sequence, each [G, num_tokens, D].

    Those of a cache of int8 are float64.

    blocks  [>= ceil(num_tokens / BLOCK_SIZE)] int32, the sequence's blocks
    """
    used = blocks[: -(-num_tokens // BLOCK_SIZE)].long()
    cached = kv_cache[:, used]
    if cached.dtype == torch.int8:
        cached = kv_blocks.dequantize(cached)
    # [2, G, blocks, BLOCK_SIZE, D]
    keys, values = cached.transpose(1, 2).flatten(2, 3)[:, :, :num_tokens]
    return keys, values


def attention(queries: Tensor, kv_cache: Tensor, layout: StepLayout, scale: float) -> Tensor:
    """Return causal softmax(q · kᵀ · scale) · v, [T, H · D]; shapes as in Backend.attention.

    Sums run in float64 and are rounded once: whatever their order, it is below the last bit
    of a 16-bit result, so that batching and chunking don't show. Over a cache of int8 queries are
    quantized as keys are.
    """
    out = torch.zeros_like(queries)
    group = queries.shape[1] // kv_cache.shape[2]
    starts = layout.query_starts.tolist()
    for i, num_tokens in enumerate(layout.context_lens.tolist()):
        first, last = starts[i], starts[i + 1]
        if num_tokens == 0 or first == last:
            continue
        keys, values = gather_keys_values(kv_cache, layout.block_tables[i], num_tokens)
        q = queries[first:last].transpose(0, 1).double()  # [H, queries, D]
        if kv_cache.dtype == torch.int8:
            codes, scales = kv_blocks.quantize_heads(q)
            q = codes.double() * scales[..., None].double()
        k = keys.double().repeat_interleave(group, dim=0)  # [H, num_tokens, D]
        v = values.double().repeat_interleave(group, dim=0)
        scores = q @ k.transpose(1, 2) * scale  # [H, queries, num_tokens]
        seen = torch.arange(num_tokens, device=q.device) <= layout.positions[first:last, None]
        probabilities = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        out[first:last] = (probabilities @ v).transpose(0, 1).to(out.dtype)
    return out.flatten(1)
