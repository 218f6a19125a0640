"""Steps of a transformer made from plain lists."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.transformer import Transformer
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.registry import choose_backend
from torch import Tensor

from tests.factories import make_step_layout

__all__ = ["CPU_BACKENDS", "Context", "forward", "greedy_steps", "make_kv_cache", "step_layout"]


def _runs_here(name: str) -> bool:
    try:
        choose_backend(torch.device("cpu"), name)
    except BackendError:
        return False
    return True


# Triton's kernels are interpreted on a CPU, too slowly for whole models.
CPU_BACKENDS = [name for name in ("reference", "torch", "native") if _runs_here(name)]


@dataclass
class Context:
    """A sequence's blocks, and how many of its tokens the cache holds."""

    blocks: list[int]
    num_cached: int = 0
    tokens: list[int] = field(default_factory=list)


def step_layout(starts: list[int], counts: list[int], blocks: list[list[int]]) -> StepLayout:
    """Return the layout of a step in which sequence i brings tokens starts[i] + [0, counts[i])."""
    width = max(map(len, blocks))
    tables = torch.tensor([row + [-1] * (width - len(row)) for row in blocks], dtype=torch.int32)
    context_lens = [start + count for start, count in zip(starts, counts, strict=True)]
    return make_step_layout(tables, context_lens, counts)


def make_kv_cache(model: Transformer, num_blocks: int) -> KVCache:
    """Return a cache of NaN, so that reading what was never written shows."""
    cache = KVCache(model.config, num_blocks, model.dtype, model.backend.device)
    cache.layers.fill_(torch.nan)
    return cache


def forward(
    model: Transformer, cache: KVCache, sequences: Sequence[tuple[Context, Sequence[int]]]
) -> Tensor:
    """Run one step that brings each sequence its new tokens; return the logits of all of them."""
    token_ids = [token for _, new in sequences for token in new]
    layout = step_layout(
        [s.num_cached for s, _ in sequences],
        [len(new) for _, new in sequences],
        [s.blocks for s, _ in sequences],
    )
    for sequence, new in sequences:
        sequence.num_cached += len(new)
    return model.forward(torch.tensor(token_ids), layout, cache, torch.arange(len(token_ids)))


def greedy_steps(
    model: Transformer, prompt: list[int], num_tokens: int
) -> tuple[list[int], Tensor]:
    """Return the most likely continuation and the logits it is chosen from, a step a token."""
    num_blocks = -(-(len(prompt) + num_tokens) // BLOCK_SIZE)
    cache = make_kv_cache(model, num_blocks)
    sequence = Context(list(range(num_blocks)))
    new, tokens, logits = prompt, [], []
    while len(tokens) < num_tokens:
        logits.append(forward(model, cache, [(sequence, new)])[-1])
        new = [int(logits[-1].argmax())]
        tokens += new
    return tokens, torch.stack(logits)
