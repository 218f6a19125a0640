"""Paged attention in plain torch: sequences that decode are batched, chunks run one by one."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout

__all__ = ["StepPlan"]

# Keys of one batch of decoding sequences, padding included, and scores computed at once: they
# bound the copies a step makes.
_MAX_BATCH_KEYS = 1 << 15
_MAX_SCORES = 1 << 22


@dataclass(frozen=True, slots=True)
class _Span:
    """Sequences whose attention is computed at once, each with as many queries.

    tokens  [B · queries] int64, the step's tokens that ask, or None where they are all of them
    rows    [B, G, L] int64, where each key lies in a layer's cache seen as rows of D
    seen    [B, 1, queries, L] bool, which keys a query attends to, or None where to all
    """

    tokens: Tensor | None
    rows: Tensor
    seen: Tensor | None


class StepPlan:
    """What a step's layout means for the cache: the same in every layer, worked out once."""

    def __init__(self, layout: StepLayout, num_kv_heads: int) -> None:
        self.layout = layout
        self._num_kv_heads = num_kv_heads
        written = layout.slots >= 0
        self.written = None if bool(written.all()) else written
        slots = layout.slots if self.written is None else layout.slots[written]
        self.block, self.offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        self._spans = self._plan()

    def attention(
        self, queries: Tensor, kv_cache: Tensor, scale: float, *, is_exact: bool
    ) -> Tensor:
        """Return what Backend.attention does.

        is_exact  sum in float64 and round once: whatever the order, it is below the last bit of
                  the result, so that batching and chunking don't show. Else torch's fastest.
        """
        num_tokens, num_heads, head_dim = queries.shape
        num_groups = kv_cache.shape[2]
        out = torch.zeros_like(queries) if self._spans[:1] != [None] else queries
        keys, values = kv_cache.view(2, -1, head_dim)
        for span in self._spans:
            batch = span.rows.shape[0]
            q = queries if span.tokens is None else queries[span.tokens]
            q = q.view(batch, -1, num_groups, num_heads // num_groups, head_dim)
            q = q.permute(0, 2, 3, 1, 4)  # [B, G, H / G, queries, D]
            k, v = F.embedding(span.rows, keys), F.embedding(span.rows, values)  # [B, G, L, D]
            attend = _attend_exactly if is_exact else _attend_fast
            y = attend(q, k, v, span.seen, scale).permute(0, 3, 1, 2, 4)
            y = y.reshape(-1, num_heads, head_dim)
            if span.tokens is None:
                out = y
            else:
                out[span.tokens] = y
        return out.reshape(num_tokens, -1)
