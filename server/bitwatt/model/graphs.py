"""CUDA graphs of decode steps: one replay instead of some 300 kernel launches.

A decode step of S sequences is padded to the next bucket and replayed from the graph captured
for it. Padding sequences attend to nothing and write nothing (context_lens 0, slots -1).

A graph holds addresses and keeps nothing alive. So every tensor that one reads and doesn't make
belongs to DecodeGraphs or to the step's buffers, and all graphs read the same ones.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from bitwatt_kernels.backend import BLOCK_SIZE, Backend, StepLayout
from torch import Tensor

from bitwatt.model.kv_cache import KVCache
from bitwatt.model.sampler import argmax_on_device
from bitwatt.model.step_buffers import DeviceStep
from bitwatt.model.transformer import Transformer

__all__ = ["AheadCompiler", "DecodeGraphs", "bucket_sizes", "capture", "compile_together"]


class _Graph(Protocol):
    def replay(self) -> None: ...


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes captured, the last max_num_seqs.

    1, 2, 4, then every 8th up to 64, then two for each doubling: padding costs a step of many
    sequences at most a third more, and a graph takes memory for the sequences it has.
    """
    sizes = [1, 2, 4, *range(8, 65, 8)]
    while sizes[-1] < max_num_seqs:
        sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """The captured graphs of one model, sharing one memory pool. For CUDA devices."""

    def __init__(
        self,
        model: Transformer,
        kv_cache: KVCache,
        step: DeviceStep,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        """Capture every bucket, largest first so that the others fit into its memory.

        step  holds the token ids, positions, slots and context lengths of what is replayed
        """
        self._model = model
        self._kv_cache = kv_cache
        self._step = step
        self._sizes = bucket_sizes(max_num_seqs)
        self._max_model_len = max_model_len
        device = model.backend.device
        max_blocks = -(-max_model_len // BLOCK_SIZE)
        self._block_tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._query_starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        # Of all graphs: a result that each kept for itself would add up to the square of the batch.
        self._logits = torch.zeros(
            max_num_seqs, model.config.vocab_size, dtype=torch.float32, device=device
        )
        self._best = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        step.fields.slots[:max_num_seqs].fill_(-1)
        step.fields.context_lens.zero_()
        pool = torch.cuda.graph_pool_handle()
        steps = {size: self._step_of(size) for size in reversed(self._sizes)}
        compile_together(model.backend, list(steps.values()))
        self._graphs = {size: capture(step, pool, device) for size, step in steps.items()}

    def padded(self, num_seqs: int) -> int:
        """Return how many sequences the graph has that runs a step of num_seqs."""
        return next(size for size in self._sizes if size >= num_seqs)

    def forward(self, num_seqs: int, block_tables: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and argmax of them of a step in which every sequence brings one token.

        The step's buffers hold its numbers, and padding up to padded(num_seqs). The results are
        valid until the next call.

        block_tables  [S, blocks of the longest context] int32, on the device
        Returns       [S, vocab_size] float32, and [S] int64 as argmax_on_device returns it
        """
        self._block_tables[:num_seqs, : block_tables.shape[1]].copy_(block_tables)
        self._graphs[self.padded(num_seqs)].replay()
        return self._logits[:num_seqs], self._best[:num_seqs]

    def _step_of(self, size: int) -> Callable[[], None]:
        fields = self._step.fields
        layout = StepLayout(
            positions=fields.positions[:size],
            slots=fields.slots[:size],
            query_starts=self._query_starts[: size + 1],
            context_lens=fields.context_lens[:size],
            block_tables=self._block_tables[:size],
            max_query_len=1,
            max_context_len=self._max_model_len,
        )

        def step() -> None:
            logits = self._model.forward(fields.token_ids[:size], layout, self._kv_cache, None)
            self._logits[:size].copy_(logits)
            self._best[:size].copy_(argmax_on_device(logits))

        return step


@runtime_checkable
class AheadCompiler(Protocol):
    """A backend that can compile its kernels before they are launched."""

    def compile_together(self, call: Callable[[], object]) -> None:
        """Compile, in parallel, the kernels that call launches; it launches none this time."""
        ...


def compile_together(backend: Backend, calls: Sequence[Callable[[], object]]) -> None:
    """Compile what the calls will launch, where the backend can."""
    if isinstance(backend, AheadCompiler):
        backend.compile_together(lambda: [call() for call in calls])


def capture(step: Callable[[], None], pool: Any, device: torch.device) -> _Graph:
    """Return the graph of what step launches on the device."""
    step()  # compiles kernels and sizes workspaces, which a capture must not do
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with _no_garbage_collection(), torch.cuda.graph(graph, pool=pool):
        step()
    return graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the collector from freeing CUDA objects, which a capture forbids."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
