"""What a step takes of a GPU's memory beside weights and KV cache, by formula.

The KV cache gets what is left, once and before anything else runs, so this is an upper bound.
"""

from bitwatt.model.config import ModelConfig
from bitwatt.scheduling.plan import max_draws

__all__ = ["CONTEXT_BYTES", "kv_cache_budget", "working_bytes"]

CONTEXT_BYTES = 768 << 20
"""Set aside for a process's CUDA context, libraries and loaded kernels."""

_SPLIT_TOKENS = 128  # of the launch configurations' attention, none of which has a smaller one
_CANDIDATES_BYTES = 4096 * 8  # a row drawn: the draw kernel's candidates and their ids
_BATCH_BYTES = 4 * 4 + 5  # a token of a row: graph's and eager logits, log-probabilities, a copy
# of them in which masks or penalties are applied; counts and prompt of penalties


def working_bytes(
    config: ModelConfig, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
) -> int:
    """Return an upper bound of what a step and the captured graphs take, bytes.

    Activations of an eager step, and as much again for the graphs' own pools, as float32 of which
    none is reused; partial sums of attention that is split over the context; logits; the sampler.
    """
    widest = max(
        2 * config.intermediate_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    )
    a_token = 4 * (4 * config.hidden_size + 3 * widest)
    activations = a_token * (2 * max_num_batched_tokens + max_num_seqs)
    dim_block = 1 << (config.head_dim - 1).bit_length()
    num_splits = -(-max_model_len // _SPLIT_TOKENS)
    a_partial = 4 * (dim_block + 2)
    partials = 2 * max_num_seqs * config.num_heads * num_splits * a_partial
    num_draws = max_draws(max_num_seqs)
    rows = (_BATCH_BYTES * config.vocab_size + _CANDIDATES_BYTES) * num_draws
    return activations + partials + rows


def kv_cache_budget(
    *, total: int, free: int, own: int, working: int, utilization: float, num_engines: int
) -> int:
    """Return the bytes an engine's KV cache may take; 0 where nothing is left.

    Alone, an engine takes what others on the GPU leave of the utilization. Engines that share it
    get like parts: what the others have taken by now depends on which of them is ahead.

    own      bytes that this process has of the GPU, its context aside
    working  of this engine's steps and graphs
    """
    if num_engines == 1:
        return max(0, int(total * utilization) - (total - free) - working)
    part = int(total * utilization / num_engines) - own - CONTEXT_BYTES - working
    return max(0, min(part, free - working))
