"""CUDA graphs of decode steps: one replay instead of some 150 kernel launches.

A decode step of S sequences is padded to the next bucket and replayed from the graph captured
for it. Padding sequences attend to nothing and write nothing (context_lens 0, slots -1).
"""

from dataclasses import dataclass
from typing import Any

import torch
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from torch import Tensor

from bitwatt.model.kv_cache import KVCache
from bitwatt.model.transformer import Transformer

__all__ = ["DecodeGraphs", "bucket_sizes"]


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes captured: 1, 2, 4, then every 8th up to and with max_num_seqs."""
    sizes = [1, 2, 4, *range(8, max_num_seqs, 8)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@dataclass(frozen=True, slots=True)
class _Bucket:
    graph: torch.cuda.CUDAGraph
    token_ids: Tensor
    layout: StepLayout
    logits: Tensor  # overwritten by the next replay


class DecodeGraphs:
    """The captured graphs of one model, sharing one memory pool. For CUDA devices."""

    def __init__(
        self, model: Transformer, kv_cache: KVCache, *, max_num_seqs: int, max_model_len: int
    ) -> None:
        """Capture every bucket, largest first so that the others fit into its memory."""
        self._model = model
        self._kv_cache = kv_cache
        self._sizes = bucket_sizes(max_num_seqs)
        self._max_blocks = -(-max_model_len // BLOCK_SIZE)
        self._max_model_len = max_model_len
        pool = torch.cuda.graph_pool_handle()
        self._buckets = {size: self._capture(size, pool) for size in reversed(self._sizes)}

    def forward(self, token_ids: Tensor, layout: StepLayout) -> Tensor:
        """Return logits [S, vocab_size] of a step in which every sequence brings one token.

        The result is valid until the next call.
        """
        num_seqs = token_ids.shape[0]
        bucket = self._buckets[next(size for size in self._sizes if size >= num_seqs)]
        static = bucket.layout
        bucket.token_ids[:num_seqs].copy_(token_ids)
        static.positions[:num_seqs].copy_(layout.positions)
        static.slots[:num_seqs].copy_(layout.slots)
        static.slots[num_seqs:].fill_(-1)
        static.context_lens[:num_seqs].copy_(layout.context_lens)
        static.context_lens[num_seqs:].zero_()
        static.block_tables[:num_seqs, : layout.block_tables.shape[1]].copy_(layout.block_tables)
        bucket.graph.replay()
        return bucket.logits[:num_seqs]

    def _capture(self, size: int, pool: Any) -> _Bucket:
        device = self._model.backend.device

        def integers(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        token_ids = integers(size, dtype=torch.int64)
        layout = StepLayout(
            positions=integers(size, dtype=torch.int64),
            slots=integers(size, dtype=torch.int64) - 1,
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
            context_lens=integers(size, dtype=torch.int32),
            block_tables=integers(size, self._max_blocks, dtype=torch.int32),
            max_query_len=1,
            max_context_len=self._max_model_len,
        )
        logit_tokens = torch.arange(size, device=device)

        def step() -> Tensor:
            return self._model.forward(token_ids, layout, self._kv_cache, logit_tokens)

        step()  # compiles kernels and sizes workspaces, which a capture must not do
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = step()
        return _Bucket(graph, token_ids, layout, logits)
