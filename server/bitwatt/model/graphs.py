"""CUDA graphs of decode steps: one replay instead of some 150 kernel launches.

A decode step of S sequences is padded to the next bucket and replayed from the graph captured
for it. Padding sequences attend to nothing and write nothing (context_lens 0, slots -1). What the
step before has drawn is fed, and the next tokens are drawn, inside the graph.

A graph holds addresses and keeps nothing alive. So every tensor that one reads and doesn't make
belongs to DecodeGraphs or to the step's buffers, and all graphs read the same ones.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from bitwatt_kernels.backend import BLOCK_SIZE, Backend, StepLayout
from torch import Tensor

from bitwatt.model.kv_cache import KVCache
from bitwatt.model.sampler import TokenDrawer
from bitwatt.model.step_buffers import DeviceStep, StepFields
from bitwatt.model.transformer import Transformer

__all__ = [
    "AheadCompiler",
    "DecodeGraphs",
    "Graph",
    "bucket_sizes",
    "capture_together",
    "compile_together",
    "feed",
]


class Graph(Protocol):
    """What a capture returns."""

    def replay(self) -> None: ...


def feed(fields: StepFields, num_pending: int, last_tokens: Tensor) -> None:
    """Put what was drawn last in place of the pending tokens."""
    rows = fields.pending_rows[:num_pending]
    fields.token_ids[fields.pending_tokens[:num_pending]] = last_tokens[rows]


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

        step  holds the numbers of what is replayed, and what was drawn last
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
        self._drawer = model.backend if isinstance(model.backend, TokenDrawer) else None
        self._drawn = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._pad(step.fields, slice(max_num_seqs), slice(max_num_seqs))
        steps = {size: self._step_of(size) for size in reversed(self._sizes)}
        self._graphs = capture_together(model.backend, steps)

    def padded(self, num_seqs: int) -> int:
        """Return how many sequences the graph has that runs a step of num_seqs."""
        return next(size for size in self._sizes if size >= num_seqs)

    def pad(self, fields: StepFields, num_seqs: int, num_pending: int) -> None:
        """Fill what the graph of a step of num_seqs reads beyond these."""
        size = self.padded(num_seqs)
        self._pad(fields, slice(num_seqs, size), slice(num_pending, size))

    def _pad(self, fields: StepFields, sequences: slice, pending: slice) -> None:
        no_row = len(self._step.last_tokens) - 1
        fields.slots[sequences] = -1
        fields.context_lens[sequences] = 0
        fields.sampling_rows[sequences] = no_row
        fields.draws[sequences, 0] = 0.0  # a temperature that looks at no other setting
        fields.pending_tokens[pending] = len(fields.token_ids) - 1
        fields.pending_rows[pending] = no_row

    def forward(self, num_seqs: int, block_tables: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits and tokens drawn of a step in which every sequence brings one token.

        The step's buffers hold its numbers, and what pad() fills. The results are valid until the
        next call.

        block_tables  [S, blocks of the longest context] int32, on the device
        Returns       [S, vocab_size] float32, and [S] int64, which last_tokens holds by then; None
                      where the backend can't draw
        """
        self._block_tables[:num_seqs, : block_tables.shape[1]].copy_(block_tables)
        self._graphs[self.padded(num_seqs)].replay()
        drawn = None if self._drawer is None else self._drawn[:num_seqs]
        return self._logits[:num_seqs], drawn

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
            feed(fields, size, self._step.last_tokens)
            h = self._model.hidden_states(fields.token_ids[:size], layout, self._kv_cache)
            logits = self._logits[:size]
            best = self._model.logits_into(h, logits)
            if self._drawer is not None:
                drawn = self._drawer.draw_tokens(logits, fields.draws[:size], None, best)
                self._drawn[:size].copy_(drawn)
                self._step.last_tokens[fields.sampling_rows[:size]] = drawn.clamp(min=0)

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


def capture_together(backend: Backend, steps: Mapping[int, Callable[[], None]]) -> dict[int, Graph]:
    """Return the graphs of the steps, captured in their order into one memory pool."""
    compile_together(backend, list(steps.values()))
    pool = torch.cuda.graph_pool_handle()
    return {size: capture(step, pool, backend.device) for size, step in steps.items()}


def capture(step: Callable[[], None], pool: Any, device: torch.device) -> Graph:
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
