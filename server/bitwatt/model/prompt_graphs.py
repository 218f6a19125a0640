"""CUDA graphs of the layers of steps that bring pieces of prompts, or drafts.

Launched one by one, a step's kernels take the host longer than some hundred tokens take the device.
A step of T tokens is padded to the next bucket. Padding tokens belong to no sequence and write
nothing (slots -1), padding sequences have none. Head and draw, some launches, stay outside: how
many tokens are drawn differs from step to step.
"""

from collections.abc import Callable

import torch
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from torch import Tensor

from bitwatt.model.graphs import capture_together
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.step_buffers import DeviceStep, StepFields
from bitwatt.model.transformer import Transformer

__all__ = ["PromptGraphs", "token_buckets"]

_FREE_PADDING = 64  # tokens up to which a step takes as long as it takes to read the weights
_LARGEST_BUCKET = 1024  # by arithmetic: above, the device takes longer than the launches


def token_buckets(max_num_batched_tokens: int) -> list[int]:
    """Return the numbers of tokens captured, the last max_num_batched_tokens.

    Each is at most a quarter more than the one before, above 64 and up to 1024; beyond these
    only the full step, which a long prompt is made of.
    """
    sizes = [16, 32, 48, 64]
    while sizes[-1] < _LARGEST_BUCKET:
        sizes += [sizes[-1] * quarters // 4 for quarters in (5, 6, 7, 8)]
    return [size for size in sizes if size < max_num_batched_tokens] + [max_num_batched_tokens]


class PromptGraphs:
    """The captured layers of one model, sharing one memory pool. For CUDA devices."""

    def __init__(
        self,
        model: Transformer,
        kv_cache: KVCache,
        step: DeviceStep,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        """Capture every bucket, largest first so that the others fit into its memory.

        step  holds the numbers of what is replayed
        """
        self._model = model
        self._kv_cache = kv_cache
        self._step = step
        self._sizes = token_buckets(max_num_batched_tokens)
        self._max_model_len = max_model_len
        device = model.backend.device
        max_blocks = -(-max_model_len // BLOCK_SIZE)
        self._block_tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._hidden_states = torch.zeros(
            max_num_batched_tokens, model.config.hidden_size, dtype=model.dtype, device=device
        )
        self._pad(step.fields, 0, 0, max_num_batched_tokens)
        steps = {size: self._step_of(size) for size in reversed(self._sizes)}
        self._graphs = capture_together(model.backend, steps)

    def padded(self, num_tokens: int) -> int | None:
        """Return how many tokens the graph has that runs such a step.

        None where padding would cost more than launches: more than a quarter of the tokens.
        """
        size = next(size for size in self._sizes if size >= num_tokens)
        return size if size <= _FREE_PADDING or 4 * size <= 5 * num_tokens else None

    def pad(self, fields: StepFields, num_tokens: int, num_seqs: int) -> bool:
        """Fill what the step's graph reads beyond its tokens; return whether it has one."""
        size = self.padded(num_tokens)
        if size is not None:
            self._pad(fields, num_tokens, num_seqs, size)
        return size is not None

    def _pad(self, fields: StepFields, num_tokens: int, num_seqs: int, size: int) -> None:
        fields.slots[num_tokens:size] = -1
        fields.query_starts[num_seqs:] = num_tokens
        fields.context_lens[num_seqs:] = 0

    def hidden_states(self, num_tokens: int, block_tables: Tensor) -> Tensor:
        """Return what the layers make of each token, [num_tokens, hidden_size].

        The step's buffers hold its numbers, and what pad() fills. The result is valid until the
        next call.

        num_tokens    pad() has returned True for
        block_tables  [S, blocks of the longest context] int32, on the device
        """
        num_seqs, num_blocks = block_tables.shape
        self._block_tables[:num_seqs, :num_blocks].copy_(block_tables)
        size = self.padded(num_tokens)
        assert size is not None
        self._graphs[size].replay()
        return self._hidden_states[:num_tokens]

    def _step_of(self, size: int) -> Callable[[], None]:
        fields = self._step.fields
        layout = StepLayout(
            positions=fields.positions[:size],
            slots=fields.slots[:size],
            query_starts=fields.query_starts,
            context_lens=fields.context_lens,
            block_tables=self._block_tables,
            max_query_len=max(2, size),  # one that is 1 runs what decodes alone
            max_context_len=self._max_model_len,
        )

        def step() -> None:
            h = self._model.hidden_states(fields.token_ids[:size], layout, self._kv_cache)
            self._hidden_states[:size].copy_(h)

        return step
