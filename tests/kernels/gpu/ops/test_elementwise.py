"""Norms, gated activations and quantization equal the reference."""

import pytest
import torch
from bitwatt_kernels.backend import Activation, QuantizedActivations
from bitwatt_kernels.errors import DtypeError, ShapeError
from bitwatt_kernels.gpu import elementwise
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.reference import elementwise as reference
from bitwatt_kernels.reference.linear import quantize as reference_quantize

EPS = 1e-5
SHAPES = [(1, 64), (3, 64 * 15), (17, 2560), (2, 6912)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_rows(
    num_tokens: int, num_features: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens * 139 + num_features)
    x = torch.randn(num_tokens, num_features, generator=generator)
    x *= torch.rand(num_tokens, 1, generator=generator) * 10
    return x.to(dtype).to(device)


def assert_same(actual: QuantizedActivations, expected: QuantizedActivations) -> None:
    assert torch.equal(actual.codes.cpu(), expected.codes)
    assert torch.equal(actual.scales.cpu(), expected.scales)
    assert torch.equal(actual.sums.cpu(), expected.sums)


def assert_close(actual: QuantizedActivations, expected: QuantizedActivations) -> None:
    """Scales within float32 rounding; codes off by one where a product lies on a half."""
    torch.testing.assert_close(actual.scales.cpu(), expected.scales, rtol=1e-6, atol=0)
    difference = (actual.codes.cpu().int() - expected.codes.int()).abs()
    assert difference.max() <= 1
    assert (difference != 0).float().mean() < 1e-3
    assert torch.equal(actual.sums, actual.codes.sum(-1, dtype=torch.int32))


@pytest.fixture(scope="module")
def gpu(device: torch.device) -> Gpu:
    return Gpu(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_and_norms_round_as_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, gpu: Gpu, device: torch.device
) -> None:
    x = make_rows(*shape, dtype, device)
    weight = make_rows(1, shape[1], dtype, device)[0]
    host, host_weight = x.cpu(), weight.cpu()
    assert_same(elementwise.quantize(x, gpu), reference_quantize(host))
    y = elementwise.rms_norm(x, weight, EPS, gpu)
    assert torch.equal(y.cpu(), reference.rms_norm(host, host_weight, EPS))
    assert_same(
        elementwise.rms_norm_quantize(x, weight, EPS, gpu),
        reference.rms_norm_quantize(host, host_weight, EPS),
    )


def test_quantize_rounds_halves_to_even_and_keeps_tiny_rows_at_zero(
    gpu: Gpu, device: torch.device
) -> None:
    halves = torch.arange(64) - 31.5
    halves[0] = 127.0
    x = torch.stack([halves, torch.full_like(halves, 1e-9), torch.zeros_like(halves)])
    q = elementwise.quantize(x.to(device), gpu)
    assert_same(q, reference_quantize(x))
    assert q.codes[0, 31:34].tolist() == [0, 0, 2]
    assert not q.codes[1:].any()


@pytest.mark.parametrize("activation", ["relu2", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 1088), (17, 192)], ids=str)
def test_gated_activation_equals_the_reference(
    shape: tuple[int, int],
    dtype: torch.dtype,
    activation: Activation,
    gpu: Gpu,
    device: torch.device,
) -> None:
    gate_up = make_rows(shape[0], 2 * shape[1], dtype, device)
    host = gate_up.cpu()
    y = elementwise.gated_activation(gate_up, activation, gpu).cpu()
    expected = reference.gated_activation(host, activation)
    if activation == "silu":  # exponentials differ in the last bits of float32
        torch.testing.assert_close(y, expected)
    else:
        assert torch.equal(y, expected)
    for norm in (None, make_rows(1, shape[1], dtype, device)[0]):
        actual = elementwise.gated_activation_quantize(gate_up, activation, norm, EPS, gpu)
        quantized = reference.gated_activation_quantize(
            host, activation, None if norm is None else norm.cpu(), EPS
        )
        (assert_close if activation == "silu" else assert_same)(actual, quantized)


def test_a_thousand_tokens_equal_the_reference(gpu: Gpu, device: torch.device) -> None:
    x = make_rows(1000, 128, torch.float16, device)
    weight = make_rows(1, 64, torch.float16, device)[0]
    assert_same(
        elementwise.gated_activation_quantize(x, "relu2", weight, EPS, gpu),
        reference.gated_activation_quantize(x.cpu(), "relu2", weight.cpu(), EPS),
    )


def test_a_token_gets_the_same_bits_in_every_batch(gpu: Gpu, device: torch.device) -> None:
    x = make_rows(9, 960, torch.bfloat16, device)
    weight = make_rows(1, 960, torch.bfloat16, device)[0]
    together = elementwise.rms_norm_quantize(x, weight, EPS, gpu)
    alone = elementwise.rms_norm_quantize(x[4:5], weight, EPS, gpu)
    assert torch.equal(alone.codes[0], together.codes[4])
    assert torch.equal(alone.scales[0], together.scales[4])


def test_arguments_that_do_not_fit_are_refused(gpu: Gpu, device: torch.device) -> None:
    x = torch.zeros(2, 128, device=device)
    with pytest.raises(ShapeError, match=r"norm weight has shape \[64\]; expected \[128\]"):
        elementwise.rms_norm(x, torch.ones(64, device=device), EPS, gpu)
    with pytest.raises(ShapeError, match="expected contiguous"):
        elementwise.quantize(x.T, gpu)
    with pytest.raises(DtypeError, match=r"activations are torch\.int8"):
        elementwise.quantize(x.to(torch.int8), gpu)
    with pytest.raises(ShapeError, match="65600 features; the limit is 65536"):
        elementwise.row_block(65600)
