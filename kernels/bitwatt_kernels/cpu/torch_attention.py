"""Rotary embedding and paged attention in plain torch: decoding sequences in batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwatt_kernels import kv_blocks
from bitwatt_kernels.backend import BLOCK_SIZE, HeadNorms, StepLayout
from bitwatt_kernels.reference.elementwise import rms_norm_float32

__all__ = ["AttentionPlan"]

# Keys of one batch, padding included, and scores computed at once: they bound a step's copies.
_MAX_BATCH_KEYS = 1 << 15
_MAX_SCORES = 1 << 22


@dataclass(frozen=True, slots=True)
class _Batch:
    """Sequences that bring a step as many tokens each, padded to one context length L.

    tokens  [B · queries] int64, which tokens of the step they are
    rows    [B, G, L] int64, where their keys lie in a layer's cache seen as rows of D; padding
            repeats the last key
    seen    [B, 1, queries, L] bool, which keys a query attends to; None where to all
    """

    tokens: Tensor
    rows: Tensor
    seen: Tensor | None


class AttentionPlan:
    """What a layout means for a cache of num_kv_heads: worked out once for all layers of a step."""

    def __init__(self, layout: StepLayout, num_kv_heads: int) -> None:
        self.layout = layout
        self.num_kv_heads = num_kv_heads
        self._heads = torch.arange(num_kv_heads)
        written = layout.slots >= 0
        self._written = None if bool(written.all()) else written
        self._written_slots = layout.slots if self._written is None else layout.slots[written]
        self._new_rows = self._rows(self._written_slots)
        self._batches = [self._batch(*members) for members in _batches(layout, num_kv_heads)]
        self._rotation: tuple[Tensor, Tensor, Tensor] | None = None

    def rope_and_cache(
        self,
        qkv: Tensor,
        rope: Tensor,
        kv_cache: Tensor,
        num_heads: int,
        head_norms: HeadNorms | None,
    ) -> Tensor:
        """Do what Backend.rope_and_cache does, to the reference's bits."""
        num_tokens, head_dim = qkv.shape[0], kv_blocks.head_dim_of(kv_cache)
        heads = qkv.view(num_tokens, -1, head_dim)
        num_rotated = num_heads + self.num_kv_heads
        cos, sin = self._cos_sin(rope)
        x = heads[:, :num_rotated].float()
        if head_norms is not None:
            by_head = [head_norms.queries.expand(num_heads, -1)]
            by_head.append(head_norms.keys.expand(self.num_kv_heads, -1))
            x = rms_norm_float32(x, torch.cat(by_head), head_norms.eps)
        rotated = x * cos + x.roll(head_dim // 2, -1) * sin
        queries = rotated[:, :num_heads].to(qkv.dtype).contiguous()
        keys, values = rotated[:, num_heads:], heads[:, num_rotated:]
        if kv_cache.dtype == torch.int8:
            if self._written is not None:
                keys, values = keys[self._written], values[self._written]
            kv_blocks.write(kv_cache, self._written_slots, keys, values)
            return queries
        for cache, new in zip(kv_cache.view(2, -1, head_dim), (keys, values), strict=True):
            if self._written is not None:
                new = new[self._written]
            cache.index_copy_(
                0, self._new_rows.flatten(), new.reshape(-1, head_dim).to(cache.dtype)
            )
        return queries

    def attention(
        self, queries: Tensor, kv_cache: Tensor, scale: float, *, is_exact: bool
    ) -> Tensor:
        """Return what Backend.attention does.

        is_exact  sum in float64 and round once: whatever the order, it is below the last bit of
                  the result, so that batching and chunking don't show. Else torch's fastest.
        """
        num_tokens, num_heads, head_dim = queries.shape
        asked = queries
        if kv_cache.dtype == torch.int8:
            codes, scales = kv_blocks.quantize_heads(queries)
            asked = codes * scales[..., None]
        attend = _attend_exactly if is_exact else _attend_fast
        out = torch.zeros_like(queries)
        for batch in self._batches:
            size = batch.rows.shape[0]
            q = asked[batch.tokens].view(size, -1, num_heads, head_dim).transpose(1, 2)
            k, v = kv_blocks.read_rows(kv_cache, batch.rows)
            y = attend(q, k, v, batch.seen, scale)  # [B, H, queries, D]
            out[batch.tokens] = y.transpose(1, 2).reshape(-1, num_heads, head_dim).to(out.dtype)
        return out.view(num_tokens, -1)

    def _cos_sin(self, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos ‖ cos and −sin ‖ sin of the step's tokens, each [T, 1, D]."""
        if self._rotation is None or self._rotation[0] is not rope:
            cos, sin = rope[self.layout.positions][:, None].chunk(2, dim=-1)
            self._rotation = rope, torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return self._rotation[1:]

    def _rows(self, slots: Tensor) -> Tensor:
        """Return where each slot's token lies for each head, [..., G], in rows of D."""
        block, offset = slots[..., None] // BLOCK_SIZE, slots[..., None] % BLOCK_SIZE
        return (block * self.num_kv_heads + self._heads) * BLOCK_SIZE + offset

    def _batch(self, sequences: list[int], num_queries: int, length: int) -> _Batch:
        layout = self.layout
        context_lens = layout.context_lens[sequences].long()[:, None]  # [B, 1]
        positions = torch.arange(length)
        read = torch.minimum(positions, context_lens - 1)  # [B, L]
        blocks = layout.block_tables[sequences].gather(1, read // BLOCK_SIZE).long()
        rows = self._rows(blocks * BLOCK_SIZE + read % BLOCK_SIZE).transpose(1, 2)
        tokens = layout.query_starts[sequences].long()[:, None] + torch.arange(num_queries)
        asked = layout.positions[tokens][:, None, :, None]  # [B, 1, queries, 1]
        seen = positions <= asked
        return _Batch(tokens.flatten(), rows.contiguous(), None if bool(seen.all()) else seen)


def _batches(layout: StepLayout, num_kv_heads: int) -> Iterator[tuple[list[int], int, int]]:
    """Yield sequences to attend at once, how many queries each has, and the longest context.

    Chunks go one by one. Sequences of one token go together, those of like length, so that
    little of the work is padding.
    """
    context_lens, starts = layout.context_lens.tolist(), layout.query_starts.tolist()
    decoding: list[int] = []
    for i, length in enumerate(context_lens):
        num_queries = starts[i + 1] - starts[i]
        if length == 0 or num_queries == 0:
            continue
        if num_queries == 1:
            decoding.append(i)
        else:
            yield [i], num_queries, length
    decoding.sort(key=lambda i: context_lens[i])
    batch: list[int] = []
    for i in decoding:
        if batch and (len(batch) + 1) * context_lens[i] * num_kv_heads > _MAX_BATCH_KEYS:
            yield batch, 1, context_lens[batch[-1]]
            batch = []
        batch.append(i)
    if batch:
        yield batch, 1, context_lens[batch[-1]]


def _attend_exactly(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """q [B, H, queries, D], k and v [B, G, L, D], to [B, H, queries, D]; sums in float64."""
    num_groups, length = k.shape[1:3]
    k, v = k.double(), v.double()
    num_queries = max(1, _MAX_SCORES // (q.shape[0] * q.shape[1] * length))
    parts = []
    for first in range(0, q.shape[2], num_queries):
        part = q[:, :, first : first + num_queries]
        # The heads of a group are queries of one head.
        grouped = part.reshape(part.shape[0], num_groups, -1, part.shape[3]).double()
        scores = grouped.mul_(scale) @ k.transpose(2, 3)  # [B, G, H / G · queries, L]
        if seen is not None:
            hidden = ~seen[:, :, first : first + num_queries]
            by_head = scores.view(*part.shape[:3], length)
            by_head.masked_fill_(hidden, -torch.inf)
        parts.append((scores.softmax(-1) @ v).to(q.dtype).view(part.shape))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _attend_fast(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """As _attend_exactly, by torch's own attention, which takes one dtype."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if q.shape[2] == 1:
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen, scale=scale)
        return y.view(q.shape)
    is_whole = q.shape[2] == k.shape[2]  # a prompt from its first token on
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if is_whole else seen,
        is_causal=is_whole,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
