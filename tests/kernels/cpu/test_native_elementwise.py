"""Norms, gated activations and rotary embedding of the native backend, against the reference."""

import pytest
import torch
from bitwatt_kernels.backend import QuantizedActivations
from bitwatt_kernels.errors import KernelError
from bitwatt_kernels.reference.attention import rope_table

from tests.kernels.cpu.factories import DTYPES, make_activations, make_cache, make_layout


def assert_codes_close(ours: QuantizedActivations, theirs: QuantizedActivations) -> None:
    """A code may differ by one where the exponential's last bit moves a value across a half."""
    difference = (ours.codes.int() - theirs.codes.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
    torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-5, atol=0)
    assert torch.equal(ours.sums, ours.codes.sum(dim=1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 100, 512, 2560])
def test_rms_norm_equals_the_reference(native, reference, width, dtype):
    weight = torch.randn(width).to(dtype)
    for num_tokens in (1, 3, 50):
        x = make_activations(num_tokens, width).to(dtype)
        ours, theirs = (b.rms_norm(x, weight, 1e-5) for b in (native, reference))
        assert torch.equal(ours, theirs), num_tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 50])
def test_rms_norm_quantize_equals_the_reference(native, reference, num_tokens, dtype):
    x, weight = make_activations(num_tokens, 576).to(dtype), torch.randn(576)
    ours = native.rms_norm_quantize(x, weight, 1e-5)
    theirs = reference.rms_norm_quantize(x, weight, 1e-5)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scales, theirs.scales)
    assert torch.equal(ours.sums, theirs.sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 50])
def test_squared_relu_equals_the_reference(native, reference, num_tokens, dtype):
    gate_up = torch.randn(num_tokens, 2 * 320).to(dtype)
    assert torch.equal(
        native.gated_activation(gate_up, "relu2"), reference.gated_activation(gate_up, "relu2")
    )
    weight = torch.randn(320).to(dtype)
    ours = native.gated_activation_quantize(gate_up, "relu2", weight, 1e-5)
    theirs = reference.gated_activation_quantize(gate_up, "relu2", weight, 1e-5)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scales, theirs.scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_silu_is_within_the_last_bits_of_the_reference(native, reference, normed, dtype):
    gate_up = (torch.randn(20, 2 * 320) * 4).to(dtype)
    # Two exponentials each within 2 ulp, then one rounding to dtype.
    torch.testing.assert_close(
        native.gated_activation(gate_up, "silu"),
        reference.gated_activation(gate_up, "silu"),
        rtol=max(1e-6, 2 * torch.finfo(dtype).eps),
        atol=1e-7,
    )
    weight = torch.randn(320).to(dtype) if normed else None
    assert_codes_close(
        native.gated_activation_quantize(gate_up, "silu", weight, 1e-5),
        reference.gated_activation_quantize(gate_up, "silu", weight, 1e-5),
    )


def test_silu_of_the_extremes_is_finite(native):
    gate = torch.tensor([[-1e4, -110.0, -88.0, 0.0, 88.0, 110.0, 1e4, -3e38]])
    y = native.gated_activation(torch.cat([gate, torch.ones_like(gate)], dim=1), "silu")
    torch.testing.assert_close(y, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 100, 128])
def test_rope_and_cache_equals_the_reference(native, reference, head_dim, dtype, cache_dtype):
    layout, num_blocks = make_layout([5, 40, 0, 33], [5, 1, 2, 20], extra_tokens=1)
    num_tokens = layout.positions.shape[0]
    qkv = torch.randn(num_tokens, (6 + 2 * 2) * head_dim).to(dtype)
    rope = rope_table(64, head_dim, 10000.0)
    ours, theirs = (make_cache(num_blocks, 2, head_dim, cache_dtype) for _ in range(2))
    assert torch.equal(
        native.rope_and_cache(qkv, rope, ours, layout, 6),
        reference.rope_and_cache(qkv, rope, theirs, layout, 6),
    )
    assert torch.equal(ours, theirs)


def test_a_slot_past_the_cache_is_refused(native):
    layout, num_blocks = make_layout([5], [5])
    layout.slots[2] = num_blocks * 16
    cache = make_cache(num_blocks, 1, 32, torch.float32)
    with pytest.raises(KernelError, match="slot"):
        native.rope_and_cache(torch.randn(5, 96), rope_table(8, 32, 1e4), cache, layout, 1)
