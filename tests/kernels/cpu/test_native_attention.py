"""Paged attention of the native backend: near the reference, and the same however it is cut."""

import math

import pytest
import torch
from bitwatt_kernels.backend import StepLayout
from bitwatt_kernels.cpu.native_backend import NativeBackend
from bitwatt_kernels.errors import KernelError
from torch import Tensor

from tests.kernels.cpu.conftest import make_native
from tests.kernels.cpu.factories import DTYPES, make_cache, make_layout

STEPS = {
    "decode": ([1, 16, 17, 255, 257, 700], [1, 1, 1, 1, 1, 1]),
    "prefill": ([37], [37]),
    "mixed": ([300, 40, 0, 513], [100, 1, 3, 20]),
}


def attend(backend: NativeBackend, queries: Tensor, cache: Tensor, layout: StepLayout) -> Tensor:
    return backend.attention(queries, cache, layout, 1 / math.sqrt(queries.shape[2]))


def poison_unused(cache: Tensor, layout: StepLayout) -> None:
    """Fill every place of the cache that holds no token of the step's sequences with NaN."""
    used = torch.zeros(cache.shape[1], cache.shape[3], dtype=torch.bool)
    for table, context_len in zip(layout.block_tables, layout.context_lens.tolist(), strict=True):
        for position in range(context_len):
            used[table[position // 16], position % 16] = True
    cache.transpose(2, 3)[:, ~used] = torch.nan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_groups", "head_dim"),
    [(4, 1, 128), (6, 2, 64), (3, 3, 100), (2, 2, 16)],
    ids=lambda n: str(n),
)
@pytest.mark.parametrize("step", STEPS)
def test_attention_is_near_the_reference(
    native, reference, step, num_heads, num_groups, head_dim, dtype
):
    layout, num_blocks = make_layout(*STEPS[step], extra_tokens=2)
    cache = make_cache(num_blocks, num_groups, head_dim, dtype)
    poison_unused(cache, layout)
    queries = torch.randn(layout.positions.shape[0], num_heads, head_dim).to(dtype)
    # Weights sum to one over values of size 1, so float32 sums are within about 1e-6; the result
    # is then rounded once, which may fall to either side of a half.
    torch.testing.assert_close(
        attend(native, queries, cache, layout),
        reference.attention(queries, cache, layout, 1 / math.sqrt(head_dim)),
        rtol=max(1e-5, torch.finfo(dtype).eps),
        atol=1e-5,
    )


@pytest.mark.parametrize("num_heads", [1, 3, 4])
def test_a_query_attends_the_same_in_any_chunk_and_on_any_number_of_threads(native, num_heads):
    """Splits are merged in order of position: a chunk of 1 sums as a chunk of 500 does."""
    length = 600
    layout, num_blocks = make_layout([length], [length])
    cache = make_cache(num_blocks, 1, 64, torch.float32)
    queries = torch.randn(length, num_heads, 64)
    whole = attend(native, queries, cache, layout)
    backends = [
        make_native(instruction_set=native.instruction_set, num_threads=num_threads)
        for num_threads in (1, 2, 3)
    ]
    for first, last in [(0, 1), (16, 17), (255, 256), (256, 257), (100, 130), (511, 600)]:
        chunk, _ = make_layout([last], [last - first])
        chunk = StepLayout(
            chunk.positions,
            chunk.slots,
            chunk.query_starts,
            chunk.context_lens,
            layout.block_tables,
            chunk.max_query_len,
            chunk.max_context_len,
        )
        for backend in backends:
            attended = attend(backend, queries[first:last], cache, chunk)
            assert torch.equal(attended, whole[first:last]), backend.num_threads


def test_a_sequence_attends_the_same_whatever_else_is_in_the_step(native):
    lens = [3, 260, 700, 31, 1, 90, 17]
    layout, num_blocks = make_layout(lens, [1] * len(lens))
    cache = make_cache(num_blocks, 2, 128, torch.bfloat16)
    queries = torch.randn(len(lens), 8, 128).to(torch.bfloat16)
    together = attend(native, queries, cache, layout)
    for i, length in enumerate(lens):
        alone = StepLayout(
            layout.positions[i : i + 1],
            layout.slots[i : i + 1],
            torch.tensor([0, 1], dtype=torch.int32),
            layout.context_lens[i : i + 1],
            layout.block_tables[i : i + 1].contiguous(),
            1,
            length,
        )
        assert torch.equal(attend(native, queries[i : i + 1], cache, alone)[0], together[i])


def test_a_block_past_the_cache_is_refused(native):
    layout, num_blocks = make_layout([20], [1])
    layout.block_tables[0, 1] = num_blocks
    cache = make_cache(num_blocks, 1, 16, torch.float32)
    with pytest.raises(KernelError, match="block"):
        attend(native, torch.randn(1, 1, 16), cache, layout)
