import torch
from bitwatt.training.ternary import (
    EPSILON,
    BitLinear,
    binary_codes,
    straight_through,
    ternary_codes,
    weight_scale,
)


def make_linear(in_features: int = 64, out_features: int = 32) -> BitLinear:
    linear = BitLinear(in_features, out_features)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(linear.weight, std=0.02, generator=generator)
    return linear


def random(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_straight_through_returns_what_is_quantized_exactly_and_passes_the_gradient():
    x = (random(1000) * 40).requires_grad_()
    quantized = x.detach().round().clamp(-8, 8) * 0.3 + 1
    y = straight_through(x, quantized)
    assert torch.equal(y.detach(), quantized)
    y.backward(torch.arange(1000.0))
    assert torch.equal(x.grad, torch.arange(1000.0))


def test_forward_equals_the_integer_arithmetic_of_the_quantized_operands():
    linear, x = make_linear(1280, 96), random(7, 1280) * 3
    factor = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=EPSILON)
    x_codes = (x * factor).round().clamp(-128, 127).to(torch.int32)
    w_codes = ternary_codes(linear.weight.detach()).to(torch.int32)
    sums = (x_codes[:, None, :] * w_codes[None, :, :]).sum(dim=-1)
    expected = sums.float() / factor * weight_scale(linear.weight.detach())
    assert torch.equal(linear(x).detach(), expected)


def test_bfloat16_autocast_keeps_the_codes_and_rounds_each_sum_once():
    linear, x = make_linear(512, 64), random(5, 512)
    exact = linear(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = linear(x).detach()
    # bfloat16 has 8 significant bits: half a unit in the last place is 2^-8 of the value.
    assert torch.all((rounded - exact).abs() <= exact.abs() * 2**-8)


def test_gradients_are_those_of_a_linear_layer_on_the_quantized_operands():
    linear, x = make_linear(), random(6, 64).requires_grad_()
    upstream = random(6, 32, seed=3)
    linear(x).backward(upstream)
    factor = 127 / x.detach().abs().amax(dim=-1, keepdim=True)
    x_quantized = (x.detach() * factor).round() / factor
    weight = linear.weight.detach()
    w_quantized = ternary_codes(weight) * weight_scale(weight)
    torch.testing.assert_close(x.grad, upstream @ w_quantized)
    torch.testing.assert_close(linear.weight.grad, upstream.T @ x_quantized)


def test_weights_and_inputs_of_zero_give_zeros_not_nans():
    linear = BitLinear(8, 4)
    torch.nn.init.zeros_(linear.weight)
    assert torch.equal(linear(random(3, 8)).detach(), torch.zeros(3, 4))
    assert torch.equal(make_linear(8, 4)(torch.zeros(3, 8)).detach(), torch.zeros(3, 4))


def test_scale_is_the_mean_magnitude_and_codes_are_ternary():
    weight = torch.tensor([[0.3, -0.1, 0.0, -2.0]])
    assert weight_scale(weight).item() == torch.tensor(0.6).item()
    assert ternary_codes(weight).tolist() == [[0.0, 0.0, 0.0, -1.0]]
    assert weight_scale(torch.full((4, 4), 1e-34)).item() == torch.tensor(EPSILON).item()


def test_binary_codes_are_signs_around_the_mean_and_layers_compute_on_them_with_the_same_scale():
    weight = torch.tensor([[0.5, 0.125, -0.125, 0.0]])  # of mean 0.125
    assert binary_codes(weight).tolist() == [[1.0, -1.0, -1.0, -1.0]]
    linear, x = BitLinear(256, 64, binary_codes), (random(7, 256) * 40).round().clamp(-127, 127)
    torch.nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 127  # so that a row is its own codes
    upstream = random(7, 64, seed=3)
    y = linear(x)
    y.backward(upstream)
    weight = linear.weight.detach()
    codes = torch.where(weight > weight.mean(), 1.0, -1.0)
    assert torch.equal(y.detach(), x @ codes.T * weight.abs().mean())
    # Of size 100, and times the scale and through it again.
    torch.testing.assert_close(linear.weight.grad, upstream.T @ x, atol=1e-4, rtol=1e-5)
