"""Paged attention and rope_and_cache equal the reference over caches full of NaN."""

from dataclasses import dataclass, replace

import pytest
import torch
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.gpu.attention import attention
from bitwatt_kernels.gpu.configs import AttentionConfig, AttentionTile
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.rope import rope_and_cache
from bitwatt_kernels.reference import attention as reference

from tests.factories import make_step_layout, moved

# Weights are rounded to the cache's dtype before they meet the values, as in every fused
# attention: half a unit in the last place of the largest value.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
SMALL = AttentionConfig(32, 16, AttentionTile(16, 4, 3), AttentionTile(32, 4, 3))


@dataclass(frozen=True)
class Step:
    """A step's queries over a paged cache, of which only the written slots are numbers."""

    qkv: torch.Tensor
    rope: torch.Tensor
    kv_cache: torch.Tensor
    layout: StepLayout
    num_heads: int
    head_dim: int

    def to(self, device: torch.device) -> "Step":
        return replace(
            self,
            qkv=self.qkv.to(device),
            rope=self.rope.to(device),
            kv_cache=self.kv_cache.clone().to(device),
            layout=moved(self.layout, device),
        )


def make_step(
    sequences: list[tuple[int, int]],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Step:
    """Return a step of (tokens already cached, tokens of this step) a sequence; (0, 0) pads."""
    generator = torch.Generator().manual_seed(seed)
    blocks_of = [-(-(cached + new) // BLOCK_SIZE) for cached, new in sequences]
    order = torch.randperm(sum(blocks_of) + 3, generator=generator)
    tables = torch.full((len(sequences), max(*blocks_of, 1) + 1), 10**6, dtype=torch.int32)
    kv_cache = torch.full(
        (2, len(order), num_kv_heads, BLOCK_SIZE, head_dim), float("nan"), dtype=dtype
    )
    taken = 0
    for i, (cached, _) in enumerate(sequences):
        blocks = order[taken : taken + blocks_of[i]]
        taken += blocks_of[i]
        tables[i, : blocks_of[i]] = blocks
        written = torch.arange(cached)
        values = torch.randn(2, cached, num_kv_heads, head_dim, generator=generator).to(dtype)
        block = blocks[written // BLOCK_SIZE]
        kv_cache[:, block, :, written % BLOCK_SIZE] = values.transpose(0, 1)
    counts = [max(new, 1) for _, new in sequences]
    layout = make_step_layout(tables, [sum(pair) for pair in sequences], counts)
    features = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.randn(sum(counts), features, generator=generator).to(dtype)
    longest = layout.max_context_len + 1
    return Step(
        qkv, reference.rope_table(longest, head_dim, 1e4), kv_cache, layout, num_heads, head_dim
    )


def run(step: Step, gpu: Gpu, config: AttentionConfig = SMALL) -> torch.Tensor:
    """Return attention's output on the host, after writing the step's keys and values."""
    step = step.to(gpu.device)
    queries = rope_and_cache(step.qkv, step.rope, step.kv_cache, step.layout, step.num_heads, gpu)
    scale = step.head_dim**-0.5
    return attention(queries, step.kv_cache, step.layout, scale, gpu, config).cpu()


def expected(step: Step) -> torch.Tensor:
    step = step.to(torch.device("cpu"))
    queries = reference.rope_and_cache(
        step.qkv, step.rope, step.kv_cache, step.layout, step.num_heads
    )
    return reference.attention(queries, step.kv_cache, step.layout, step.head_dim**-0.5)


@pytest.fixture(scope="module")
def gpu(device: torch.device) -> Gpu:
    return Gpu(device)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(
    "sequences",
    [
        [(0, 1)],
        [(40, 1), (0, 0), (31, 1), (32, 1), (0, 0)],  # decode: several splits, padding
        [(0, 17)],
        [(70, 9), (3, 1), (0, 0), (64, 33), (15, 1)],  # mixed: prefixes, decodes, padding
    ],
    ids=["first-token", "decode", "prefill", "mixed"],
)
def test_attention_equals_the_reference(
    sequences: list[tuple[int, int]], dtype: torch.dtype, gpu: Gpu
) -> None:
    step = make_step(sequences, dtype=dtype)
    torch.testing.assert_close(
        run(step, gpu), expected(step), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]
    )
    assert not gpu.counters.any()


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(6, 2, 100), (5, 1, 64), (3, 3, 128)],
    ids=["head_dim-100", "group-5", "group-1"],
)
@pytest.mark.parametrize("sequences", [[(35, 1), (16, 1)], [(5, 14), (0, 3)]], ids=str)
def test_any_head_dim_and_group(
    sequences: list[tuple[int, int]], num_heads: int, num_kv_heads: int, head_dim: int, gpu: Gpu
) -> None:
    step = make_step(sequences, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    torch.testing.assert_close(run(step, gpu), expected(step), rtol=2e-3, atol=2e-3)


def test_the_tuned_tiles_serve_a_thousand_tokens(gpu: Gpu) -> None:
    step = make_step([(0, 700), (290, 1), (9, 299)], num_heads=1, num_kv_heads=1)
    output = run(step, gpu, gpu.configs.attention)
    torch.testing.assert_close(output, expected(step), rtol=2e-3, atol=2e-3)


def test_a_token_gets_the_same_bits_decoded_alone_in_a_batch_or_prefilled(gpu: Gpu) -> None:
    step = make_step([(0, 75)], seed=3)
    whole = run(step, gpu)
    cache = step.to(gpu.device)
    rope_and_cache(cache.qkv, cache.rope, cache.kv_cache, cache.layout, cache.num_heads, gpu)
    layout = step.layout
    for position in (0, 31, 32, 74):
        decode = replace(
            step,
            qkv=step.qkv[position : position + 1].repeat(2, 1),
            kv_cache=cache.kv_cache,
            layout=StepLayout(
                positions=torch.tensor([position, 0]),
                slots=torch.tensor([int(layout.slots[position]), -1]),
                query_starts=torch.tensor([0, 1, 2], dtype=torch.int32),
                context_lens=torch.tensor([position + 1, 0], dtype=torch.int32),
                block_tables=layout.block_tables.repeat(2, 1),
                max_query_len=1,
                max_context_len=75,
            ),
        )
        assert torch.equal(run(decode, gpu)[0], whole[position])


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("head_dim", [32, 100], ids="head_dim-{}".format)
def test_rope_and_cache_rounds_as_the_reference_and_leaves_other_slots_alone(
    head_dim: int, dtype: torch.dtype, gpu: Gpu
) -> None:
    step = make_step(
        [(20, 1), (0, 0), (3, 18)], num_heads=6, num_kv_heads=3, head_dim=head_dim, dtype=dtype
    )
    here, there = step.to(torch.device("cpu")), step.to(gpu.device)
    queries = reference.rope_and_cache(
        here.qkv, here.rope, here.kv_cache, here.layout, here.num_heads
    )
    actual = rope_and_cache(
        there.qkv, there.rope, there.kv_cache, there.layout, there.num_heads, gpu
    )
    assert torch.equal(actual.cpu(), queries)
    torch.testing.assert_close(there.kv_cache.cpu(), here.kv_cache, rtol=0, atol=0, equal_nan=True)


def test_heads_that_do_not_fit_are_refused(gpu: Gpu) -> None:
    step = make_step([(0, 2)]).to(gpu.device)
    with pytest.raises(ShapeError, match=r"qkv has shape \[2, 256\]; expected contiguous"):
        rope_and_cache(step.qkv, step.rope, step.kv_cache, step.layout, 5, gpu)
    queries = torch.zeros(2, 4, 16, dtype=torch.float16, device=gpu.device)
    with pytest.raises(ShapeError, match="the cache has 2 heads of 32"):
        attention(queries, step.kv_cache, step.layout, 1.0, gpu)
    with pytest.raises(ShapeError, match="kv_cache has strides"):
        attention(queries, step.kv_cache.transpose(2, 4), step.layout, 1.0, gpu)
