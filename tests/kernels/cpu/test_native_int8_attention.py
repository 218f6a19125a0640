"""Attention over a KV cache in int8 on each instruction set: near the reference, and one result."""

from dataclasses import replace

import pytest
import torch
from bitwatt_kernels.kv_blocks import cache_shape, write
from bitwatt_kernels.layer import LayersByOperations
from bitwatt_kernels.reference.attention import rope_table
from torch import Tensor

from tests.kernels.cpu.conftest import available, make_native
from tests.kernels.cpu.factories import make_generator, make_layer, make_layout
from tests.kernels.cpu.test_native_attention import STEPS, attend
from tests.kernels.cpu.test_native_layers import SIZES

SHAPES = [(4, 1, 128), (6, 2, 64), (3, 3, 100), (2, 2, 16), (8, 1, 20)]


def make_cache(layout, num_blocks: int, num_groups: int, head_dim: int) -> Tensor:
    """Return a cache of the step's sequences; what isn't theirs has NaN as its scale."""
    cache = torch.full(
        cache_shape(num_blocks, num_groups, head_dim, torch.int8), -1, dtype=torch.int8
    )
    g = make_generator(5)
    for table, context_len in zip(layout.block_tables, layout.context_lens.tolist(), strict=True):
        positions = torch.arange(context_len)
        slots = table[positions // 16].long() * 16 + positions % 16
        write(cache, slots, *torch.randn(2, context_len, num_groups, head_dim, generator=g))
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_heads", "num_groups", "head_dim"), SHAPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_attention_over_codes_is_near_the_reference(
    native, reference, step, num_heads, num_groups, head_dim, dtype
):
    layout, num_blocks = make_layout(*STEPS[step], extra_tokens=2)
    cache = make_cache(layout, num_blocks, num_groups, head_dim)
    queries = torch.randn(layout.positions.shape[0], num_heads, head_dim).to(dtype)
    # Scores are exact but for their scaling; the rest as over floats.
    torch.testing.assert_close(
        attend(native, queries, cache, layout),
        reference.attention(queries, cache, layout, head_dim**-0.5),
        rtol=max(1e-5, torch.finfo(dtype).eps),
        atol=1e-5,
    )


@pytest.mark.parametrize("num_heads", [1, 3, 4])
def test_a_query_attends_over_codes_the_same_in_any_chunk_and_on_any_number_of_threads(
    native, num_heads
):
    length = 600
    layout, num_blocks = make_layout([length], [length])
    cache = make_cache(layout, num_blocks, 1, 64)
    queries = torch.randn(length, num_heads, 64)
    whole = attend(native, queries, cache, layout)
    backends = [
        make_native(instruction_set=native.instruction_set, num_threads=num_threads)
        for num_threads in (1, 3)
    ]
    for first, last in [(0, 1), (16, 17), (255, 256), (256, 257), (100, 130), (511, 600)]:
        chunk = replace(make_layout([last], [last - first])[0], block_tables=layout.block_tables)
        for backend in backends:
            attended = attend(backend, queries[first:last], cache, chunk)
            assert torch.equal(attended, whole[first:last]), backend.num_threads


@pytest.mark.parametrize("head_dim", [20, 128])
@pytest.mark.parametrize("step", STEPS)
def test_every_instruction_set_with_fused_multiply_add_attends_to_the_same_bits(step, head_dim):
    layout, num_blocks = make_layout(*STEPS[step])
    cache = make_cache(layout, num_blocks, 2, head_dim)
    queries = torch.randn(layout.positions.shape[0], 8, head_dim).bfloat16()
    results = [
        attend(make_native(instruction_set=name), queries, cache, layout)
        for name in available()
        if name not in ("portable", "amx_emulated")
    ]
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_layers_over_codes_are_their_operations(native, num_threads):
    backend = make_native(instruction_set=native.instruction_set, num_threads=num_threads)
    weights = [make_layer(backend, **SIZES, seed=20 * i) for i in range(2)]
    layout, num_blocks = make_layout([300, 40, 90], [1, 40, 17])
    rope = rope_table(1024, 64, 5e5)
    caches = torch.stack([make_cache(layout, num_blocks, 2, 64) for _ in range(2)])
    expected_caches = caches.clone()
    h = torch.randn(len(layout.positions), SIZES["hidden_size"]).bfloat16()
    layers = backend.prepare_layers(weights)
    expected = LayersByOperations.ternary_layers(
        native, h, tuple(weights), rope, expected_caches, layout
    )
    assert torch.equal(backend.ternary_layers(h, layers, rope, caches, layout), expected)
    assert torch.equal(caches, expected_caches)
