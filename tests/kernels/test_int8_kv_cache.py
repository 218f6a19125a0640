"""The KV cache in int8, of each backend that runs on this machine's CPU, against the reference."""

import pytest
import torch
from bitwatt_kernels.backend import BLOCK_SIZE, Backend, HeadNorms, StepLayout
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.kv_blocks import (
    cache_shape,
    dequantize,
    head_dim_of,
    quantize_heads,
    read_rows,
    write,
)
from bitwatt_kernels.reference.attention import rope_table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cpu.factories import make_layout
from tests.kernels.test_backends import (
    EPS,
    REFERENCE,
    TOLERANCE,
    assert_attends_alone_as_together,
    assert_near,
    each_backend,
    each_backend_and_mode,
    each_dtype,
    randn,
)

pytestmark = pytest.mark.slow

POISON = -1  # as a byte of a code that of a wrong one, as four of a scale a NaN


def make_empty(num_blocks: int, num_groups: int, head_dim: int) -> Tensor:
    shape = cache_shape(num_blocks, num_groups, head_dim, torch.int8)
    return torch.full(shape, POISON, dtype=torch.int8)


def make_cache(layout: StepLayout, num_blocks: int, num_groups: int, head_dim: int) -> Tensor:
    """Return a cache of each sequence's tokens, and NaN as the scale of all that wasn't written."""
    cache = make_empty(num_blocks, num_groups, head_dim)
    for i, length in enumerate(layout.context_lens.tolist()):
        positions = torch.arange(length)
        blocks = layout.block_tables[i, positions // BLOCK_SIZE].long()
        kv = randn(2, length, num_groups, head_dim, seed=i)
        write(cache, blocks * BLOCK_SIZE + positions % BLOCK_SIZE, *kv)
    return cache


heads = st.lists(
    st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.floats(-1, 1, width=32)
    | st.sampled_from([0.0, 1e-42]),
    min_size=4,
    max_size=4,
)


@given(st.lists(heads, min_size=1, max_size=8))
def test_a_head_is_its_codes_times_its_scale_within_half_a_step(rows: list[list[float]]) -> None:
    x = torch.tensor(rows)
    codes, scales = quantize_heads(x)
    assert int(codes.abs().max()) <= 127
    assert bool(scales.isfinite().all())
    error = (codes.double() * scales.double()[:, None] - x.double()).abs()
    # Half a step, and what float32 rounds of 127 / max|x|, its product and the scale.
    assert bool((error <= scales.double()[:, None] * (0.5 + 127 * 2**-21)).all())


def test_halves_are_rounded_to_even_and_whole_numbers_up_to_127_are_kept() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [-127.0, 3, -64, 1], [0, 0, 0, 0]])
    codes, scales = quantize_heads(x)
    assert codes.tolist() == [[127, 0, 2, -2], [-127, 3, -64, 1], [0, 0, 0, 0]]
    assert scales[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_head_that_is_not_finite_is_nan_as_a_whole(wrong: float) -> None:
    x = randn(3, 2, 8)
    codes, scales = quantize_heads(x)
    x[1, 0, 5] = wrong
    its_codes, its_scales = quantize_heads(x)
    assert its_scales.isnan().nonzero().tolist() == [[1, 0]]
    assert its_codes[1, 0].tolist() == [0] * 8
    its_codes[1, 0], its_scales[1, 0] = codes[1, 0], scales[1, 0]
    assert torch.equal(its_codes, codes)
    assert torch.equal(its_scales, scales)


@pytest.mark.parametrize("head_dim", [4, 100, 128])
def test_what_is_written_is_what_is_read(head_dim: int) -> None:
    cache = make_empty(3, 2, head_dim)
    assert head_dim_of(cache) == head_dim
    slots = torch.tensor([0, 17, 47, 31])
    keys, values = randn(2, 4, 2, head_dim)
    write(cache, slots, keys, values)
    floats = dequantize(cache)
    assert floats.shape == cache_shape(3, 2, head_dim, torch.float64)
    rows = (slots[:, None] // 16 * 2 + torch.arange(2)) * 16 + slots[:, None] % 16
    for half, (given_, read) in enumerate(zip((keys, values), read_rows(cache, rows), strict=True)):
        codes, scales = quantize_heads(given_)
        expected = codes.double() * scales.double()[..., None]
        assert torch.equal(floats[half, slots // 16, :, slots % 16], expected)
        assert torch.equal(read, expected.float())
    assert int(floats.isfinite().sum()) == keys.numel() + values.numel()


def test_a_cache_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match="head_dim is 30"):
        cache_shape(1, 1, 30, torch.int8)
    for shape in [(2, 1, 1, 16, 8), (2, 1, 1, 16 * 12 + 1), (2, 1, 1, 64), (1, 1, 1, 16 * 12)]:
        with pytest.raises(ShapeError, match="the cache is"):
            head_dim_of(torch.zeros(shape, dtype=torch.int8))


@each_backend
@each_dtype
@pytest.mark.parametrize("head_dim", [32, 100, 128])
@pytest.mark.parametrize("is_normed", [False, True], ids=["plain", "head-norms"])
def test_rope_and_cache_writes_the_codes_of_its_slots_alone(
    backend: Backend, dtype: torch.dtype, head_dim: int, is_normed: bool
) -> None:
    """Two padding tokens and a padding sequence write nothing; two heads aren't finite."""
    layout, num_blocks = make_layout([40, 1, 0, 17], [3, 1, 1, 17], extra_tokens=2)
    qkv = randn(len(layout.positions), (4 + 2 * 2) * head_dim, seed=9).to(dtype)
    qkv[0, 5 * head_dim + 3] = torch.inf
    qkv[1, 7 * head_dim + 1] = torch.nan
    norms = HeadNorms(randn(head_dim, seed=16), randn(head_dim, seed=17), EPS)
    caches = []
    for b in (backend, REFERENCE):
        cache = make_empty(num_blocks, 2, head_dim)
        b.rope_and_cache(
            qkv, rope_table(64, head_dim, 5e5), cache, layout, 4, norms if is_normed else None
        )
        caches.append(cache)
    # Each value is the same few float32 operations in the same order, and rounded to a code.
    assert torch.equal(*caches)
    written = int((layout.slots >= 0).sum()) * 2 * 2 - 2
    assert int(dequantize(caches[0]).isfinite().sum()) == written * head_dim


@each_backend_and_mode
@each_dtype
@pytest.mark.parametrize(
    ("context_lens", "query_lens"),
    [
        ([1], [1]),
        ([33, 16, 300], [1, 1, 1]),
        ([5, 100, 17], [5, 9, 3]),
        ([40, 1, 0, 18], [1, 1, 1, 18]),
        ([300], [300]),
    ],
    ids=["first-token", "decode", "chunks", "padding", "T300"],
)
def test_attention_over_codes_reads_no_more_than_was_written(
    backend: Backend, dtype: torch.dtype, context_lens: list[int], query_lens: list[int]
) -> None:
    layout, num_blocks = make_layout(context_lens, query_lens)
    cache = make_cache(layout, num_blocks, 2, 32)
    queries = randn(len(layout.positions), 6, 32, seed=10).to(dtype)
    actual = backend.attention(queries, cache, layout, 32**-0.5)
    expected = REFERENCE.attention(queries, cache, layout, 32**-0.5)
    real = layout.slots >= 0
    assert_near(actual[real], expected[real], dtype)


@each_backend
@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(
        st.integers(1, 150).flatmap(
            lambda n: st.tuples(st.just(n), st.one_of(st.just(1), st.integers(1, n)))
        ),
        min_size=1,
        max_size=6,
    )
)
def test_attention_over_codes_is_the_same_bits_in_any_batch_and_chunk(
    backend: Backend, lengths: list[tuple[int, int]]
) -> None:
    """Each sequence's last tokens in one step with the others, then one token a step, alone."""
    layout, num_blocks = make_layout([n for n, _ in lengths], [q for _, q in lengths])
    cache = make_cache(layout, num_blocks, 2, 32)
    queries = randn(len(layout.positions), 4, 32, seed=15).bfloat16()
    assert_attends_alone_as_together(backend, queries, cache, layout)


@each_backend_and_mode
def test_a_query_key_or_value_that_is_not_finite_stays_in_its_head(backend: Backend) -> None:
    layout, num_blocks = make_layout([40, 20], [2, 1])
    keys, values = randn(2, 40, 3, 16)
    slots = layout.block_tables[0, torch.arange(40) // 16].long() * 16 + torch.arange(40) % 16
    cache = make_cache(layout, num_blocks, 3, 16)
    write(cache, slots, keys, values)
    queries = randn(3, 3, 16, seed=3)
    expected = backend.attention(queries, cache, layout, 0.25).view(3, 3, 16)
    keys[7, 0, 2], values[9, 2, 3] = torch.inf, torch.nan
    write(cache, slots, keys, values)
    queries[2, 1, 0] = torch.nan
    actual = backend.attention(queries, cache, layout, 0.25).view(3, 3, 16)
    spoiled = torch.tensor([[True, False, True], [True, False, True], [False, True, False]])
    assert bool(actual[spoiled].isnan().all())
    assert torch.equal(actual[~spoiled], expected[~spoiled])


@each_backend_and_mode
def test_heads_of_zeros_and_of_the_smallest_numbers_attend_evenly(backend: Backend) -> None:
    layout, num_blocks = make_layout([6], [1])
    cache = make_empty(num_blocks, 2, 16)
    keys, values = torch.zeros(6, 2, 16), randn(6, 2, 16)
    keys[:, 1] = 1e-44  # not zero, and less than float32's smallest normal number
    slots = layout.block_tables[0, 0].long() * 16 + torch.arange(6)
    write(cache, slots, keys, values)
    y = backend.attention(torch.full((1, 2, 16), 1e-40), cache, layout, 1.0).view(2, 16)
    codes, scales = quantize_heads(values)
    expected = (codes * scales[..., None]).mean(0)
    assert_near(y, expected, torch.float32)


@each_backend
def test_scores_are_exact_for_the_largest_codes(backend: Backend) -> None:
    """Two keys whose products with a query differ by 1 in 2 million: what overflows would show."""
    head_dim = 128
    layout, num_blocks = make_layout([2], [1])
    for signs in (torch.ones(head_dim), (-1.0) ** torch.arange(head_dim)):
        query = 127 * signs
        query[5] = signs[5]
        keys = (127 * signs).repeat(2, 1)
        keys[1, 5] -= signs[5]
        values = torch.zeros(2, 1, head_dim)
        values[1] = 127
        cache = make_empty(num_blocks, 1, head_dim)
        slots = layout.block_tables[0, 0].long() * 16 + torch.arange(2)
        write(cache, slots, keys[:, None], values)
        y = backend.attention(query[None, None], cache, layout, 1.0)
        expected = torch.full((1, head_dim), 127 / (1 + float(torch.tensor(1.0).exp())))
        # Scores are whole numbers of 21 bits, which float32 holds.
        torch.testing.assert_close(y, expected, rtol=TOLERANCE[torch.float32], atol=0)


@each_backend
@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cache_of_floats_need_not_be_of_the_activations_dtype(
    backend: Backend, cache_dtype: torch.dtype
) -> None:
    layout, num_blocks = make_layout([40, 17], [3, 17])
    qkv = randn(20, (4 + 2 * 2) * 32, seed=9)
    rope = rope_table(64, 32, 5e5)
    caches = []
    for b in (backend, REFERENCE):
        cache = torch.zeros(cache_shape(num_blocks, 2, 32, cache_dtype), dtype=cache_dtype)
        queries = b.rope_and_cache(qkv, rope, cache, layout, 4)
        caches.append((cache, b.attention(queries, cache, layout, 0.2)))
    (cache, actual), (expected_cache, expected) = caches
    assert torch.equal(cache, expected_cache)
    assert_near(actual, expected, torch.float32)
