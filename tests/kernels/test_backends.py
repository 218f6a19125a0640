"""What every backend promises, asked of each registered one that runs on this machine's CPU."""

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from bitwatt_kernels.backend import (
    BLOCK_SIZE,
    Backend,
    HeadNorms,
    NormedParts,
    QuantizedActivations,
    StepLayout,
    TernaryHead,
)
from bitwatt_kernels.errors import BackendError, ShapeError
from bitwatt_kernels.layer import LayersByOperations
from bitwatt_kernels.packing import TernaryWeight, times_scales, unpack
from bitwatt_kernels.reference.attention import rope_table
from bitwatt_kernels.reference.linear import quantize
from bitwatt_kernels.reference.reference_backend import ReferenceBackend
from bitwatt_kernels.registry import BACKENDS, choose_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.extent import TEST_ALL
from tests.kernels.cpu.factories import (
    make_activations,
    make_extreme_codes,
    make_generator,
    make_layer,
    make_layout,
    make_ternary,
)

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
REFERENCE = ReferenceBackend(CPU)
EPS = 1e-5

# What a result may be off by: two steps of its own dtype, for the reference sums in float64,
# rounds once and is off by half a step itself.
TOLERANCE = {torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11, torch.float32: 1e-5}


# Another thread looks out for work between operations as small as these. What threads share out is
# the native kernels' affair, whose tests take two.
NUM_THREADS = None if TEST_ALL else 1


@cache
def make_backend(name: str, *, batch_invariant: bool = True) -> Backend:
    chosen = choose_backend(CPU, name, batch_invariant=batch_invariant, num_threads=NUM_THREADS)
    return chosen.backend


def runs_here(name: str) -> bool:
    try:
        make_backend(name)
    except BackendError:
        return False
    return True


NAMES = [name for name in BACKENDS if runs_here(name)]


def label(backend: Backend) -> str:
    return f"{backend.name}-{'invariant' if backend.batch_invariant else 'fast'}"


each_backend = pytest.mark.parametrize("backend", [make_backend(n) for n in NAMES], ids=label)
each_backend_and_mode = pytest.mark.parametrize(
    "backend",
    [
        make_backend(name, batch_invariant=invariant)
        for name in NAMES
        for invariant in ((True,) if name == "reference" else (True, False))  # that is always so
    ],
    ids=label,
)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).split(".")[1])
NUMS_OF_TOKENS = (1, 3, 17, 1000)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed))


def assert_near(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, num_roundings: int = 1
) -> None:
    """Assert closeness relative to the row's largest value: cancelling sums have no own scale."""
    scale = expected.double().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    error = ((actual.double() - expected.double()).abs() / scale).max()
    assert actual.dtype == expected.dtype
    assert error <= num_roundings * TOLERANCE[dtype]


@each_backend
@each_dtype
def test_quantize(backend: Backend, dtype: torch.dtype) -> None:
    for num_tokens in NUMS_OF_TOKENS:
        x = make_activations(num_tokens, 192).clamp(-6e4, 6e4).to(dtype)
        actual, expected = backend.quantize(x), REFERENCE.quantize(x)
        assert torch.equal(actual.codes, expected.codes), num_tokens
        assert torch.equal(actual.scales, expected.scales), num_tokens
        assert torch.equal(actual.sums, expected.sums), num_tokens


@each_backend
@each_dtype
@pytest.mark.parametrize("group", [64, 128])
def test_quantize_by_groups(backend: Backend, dtype: torch.dtype, group: int) -> None:
    for num_tokens in NUMS_OF_TOKENS:
        x = make_activations(num_tokens, 5 * group).clamp(-6e4, 6e4).to(dtype)
        actual, expected = backend.quantize(x, group=group), REFERENCE.quantize(x, group=group)
        assert torch.equal(actual.codes, expected.codes), num_tokens
        assert torch.equal(actual.scales, expected.scales), num_tokens
        assert torch.equal(actual.sums, expected.sums), num_tokens
    with pytest.raises(ShapeError, match=r"don't make two or more groups"):
        backend.quantize(x, group=4 * group)


@each_backend
@each_dtype
def test_norms_and_gates(backend: Backend, dtype: torch.dtype) -> None:
    weight = randn(320, seed=1)
    for num_tokens in NUMS_OF_TOKENS:
        x = make_activations(num_tokens, 320).clamp(-6e4, 6e4).to(dtype)
        gate_up = randn(num_tokens, 384, seed=2).to(dtype)
        assert_near(backend.rms_norm(x, weight, EPS), REFERENCE.rms_norm(x, weight, EPS), dtype)
        for activation in ("relu2", "silu"):
            assert_near(
                backend.gated_activation(gate_up, activation),
                REFERENCE.gated_activation(gate_up, activation),
                dtype,
            )


@each_backend
@each_dtype
@pytest.mark.parametrize("group", [None, 64], ids="group-{}".format)
@pytest.mark.parametrize("operation", ["norm", "relu2", "silu", "relu2-norm"])
def test_fused_quantization(
    backend: Backend, dtype: torch.dtype, operation: str, group: int | None
) -> None:
    """Codes may differ by one where a value sits on a rounding boundary, seldom."""
    weight = randn(384 if operation == "norm" else 192, seed=4)

    def run(b: Backend, x: Tensor) -> QuantizedActivations:
        match operation:
            case "norm":
                return b.rms_norm_quantize(x, weight, EPS, group=group)
            case "silu":
                return b.gated_activation_quantize(x, "silu", None, EPS, group=group)
            case _:
                norm = weight if operation == "relu2-norm" else None
                return b.gated_activation_quantize(x, "relu2", norm, EPS, group=group)

    for num_tokens in NUMS_OF_TOKENS:
        x = randn(num_tokens, 384, seed=3).to(dtype)
        actual, expected = run(backend, x), run(REFERENCE, x)
        step = (actual.codes.int() - expected.codes.int()).abs()
        assert int(step.max()) <= 1, num_tokens
        assert step.double().mean() <= 1e-3, num_tokens
        torch.testing.assert_close(actual.scales, expected.scales, rtol=1e-5, atol=0)
        codes = actual.codes.view(*actual.scales.shape, -1)
        assert torch.equal(actual.sums, codes.sum(dim=-1, dtype=torch.int32)), num_tokens


@each_backend
@each_dtype
@pytest.mark.parametrize("has_extras", [False, True], ids=["plain", "bias-residual"])
def test_ternary_linear_is_exact(backend: Backend, dtype: torch.dtype, has_extras: bool) -> None:
    """Distinct scales a row, out_features that divide by nothing, the same bits as the oracle."""
    weight = make_ternary(83, 192, bias=has_extras)
    prepared = backend.prepare_ternary(weight)
    for num_tokens in NUMS_OF_TOKENS:
        x = quantize(make_activations(num_tokens, 192))
        residual = randn(num_tokens, 83, seed=5).to(dtype) if has_extras else None
        actual = backend.ternary_linear(x, prepared, residual, dtype)
        expected = REFERENCE.ternary_linear(x, weight, residual, dtype)
        assert torch.equal(actual, expected), num_tokens


@each_backend
@each_dtype
@pytest.mark.parametrize("has_extras", [False, True], ids=["plain", "bias-residual"])
@pytest.mark.parametrize(("in_features", "group"), [(192, 64), (512, 64), (1280, 128)])
def test_scales_by_groups_are_summed_in_one_order(
    backend: Backend, dtype: torch.dtype, has_extras: bool, in_features: int, group: int
) -> None:
    """The same bits as the oracle, and so in every batch; groups that fill no chunk of four too."""
    scales_dtype = torch.float16 if group == 128 or dtype == torch.float16 else torch.float32
    weight = make_ternary(83, in_features, bias=has_extras, group=group, scales_dtype=scales_dtype)
    prepared = backend.prepare_ternary(weight)
    for num_tokens in NUMS_OF_TOKENS:
        x = quantize(make_activations(num_tokens, in_features), group=group)
        residual = randn(num_tokens, 83, seed=5).to(dtype) if has_extras else None
        actual = backend.ternary_linear(x, prepared, residual, dtype)
        expected = REFERENCE.ternary_linear(x, weight, residual, dtype)
        assert torch.equal(actual, expected), num_tokens
    assert backend.nbytes(prepared) >= weight.codes.nbytes + weight.scales.nbytes


@each_backend
def test_a_weight_takes_activations_of_its_own_groups(backend: Backend) -> None:
    x = quantize(randn(2, 256), group=64)
    for group in (None, 128):
        weight = backend.prepare_ternary(make_ternary(8, 256, group=group))
        with pytest.raises(ShapeError, match="a scale to every 64 features"):
            backend.ternary_linear(x, weight, None, torch.float32)


@each_backend
@pytest.mark.parametrize("num_tokens", [1, 17])
@pytest.mark.parametrize("in_features", [64, 6912, 28672])
def test_ternary_linear_is_exact_at_the_largest_values(
    backend: Backend, num_tokens: int, in_features: int
) -> None:
    x = make_extreme_codes(num_tokens, in_features)
    ones = torch.full((3, in_features // 4), 0b10101010, dtype=torch.uint8)
    codes = torch.cat([ones, torch.zeros_like(ones), make_ternary(3, in_features).codes])
    weight = TernaryWeight(codes, torch.ones(9))
    actual = backend.ternary_linear(x, backend.prepare_ternary(weight), None, torch.float32)
    assert torch.equal(actual, REFERENCE.ternary_linear(x, weight, None, torch.float32))


@each_backend
def test_ternary_linear_refuses_other_in_features(backend: Backend) -> None:
    weight = backend.prepare_ternary(make_ternary(8, 128))
    with pytest.raises(ShapeError):
        backend.ternary_linear(quantize(randn(2, 192)), weight, None, torch.float32)


@each_backend_and_mode
@each_dtype
def test_dense_linear_and_head(backend: Backend, dtype: torch.dtype) -> None:
    weight, bias = (randn(83, 192, seed=6) / 14).to(dtype), randn(83, seed=7).to(dtype)
    prepared, head = backend.prepare_dense(weight), backend.prepare_head(weight)
    assert backend.nbytes(prepared) >= weight.nbytes
    assert backend.nbytes(head) >= weight.nbytes
    whole_blocks = randn(96, 192).to(dtype)
    assert backend.nbytes(backend.prepare_dense(whole_blocks)) == whole_blocks.nbytes
    for num_tokens in NUMS_OF_TOKENS:
        x, residual = randn(num_tokens, 192).to(dtype), randn(num_tokens, 83, seed=8).to(dtype)
        for extras in ((None, None), (bias, None), (None, residual), (bias, residual)):
            num_roundings = 1 + sum(extra is not None for extra in extras)
            expected = REFERENCE.dense_linear(x, weight, *extras)
            for form in (weight, prepared):
                assert_near(backend.dense_linear(x, form, *extras), expected, dtype, num_roundings)
        assert_near(backend.head(x, head), REFERENCE.head(x, weight), dtype)


@each_backend
@each_dtype
def test_an_8_bit_head_is_near_for_a_byte_a_weight(backend: Backend, dtype: torch.dtype) -> None:
    weight = (randn(83, 192, seed=6) / 14).to(dtype)
    ours, theirs = (b.prepare_head(weight, bits=8) for b in (backend, REFERENCE))
    for num_tokens in NUMS_OF_TOKENS:
        x = randn(num_tokens, 192).to(dtype)
        logits = backend.head(x, ours)
        assert_near(logits, REFERENCE.head(x, theirs), torch.float32)
        exact = REFERENCE.head(x, weight)
        assert (logits - exact).norm() < 0.02 * exact.norm(), num_tokens
    whole_blocks = backend.prepare_head(randn(96, 192).to(dtype), bits=8)
    assert 96 * 192 < backend.nbytes(whole_blocks) <= 96 * (192 + 8)


@each_backend
@each_dtype
@pytest.mark.parametrize("hidden_size", [192, 33])
def test_a_tied_embedding_is_read_from_the_head(
    backend: Backend, dtype: torch.dtype, hidden_size: int
) -> None:
    """One matrix in memory serves both: its rows are the checkpoint's, or near them in 8 bits."""
    weight = randn(83, hidden_size, seed=6).to(dtype)
    token_ids = torch.cat([torch.arange(83), torch.tensor([1, 0, 82])])
    for embedding in (weight, backend.prepare_head(weight)):
        assert torch.equal(backend.embed(token_ids, embedding), weight[token_ids])
    rows = backend.embed(token_ids, backend.prepare_head(weight, bits=8))
    assert rows.dtype == dtype
    assert torch.equal(rows, REFERENCE.embed(token_ids, REFERENCE.prepare_head(weight, bits=8)))
    assert (rows - weight[token_ids]).float().norm() < 0.02 * weight[token_ids].float().norm()


@each_backend
@each_dtype
@pytest.mark.parametrize("group", [None, 64, 128], ids="group-{}".format)
def test_one_packing_is_a_ternary_head_and_its_embedding(
    backend: Backend, dtype: torch.dtype, group: int | None
) -> None:
    """Rows are those of the dequantized matrix, logits a ternary linear's: bit for bit."""
    scales_dtype = torch.float16 if group == 128 else torch.float32
    weight = make_ternary(83, 384, group=group, scales_dtype=scales_dtype)
    dense = times_scales(unpack(weight.codes).float(), weight.scales).to(dtype)
    head = TernaryHead(backend.prepare_ternary(weight), dtype)
    token_ids = torch.cat([torch.arange(83), torch.tensor([1, 0, 82])])
    rows = backend.embed(token_ids, head)
    assert rows.dtype == dtype
    assert torch.equal(rows, dense[token_ids])
    assert backend.embed(token_ids[:0], head).shape == (0, 384)
    x = randn(17, 384).to(dtype)
    logits = backend.head(x, head)
    assert torch.equal(logits, REFERENCE.head(x, TernaryHead(weight, dtype)))
    exact = REFERENCE.head(x, dense)
    assert (logits - exact).norm() < 0.02 * exact.norm()
    assert backend.nbytes(head) == backend.nbytes(head.weight)


@each_backend
@each_dtype
@pytest.mark.parametrize("head_dim", [32, 100, 128])
@pytest.mark.parametrize("is_normed", [False, True], ids=["plain", "head-norms"])
def test_rope_and_cache_writes_its_slots_alone(
    backend: Backend, dtype: torch.dtype, head_dim: int, is_normed: bool
) -> None:
    """Two padding tokens and a padding sequence write nothing."""
    layout, num_blocks = make_layout([40, 1, 0, 17], [3, 1, 1, 17], extra_tokens=2)
    num_tokens = len(layout.positions)
    qkv = randn(num_tokens, (4 + 2 * 2) * head_dim, seed=9).to(dtype)
    norms = HeadNorms(randn(head_dim, seed=16), randn(head_dim, seed=17), EPS)
    caches = []
    for b in (backend, REFERENCE):
        cache = torch.full((2, num_blocks, 2, BLOCK_SIZE, head_dim), torch.nan, dtype=dtype)
        q = b.rope_and_cache(
            qkv, rope_table(64, head_dim, 5e5), cache, layout, 4, norms if is_normed else None
        )
        assert q.shape == (num_tokens, 4, head_dim)
        caches.append((q[layout.slots >= 0], cache))
    (q, cache), (expected_q, expected_cache) = caches
    assert_near(q, expected_q, dtype)
    assert torch.equal(cache.isnan(), expected_cache.isnan())
    assert_near(cache.nan_to_num(), expected_cache.nan_to_num(), dtype)


def make_poisoned_cache(
    layout: StepLayout, num_blocks: int, num_groups: int, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """Return a cache that holds each sequence's tokens, and NaN wherever nothing was written."""
    cache = torch.full((2, num_blocks, num_groups, BLOCK_SIZE, head_dim), torch.nan)
    for i, length in enumerate(layout.context_lens.tolist()):
        positions = torch.arange(length)
        blocks = layout.block_tables[i, positions // BLOCK_SIZE].long()
        kv = randn(2, length, num_groups, head_dim, seed=i)
        for half in (0, 1):
            cache[half, blocks, :, positions % BLOCK_SIZE] = kv[half]
    return cache.to(dtype)


@cache
def make_attention(
    context_lens: tuple[int, ...], query_lens: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, StepLayout, Tensor]:
    """Return queries, the cache they read, their layout, and what the reference makes of them."""
    layout, num_blocks = make_layout([*context_lens], [*query_lens])
    kv_cache = make_poisoned_cache(layout, num_blocks, 2, 32, dtype)
    queries = randn(len(layout.positions), 6, 32, seed=10).to(dtype)
    return queries, kv_cache, layout, REFERENCE.attention(queries, kv_cache, layout, 32**-0.5)


@each_backend_and_mode
@each_dtype
@pytest.mark.parametrize(
    ("context_lens", "query_lens"),
    [
        ([1], [1]),
        ([33, 16, 300], [1, 1, 1]),
        ([5, 100, 17], [5, 9, 3]),
        ([40, 1, 0, 18], [1, 1, 1, 18]),
        ([1000], [1000]),
        ([20 + 7 * i for i in range(40)], [1 if i % 5 else 12 for i in range(40)]),
    ],
    ids=["first-token", "decode", "chunks", "padding", "T1000", "mixed"],
)
def test_attention_reads_no_more_than_was_written(
    backend: Backend, dtype: torch.dtype, context_lens: list[int], query_lens: list[int]
) -> None:
    queries, kv_cache, layout, expected = make_attention((*context_lens,), (*query_lens,), dtype)
    actual = backend.attention(queries, kv_cache, layout, 32**-0.5)
    real = layout.slots >= 0
    assert_near(actual[real], expected[real], dtype)


@each_backend
@each_dtype
@pytest.mark.parametrize("kind", ["bitnet", "llama", "qwen3", "normed-parts"])
@pytest.mark.parametrize(
    ("context_lens", "query_lens"),
    [([1], [1]), ([300, 33, 40], [1, 1, 17]), ([40, 0, 600], [1, 1, 1])],
    ids=["first-token", "mixed", "padding"],
)
def test_layers_are_their_operations(
    backend: Backend,
    dtype: torch.dtype,
    kind: str,
    context_lens: list[int],
    query_lens: list[int],
) -> None:
    """Bit for bit, the cache they write too, however much of them the backend fuses."""
    sizes = {"hidden_size": 256, "intermediate_size": 320, "num_heads": 4}
    sizes |= {"num_kv_heads": 2, "head_dim": 32}
    weights = [
        make_layer(backend, **sizes, is_bitnet=kind == "bitnet", seed=20 * i) for i in (1, 2)
    ]
    if kind == "qwen3":
        norms = HeadNorms(randn(32, seed=18), randn(32, seed=19), 1e-6)
        weights = [replace(layer, head_norms=norms) for layer in weights]
    elif kind == "normed-parts":
        weights = [
            replace(layer, down=NormedParts((randn(320, seed=18),), (layer.down,), 1e-6))
            for layer in weights
        ]
    layout, num_blocks = make_layout(context_lens, query_lens)
    h = randn(len(layout.positions), 256, seed=28).to(dtype)
    rope = rope_table(1024, 32, 5e5)
    cache = make_poisoned_cache(layout, num_blocks, 2, 32, dtype)
    caches = torch.stack([cache, cache / 2])
    expected_caches = caches.clone()
    actual = backend.ternary_layers(h, backend.prepare_layers(weights), rope, caches, layout)
    expected = LayersByOperations.ternary_layers(
        backend, h, tuple(weights), rope, expected_caches, layout
    )
    real = layout.slots >= 0
    assert actual.dtype == dtype
    assert torch.equal(actual[real], expected[real])
    assert torch.equal(caches.nan_to_num(), expected_caches.nan_to_num())
    assert not actual[real].isnan().any()


def rows_of(result: object) -> Tensor:
    """Return what a row of a result is, bit for bit, whatever the operation gives back."""
    if isinstance(result, Tensor):
        return result
    return torch.cat(
        [result.codes.double(), result.scales[:, None].double(), result.sums[:, None].double()],
        dim=1,
    )


OPERATIONS = (
    "quantize",
    "rms_norm",
    "rms_norm_quantize",
    "gated_activation",
    "gated_activation_quantize",
    "ternary_linear",
    "dense_linear",
    "head",
    "head-8-bit",
    "head-ternary",
)


def run_rows(backend: Backend, operation: str, x: Tensor) -> Tensor:
    norm, gate_norm = randn(256, seed=11), randn(128, seed=12)
    match operation:
        case "rms_norm" | "rms_norm_quantize":
            return rows_of(getattr(backend, operation)(x, norm, EPS))
        case "gated_activation":
            return backend.gated_activation(x, "silu")
        case "gated_activation_quantize":
            return rows_of(backend.gated_activation_quantize(x, "relu2", gate_norm, EPS))
        case "ternary_linear":
            weight = backend.prepare_ternary(make_ternary(51, 256))
            return backend.ternary_linear(backend.quantize(x), weight, None, x.dtype)
        case "dense_linear":
            weight = backend.prepare_dense(randn(83, 256, seed=13).to(x.dtype))
            return backend.dense_linear(x, weight, None, None)
        case "head":
            return backend.head(x, backend.prepare_head(randn(300, 256, seed=14).to(x.dtype)))
        case "head-8-bit":
            weight = randn(300, 256, seed=14).to(x.dtype)
            return backend.head(x, backend.prepare_head(weight, bits=8))
        case "head-ternary":
            weight = backend.prepare_ternary(make_ternary(300, 256, group=64))
            return backend.head(x, TernaryHead(weight, x.dtype))
        case _:
            return rows_of(backend.quantize(x))


@each_backend
@each_dtype
@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=10, deadline=None)
@given(
    num_tokens=st.integers(1, 70),
    cuts=st.lists(st.integers(1, 69), max_size=4),
    seed=st.integers(0, 99),
)
def test_a_row_is_the_same_bits_in_any_batch(
    backend: Backend,
    dtype: torch.dtype,
    operation: str,
    num_tokens: int,
    cuts: list[int],
    seed: int,
) -> None:
    x = randn(num_tokens, 256, seed=seed).to(dtype)
    whole = run_rows(backend, operation, x)
    bounds = sorted({0, num_tokens, *(cut for cut in cuts if cut < num_tokens)})
    for first, last in itertools.pairwise(bounds):
        part = run_rows(backend, operation, x[first:last].contiguous())
        assert torch.equal(part, whole[first:last])


@each_backend
@each_dtype
@pytest.mark.parametrize("operation", ["dense_linear", "head"])
def test_a_row_knows_neither_its_place_nor_its_neighbours(
    backend: Backend, dtype: torch.dtype, operation: str
) -> None:
    row = randn(1, 256)
    alone = run_rows(backend, operation, row.to(dtype))
    for place in range(35):
        x = randn(35, 256, seed=place) * 100
        x[place] = row
        assert torch.equal(run_rows(backend, operation, x.to(dtype))[place], alone[0])


def assert_attends_alone_as_together(
    backend: Backend, queries: torch.Tensor, cache: torch.Tensor, layout: StepLayout
) -> None:
    """Check that each token of a step gets the same bits as in a step of its own."""
    together = backend.attention(queries, cache, layout, 0.2)
    for t, position in enumerate(layout.positions.tolist()):
        i = int((layout.query_starts[1:] <= t).sum())
        alone = StepLayout(
            positions=layout.positions[t : t + 1],
            slots=layout.slots[t : t + 1],
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=torch.tensor([position + 1], dtype=torch.int32),
            block_tables=layout.block_tables[i : i + 1],
            max_query_len=1,
            max_context_len=position + 1,
        )
        assert torch.equal(backend.attention(queries[t : t + 1], cache, alone, 0.2)[0], together[t])


@each_backend
@each_dtype
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
def test_attention_is_the_same_bits_in_any_batch_and_chunk(
    backend: Backend, dtype: torch.dtype, lengths: list[tuple[int, int]]
) -> None:
    """Each sequence's last tokens in one step with the others, then one token a step, alone."""
    layout, num_blocks = make_layout([n for n, _ in lengths], [q for _, q in lengths])
    cache = make_poisoned_cache(layout, num_blocks, 2, 32, dtype)
    queries = randn(len(layout.positions), 4, 32, seed=15).to(dtype)
    assert_attends_alone_as_together(backend, queries, cache, layout)
