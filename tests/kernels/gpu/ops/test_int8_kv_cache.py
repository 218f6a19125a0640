"""Attention over keys and values in int8, and what is written: the reference's numbers."""

from dataclasses import replace

import pytest
import torch
from bitwatt_kernels import kv_blocks
from bitwatt_kernels.backend import BLOCK_SIZE, HeadNorms
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.gpu.attention import attention, rotated_attention
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.rope import rope_and_cache
from bitwatt_kernels.reference import attention as reference

from tests.kernels.gpu.ops.test_attention import SMALL, TOLERANCES, Step, make_step

DECODE = [(40, 1), (0, 0), (31, 1), (96, 1)]
MIXED = [(70, 9), (3, 1), (0, 0), (15, 1)]


def make_int8_step(sequences: list[tuple[int, int]], head_dim: int, dtype: torch.dtype) -> Step:
    """Return a step over a cache as kv_blocks lays it out, NaN where nothing was written."""
    step = make_step(sequences, head_dim=head_dim, dtype=dtype)
    _, num_blocks, num_heads, _, _ = step.kv_cache.shape
    shape = kv_blocks.cache_shape(num_blocks, num_heads, head_dim, torch.int8)
    cache = torch.full(shape, -1, dtype=torch.int8)
    keys, values = step.kv_cache.transpose(2, 3).flatten(1, 2)
    written = (~keys[:, 0, 0].isnan()).nonzero()[:, 0]
    kv_blocks.write(cache, written, keys[written], values[written])
    return replace(step, kv_cache=cache)


def as_on_a_gpu(cache: torch.Tensor) -> torch.Tensor:
    """Return a cache of kv_blocks' as kv_codes lays it out."""
    lines, values, scales = kv_blocks._parts(cache)
    keys = (lines.transpose(2, 3).flatten(3).short() - 128).to(torch.int8)
    halves = [
        torch.cat([codes.flatten(2), s.contiguous().view(torch.int8)], dim=2)
        for codes, s in zip((keys, values), scales, strict=True)
    ]
    return torch.stack(halves)


@pytest.fixture(scope="module")
def gpu(device: torch.device) -> Gpu:
    return Gpu(device)


@pytest.mark.parametrize("is_normed", [False, True], ids=["plain", "head-norms"])
@pytest.mark.parametrize(
    ("sequences", "head_dim", "dtype"),
    [
        (MIXED, 32, torch.bfloat16),
        (DECODE, 12, torch.float16),
        (MIXED, 100, torch.float32),
    ],
    ids=str,
)
def test_codes_and_scales_are_the_references_and_attention_reads_no_others(
    sequences: list[tuple[int, int]],
    head_dim: int,
    dtype: torch.dtype,
    is_normed: bool,
    gpu: Gpu,
) -> None:
    """One head of a new token isn't finite, and is NaN as a whole."""
    step = make_int8_step(sequences, head_dim, dtype)
    if not is_normed:
        step.qkv[1, 5 * head_dim + 3] = torch.inf
    norms = HeadNorms(torch.rand(head_dim), torch.rand(head_dim), 1e-5) if is_normed else None
    ours = replace(step, kv_cache=as_on_a_gpu(step.kv_cache)).to(gpu.device)
    there = None
    if norms is not None:
        there = HeadNorms(norms.queries.to(gpu.device), norms.keys.to(gpu.device), norms.eps)
    queries = rope_and_cache(
        ours.qkv, ours.rope, ours.kv_cache, ours.layout, step.num_heads, gpu, there
    )
    expected = reference.rope_and_cache(
        step.qkv, step.rope, step.kv_cache, step.layout, step.num_heads, norms
    )
    assert torch.equal(queries.cpu(), expected)
    assert torch.equal(ours.kv_cache.cpu(), as_on_a_gpu(step.kv_cache))
    scale = head_dim**-0.5
    y = attention(queries, ours.kv_cache, ours.layout, scale, gpu, SMALL).cpu()
    wanted = reference.attention(expected, step.kv_cache, step.layout, scale)
    real = (step.layout.slots >= 0) & wanted.isfinite().all(dim=1)
    assert int(real.sum()) >= 2
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(y[real], wanted[real], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head_dim", [32, 16])
def test_rotating_attention_writes_and_attends_as_the_kernels_one_by_one(
    head_dim: int, gpu: Gpu
) -> None:
    step = make_int8_step(DECODE, head_dim, torch.bfloat16)
    step = replace(step, kv_cache=as_on_a_gpu(step.kv_cache))
    scale = head_dim**-0.5
    apart, together = step.to(gpu.device), step.to(gpu.device)
    queries = rope_and_cache(
        apart.qkv, apart.rope, apart.kv_cache, apart.layout, step.num_heads, gpu
    )
    y = attention(queries, apart.kv_cache, apart.layout, scale, gpu, SMALL)
    rotated = rotated_attention(
        together.qkv,
        together.rope,
        together.kv_cache,
        together.layout,
        step.num_heads,
        scale,
        gpu,
        SMALL,
    )
    assert torch.equal(rotated, y)
    assert torch.equal(together.kv_cache, apart.kv_cache)


def test_a_token_gets_the_same_bits_decoded_as_in_a_chunk(gpu: Gpu) -> None:
    step = make_int8_step([(50, 3)], 32, torch.bfloat16)
    step = replace(step, kv_cache=as_on_a_gpu(step.kv_cache)).to(gpu.device)
    queries = rope_and_cache(step.qkv, step.rope, step.kv_cache, step.layout, step.num_heads, gpu)
    together = attention(queries, step.kv_cache, step.layout, 0.2, gpu, SMALL)
    alone = replace(
        step.layout,
        positions=step.layout.positions[2:],
        slots=step.layout.slots[2:],
        query_starts=torch.tensor([0, 1], dtype=torch.int32, device=gpu.device),
        max_query_len=1,
    )
    y = attention(queries[2:].contiguous(), step.kv_cache, alone, 0.2, gpu, SMALL)
    assert torch.equal(y[0], together[2])


def test_a_cache_that_is_none_is_refused(gpu: Gpu) -> None:
    step = make_int8_step([(3, 1)], 16, torch.bfloat16).to(gpu.device)
    cut = step.kv_cache[..., : BLOCK_SIZE * 19]
    with pytest.raises(ShapeError, match="the cache is"):
        attention(step.qkv[:, :64].view(-1, 4, 16), cut, step.layout, 1.0, gpu)
