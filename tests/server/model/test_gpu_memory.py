"""The memory a step takes beside the KV cache, held against what its parts allocate."""

import pytest
from bitwatt.model.gpu_memory import CONTEXT_BYTES, kv_cache_budget, working_bytes
from bitwatt.model.presets import PRESETS
from bitwatt_kernels.gpu.drawing import MAX_CANDIDATES


@pytest.mark.parametrize("max_num_seqs", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("max_model_len", [4096, 131072])
def test_what_is_kept_free_covers_logits_partial_sums_and_sampler(
    max_num_seqs: int, max_model_len: int
) -> None:
    config = PRESETS["2B4T"]
    kept = working_bytes(
        config,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(512, max_num_seqs),
        max_model_len=max_model_len,
    )
    graph_logits = eager_logits = 4 * max_num_seqs * config.vocab_size
    counts = 5 * max_num_seqs * config.vocab_size
    splits = max_model_len // 128
    partials = 4 * max_num_seqs * config.num_heads * splits * (config.head_dim + 2)
    candidates = max_num_seqs * 8 * MAX_CANDIDATES
    assert kept >= graph_logits + eager_logits + counts + partials + candidates


def test_memory_grows_with_the_sequences_and_not_with_their_square() -> None:
    def kept(max_num_seqs: int) -> int:
        return working_bytes(
            PRESETS["2B4T"],
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=4096,
            max_model_len=4096,
        )

    assert kept(4096) < 2.1 * kept(2048) < 4.4 * kept(1024)


@pytest.mark.parametrize("total_gib", [24, 40, 80])
@pytest.mark.parametrize("weights", [(2, 5), (5, 2)])
@pytest.mark.parametrize("is_interleaved", [True, False])
def test_two_engines_of_one_gpu_both_get_a_cache_and_fit(
    total_gib: int, weights: tuple[int, int], is_interleaved: bool
) -> None:
    total, working, utilization = total_gib << 30, 1 << 30, 0.9
    loaded = [(gib << 30) + CONTEXT_BYTES for gib in weights]
    taken = sum(loaded) if is_interleaved else 0
    budgets = []
    for i in range(2):
        if not is_interleaved:
            taken += loaded[i]
        budget = kv_cache_budget(
            total=total,
            free=total - taken,
            own=weights[i] << 30,
            working=working,
            utilization=utilization,
            num_engines=2,
        )
        assert budget > 1 << 30
        budgets.append(budget)
        taken += budget + (0 if is_interleaved else working)
    assert sum(loaded) + sum(budgets) + 2 * working <= total * utilization
