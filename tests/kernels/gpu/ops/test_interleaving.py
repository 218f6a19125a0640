"""Whoever arrives last at an atomic, results have the same bits and counters are zero again."""

from dataclasses import replace

import pytest
import torch
from bitwatt_kernels.gpu import row_queue
from bitwatt_kernels.gpu.attention import rotated_attention
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.elementwise import rms_norm_quantize
from bitwatt_kernels.gpu.interpreter import INTERPRETED
from bitwatt_kernels.gpu.linear import ternary_linear
from bitwatt_kernels.gpu.row_queue import RawRows

from tests.extent import TEST_ALL
from tests.kernels.gpu.ops.interleaving import interleaved
from tests.kernels.gpu.ops.test_attention import SMALL, make_step, run
from tests.kernels.gpu.ops.test_linear import DECODE, expected, make_activations, make_weight

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="a GPU has orders of its own"),
    pytest.mark.parametrize("seed", range(12 if TEST_ALL else 3)),
]
STEP = [(40, 1), (0, 0), (90, 1)]  # two splits, padding, three


@pytest.fixture(scope="module")
def gpu(device: torch.device) -> Gpu:
    return Gpu(device)


def test_a_split_linear_sums_alike_in_every_order(seed: int, gpu: Gpu) -> None:
    x, weight = make_activations(3, 1088, gpu.device), make_weight(130, 1088, gpu.device)
    with interleaved(seed) as baton:
        config = replace(DECODE, num_splits=3)
        y = ternary_linear(x, weight, None, torch.float32, gpu, config)
    assert torch.equal(y, expected(x, weight, None, torch.float32))
    assert not gpu.counters.any()
    assert not gpu.sums.any()
    assert baton.num_switches == 2 * 2 * 3 * 3  # two atomics a split of each of three tiles


def test_rows_from_a_queue_are_done_before_any_program_reads_them(
    seed: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More programs than rows; fewer; and four rows a turn, as above MAX_QUEUED_TOKENS."""
    for num_rows, out_features, most_alone in ((3, 330, 256), (9, 70, 256), (9, 70, 8)):
        monkeypatch.setattr(row_queue, "MAX_QUEUED_TOKENS", most_alone)
        torch.manual_seed(seed)
        x = torch.randn(num_rows, 256, device=gpu.device)
        norm = torch.rand(256, device=gpu.device) + 0.5
        weight = make_weight(out_features, 256, gpu.device)
        with interleaved(seed):
            config = replace(DECODE, num_splits=2)
            y = ternary_linear(RawRows(x, norm, 1e-5), weight, None, torch.float32, gpu, config)
        codes = rms_norm_quantize(x, norm, 1e-5, gpu)
        assert torch.equal(y, expected(codes, weight, None, torch.float32))
        assert not gpu.queue.any()
        assert not gpu.sums.any()


def test_split_attention_merges_alike_in_every_order(seed: int, gpu: Gpu) -> None:
    step = make_step(STEP)
    alone = run(step, gpu)
    with interleaved(seed) as baton:
        together = run(step, gpu)
    assert torch.equal(together, alone)
    assert not gpu.counters.any()
    assert baton.num_switches > 2


def test_attention_that_caches_its_token_reads_it_in_every_order(seed: int, gpu: Gpu) -> None:
    """Only the program of the context's end reads what only it has written."""
    step = make_step(STEP)
    alone = run(step, gpu)
    with interleaved(seed) as baton:
        together = step.to(gpu.device)
        y = rotated_attention(
            together.qkv,
            together.rope,
            together.kv_cache,
            together.layout,
            step.num_heads,
            step.head_dim**-0.5,
            gpu,
            SMALL,
        )
    assert torch.equal(y.cpu(), alone)
    assert not gpu.counters.any()
    assert baton.num_switches > 2
