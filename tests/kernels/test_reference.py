"""The oracle, against independent arithmetic in numpy's float64 and integers."""

import numpy as np
import pytest
import torch
from bitwatt_kernels.backend import BLOCK_SIZE
from bitwatt_kernels.errors import ShapeError
from bitwatt_kernels.packing import TernaryWeight, pack
from bitwatt_kernels.reference.attention import rope_table
from bitwatt_kernels.reference.linear import accumulate, quantize, ternarize, ternary_linear
from bitwatt_kernels.reference.reference_backend import ReferenceBackend
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cpu.factories import make_activations, make_generator, make_layout, make_ternary

REFERENCE = ReferenceBackend(torch.device("cpu"))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=make_generator(seed))


def test_quantize_rounds_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.4999]])
    assert quantize(x).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 3]]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), num_tokens=st.integers(1, 20))
def test_quantize_is_the_papers_formula(seed: int, num_tokens: int) -> None:
    x = make_activations(num_tokens, 64, seed=seed)
    quantized = quantize(x)
    wide = x.numpy()
    # Every backend divides a number by a tensor as torch does: its reciprocal, times the number.
    scales = np.float32(1) / np.maximum(np.abs(wide).max(axis=1), np.float32(1e-5))
    scales *= np.float32(127)
    codes = np.clip(np.rint(wide * scales[:, None]), -128, 127)
    assert np.array_equal(quantized.scales.numpy(), scales)
    assert np.array_equal(quantized.codes.numpy(), codes)
    assert np.array_equal(quantized.sums.numpy(), codes.sum(axis=1))


def test_quantize_reconstructs_within_half_a_step() -> None:
    x = make_activations(50, 256)
    quantized = quantize(x)
    step = 1 / quantized.scales[:, None]
    assert ((quantized.codes * step - x).abs() <= step * 0.50001).all()


def test_zeros_and_specks_quantize_to_zeros() -> None:
    x = torch.zeros(2, 64)
    x[1] = 1e-34
    quantized = quantize(x)
    assert not quantized.codes.any()
    assert quantized.scales.isfinite().all()


def test_ternarize_is_the_papers_formula() -> None:
    weight = randn(48, 128, seed=1)
    values, scale = ternarize(weight)
    wide = weight.double().numpy()
    assert float(scale) == pytest.approx(np.abs(wide).mean(), rel=1e-6)
    expected = np.clip(np.rint(wide / np.abs(wide).mean()), -1, 1)
    assert np.array_equal(values.numpy(), expected)


def test_ternarize_zeroes_what_is_below_its_epsilon() -> None:
    values, scale = ternarize(torch.full((4, 64), 1e-34))
    assert not values.any()
    assert float(scale) == pytest.approx(1e-5)


def test_ternarize_rounds_half_to_even() -> None:
    weight = torch.tensor([[2.0, 2.0, 0.0, 0.0, 0.5, -0.5, 1.5, -1.5]])  # mean |W| is 1
    assert ternarize(weight)[0].tolist() == [[1, 1, 0, 0, 0, 0, 1, -1]]


@pytest.mark.parametrize("num_tokens", [1, 3, 17])
def test_accumulate_is_exact_at_the_largest_values(num_tokens: int) -> None:
    codes = torch.full((num_tokens, 28672), -128, dtype=torch.int8)
    weight = torch.full((2, 28672), -1, dtype=torch.int8)
    weight[1] = 1
    assert accumulate(codes, weight)[-1].tolist() == [128 * 28672, -128 * 28672]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ternary_linear_scales_each_row_by_its_own_scale(dtype: torch.dtype) -> None:
    """A fused QKV whose parts' scales differ: one scale for all would show at once."""
    parts = [make_ternary(n, 128, seed=n, bias=n == 16) for n in (32, 16, 8)]
    scaled = [
        TernaryWeight(w.codes, torch.full_like(w.scales, 10.0**-i), w.bias)
        for i, w in enumerate(parts)
    ]
    x, residual = quantize(randn(5, 128)), randn(5, 56, seed=2).to(dtype)
    y = ternary_linear(x, TernaryWeight.concatenate(scaled), residual, dtype)
    first = 0
    for i, w in enumerate(scaled):
        rows = slice(first, first := first + w.out_features)
        weight = make_values(w)
        expected = x.codes.double().numpy() @ weight.T * 10.0**-i
        expected = expected / x.scales.double().numpy()[:, None]
        expected += 0 if w.bias is None else w.bias.double().numpy()
        expected += residual[:, rows].double().numpy()
        tolerance = torch.finfo(dtype).eps
        np.testing.assert_allclose(y[:, rows].double().numpy(), expected, rtol=tolerance, atol=1e-5)


def make_values(weight: TernaryWeight) -> np.ndarray:
    """Return the weight's ternary values by reading its bytes as packing.py words it."""
    codes = weight.codes.numpy()
    quarter = codes.shape[1]
    values = np.empty((codes.shape[0], 4 * quarter))
    for j in range(quarter):
        for plane in range(4):
            values[:, j + plane * quarter] = (codes[:, j] // 4**plane) % 4 - 1.0
    return values


def test_ternary_linear_refuses_other_in_features() -> None:
    with pytest.raises(ShapeError, match="128 features; the weight takes 64"):
        ternary_linear(quantize(randn(1, 128)), make_ternary(3, 64), None, torch.float32)


def test_ternary_linear_of_quantized_weights_is_near_the_dense_product() -> None:
    weight, x = randn(64, 512, seed=3), randn(8, 512, seed=4)
    values, scale = ternarize(weight)
    packed = TernaryWeight(pack(values), scale.expand(64).contiguous())
    dense = x @ (values * scale).T
    y = ternary_linear(quantize(x), packed, None, torch.float32)
    assert ((y - dense).square().mean() / dense.square().mean()).sqrt() < 0.01


def test_rms_norm_is_its_formula() -> None:
    x, weight = make_activations(9, 192), randn(192, seed=1)
    wide = x.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5)
    expected = expected * weight.double().numpy()
    np.testing.assert_allclose(REFERENCE.rms_norm(x, weight, 1e-5), expected, rtol=1e-5, atol=1e-6)


def test_gated_activations_are_their_formulas() -> None:
    gate_up = randn(7, 128)
    gate, up = np.split(gate_up.double().numpy(), 2, axis=1)
    relu2 = np.maximum(gate, 0) ** 2 * up
    silu = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(REFERENCE.gated_activation(gate_up, "relu2"), relu2, atol=1e-5)
    np.testing.assert_allclose(REFERENCE.gated_activation(gate_up, "silu"), silu, atol=1e-5)


def test_relu2_past_float16s_range_is_quantized_in_float32() -> None:
    """2B4T's relu² passes 65504, float16's largest value."""
    gate_up = torch.cat([torch.full((1, 64), 300.0), torch.ones(1, 64)], dim=1).half()
    quantized = REFERENCE.gated_activation_quantize(gate_up, "relu2", None, 1e-5)
    assert quantized.codes.tolist() == [[127] * 64]
    assert float(quantized.scales) == pytest.approx(127 / 90000)


def test_rope_rotates_pairs_half_a_head_apart_by_position() -> None:
    """Two tokens of one head of 4: pairs (0, 2) and (1, 3) turn by p and p / 100."""
    layout, num_blocks = make_layout([6], [2])
    cache = torch.full((2, num_blocks, 1, BLOCK_SIZE, 4), torch.nan)
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0, 1.0, 0.0, 0.0, 0.0, 5.0, 6.0, 7.0, 8.0]] * 2)
    q = REFERENCE.rope_and_cache(qkv, rope_table(16, 4, 1e4), cache, layout, num_heads=1)
    for row, position in enumerate((4, 5)):
        first, second = np.exp(1j * position), np.exp(1j * position / 100)
        a, b = (1 + 3j) * first, (2 + 4j) * second
        np.testing.assert_allclose(q[row, 0], [a.real, b.real, a.imag, b.imag], atol=1e-5)
        block, offset = divmod(int(layout.slots[row]), BLOCK_SIZE)
        key, value = cache[:, block, 0, offset]
        np.testing.assert_allclose(key, [first.real, 0, first.imag, 0], atol=1e-6)
        assert value.tolist() == [5, 6, 7, 8]
    assert int(cache.isfinite().sum()) == 2 * 2 * 4


def test_attention_is_softmax_over_the_tokens_so_far() -> None:
    """Chunks of 5 and 1 tokens ending contexts of 37 and 1, two query heads a key head."""
    layout, num_blocks = make_layout([37, 1], [5, 1])
    cache = torch.full((2, num_blocks, 2, BLOCK_SIZE, 8), torch.nan)
    keys, values = randn(2, 37, 2, 8, seed=5).numpy()
    for sequence, length in enumerate((37, 1)):
        for p in range(length):
            block = int(layout.block_tables[sequence, p // BLOCK_SIZE])
            cache[0, block, :, p % BLOCK_SIZE] = torch.from_numpy(keys[p])
            cache[1, block, :, p % BLOCK_SIZE] = torch.from_numpy(values[p])
    queries = randn(6, 4, 8, seed=6)
    y = REFERENCE.attention(queries, cache, layout, 0.3).view(6, 4, 8)
    for t, num_seen in enumerate((33, 34, 35, 36, 37, 1)):
        for head in range(4):
            k, v = keys[:num_seen, head // 2], values[:num_seen, head // 2]
            weights = np.exp(0.3 * k.astype(float) @ queries[t, head].double().numpy())
            expected = weights @ v / weights.sum()
            np.testing.assert_allclose(y[t, head], expected, atol=1e-6)
