"""ternary_linear equals the reference bit for bit, whatever the shape and the launch."""

from dataclasses import replace

import pytest
import torch
from bitwatt_kernels.backend import QuantizedActivations
from bitwatt_kernels.errors import DtypeError, ShapeError
from bitwatt_kernels.gpu.configs import LinearConfig
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.linear import ternary_linear
from bitwatt_kernels.packing import TernaryWeight, pack
from bitwatt_kernels.reference import linear as reference

DECODE = LinearConfig(8, 64, 8, 128, num_warps=4, num_stages=3, num_splits=1)
SMALL_BATCH = LinearConfig(16, 64, 16, 64, num_warps=4, num_stages=3, num_splits=1)
PREFILL = LinearConfig(
    None, 128, 128, 64, num_warps=8, num_stages=3, num_splits=1, split_planes=False
)
BFLOAT16 = replace(PREFILL, bfloat16=True)


def make_weight(
    num_rows: int, num_columns: int, device: torch.device, *, has_bias: bool = False
) -> TernaryWeight:
    """Return a random ternary matrix with a scale and a bias of its own in every row."""
    generator = torch.Generator().manual_seed(num_rows * 131 + num_columns)
    weight = torch.randint(-1, 2, (num_rows, num_columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(num_rows, generator=generator) + 0.5
    bias = torch.randn(num_rows, generator=generator) if has_bias else None
    return TernaryWeight(
        pack(weight).to(device), scales.to(device), None if bias is None else bias.to(device)
    )


def make_activations(
    num_tokens: int, num_features: int, device: torch.device
) -> QuantizedActivations:
    generator = torch.Generator().manual_seed(num_tokens * 137 + num_features)
    x = torch.randn(num_tokens, num_features, generator=generator)
    x[-1] *= 100  # a token's scale is its own
    q = reference.quantize(x)
    return QuantizedActivations(q.codes.to(device), q.scales.to(device), q.sums.to(device))


def expected(
    x: QuantizedActivations,
    weight: TernaryWeight,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the reference's result, on the host: CUDA has no integer matmul to check with."""
    bias = None if weight.bias is None else weight.bias.cpu()
    return reference.ternary_linear(
        QuantizedActivations(x.codes.cpu(), x.scales.cpu(), x.sums.cpu()),
        TernaryWeight(weight.codes.cpu(), weight.scales.cpu(), bias),
        None if residual is None else residual.cpu(),
        dtype,
    )


@pytest.fixture(scope="module")
def gpu(device: torch.device) -> Gpu:
    return Gpu(device)


@pytest.mark.parametrize("num_splits", [1, 3], ids="splits-{}".format)
@pytest.mark.parametrize(
    ("config", "num_tokens", "out_features", "in_features"),
    [
        (DECODE, 1, 64, 512),
        (DECODE, 3, 200, 64),  # one step, masked
        (DECODE, 8, 1, 64 * 27),  # an odd number of 64s: a tail of 16 bytes
        (SMALL_BATCH, 3, 67, 64 * 15),
        (SMALL_BATCH, 17, 130, 256),
        (PREFILL, 17, 130, 64 * 9),
        (PREFILL, 1000, 72, 192),
        (BFLOAT16, 17, 130, 64 * 9),
        (replace(SMALL_BATCH, bfloat16=True), 17, 130, 256),
    ],
    ids=lambda value: f"tile-{value.block_tokens}" if isinstance(value, LinearConfig) else None,
)
def test_accumulators_are_exact_and_outputs_bitwise_equal(
    config: LinearConfig,
    num_tokens: int,
    out_features: int,
    in_features: int,
    num_splits: int,
    gpu: Gpu,
    device: torch.device,
) -> None:
    x = make_activations(num_tokens, in_features, device)
    weight = make_weight(out_features, in_features, device)
    ones = TernaryWeight(weight.codes, torch.ones_like(weight.scales))
    unscaled = QuantizedActivations(x.codes, torch.ones_like(x.scales), x.sums)
    config = replace(config, num_splits=num_splits)

    sums = ternary_linear(unscaled, ones, None, torch.float32, gpu, config)
    assert torch.equal(sums.cpu(), expected(unscaled, ones, None, torch.float32))
    y = ternary_linear(x, weight, None, torch.float32, gpu, config)
    assert torch.equal(y.cpu(), expected(x, weight, None, torch.float32))
    assert not gpu.counters.any()
    assert not gpu.sums.any()


@pytest.mark.parametrize("split_planes", [True, False])
def test_sums_in_bfloat16_are_exact_up_to_the_longest_row_that_is_so_multiplied(
    split_planes: bool, gpu: Gpu, device: torch.device
) -> None:
    """Codes of 2, times the largest activations: 2²⁴ at the limit, and one less beside it."""
    config = LinearConfig(None, 16, 16, 1024, 4, 2, 1, split_planes, bfloat16=True)
    num_features = config.most_exact_features
    for longer in (0, 64):  # which is multiplied as int8
        ones = torch.ones(1, num_features + longer, dtype=torch.int8)
        weight = TernaryWeight(pack(ones).to(device), torch.ones(1, device=device))
        codes = torch.full((2, num_features + longer), -128, dtype=torch.int8)
        codes[1, -1] = -127
        sums = codes.sum(dim=1, dtype=torch.int32)
        x = QuantizedActivations(codes.to(device), torch.ones(2, device=device), sums.to(device))
        y = ternary_linear(x, weight, None, torch.float32, gpu, config)
        assert y[:, 0].tolist() == sums.tolist()


def test_a_sum_too_large_for_the_scratch_is_not_split(gpu: Gpu, device: torch.device) -> None:
    num_rows = len(gpu.sums) // DECODE.block_tokens + 1
    x = make_activations(1, 256, device)
    weight = make_weight(num_rows, 256, device)
    y = ternary_linear(x, weight, None, torch.float32, gpu, replace(DECODE, num_splits=2))
    assert torch.equal(y.cpu(), expected(x, weight, None, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_splits", [1, 2], ids="splits-{}".format)
def test_bias_and_residual_are_added_before_the_one_rounding(
    num_splits: int, dtype: torch.dtype, gpu: Gpu, device: torch.device
) -> None:
    x = make_activations(5, 512, device)
    weight = make_weight(96, 512, device, has_bias=True)
    residual = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    config = replace(DECODE, num_splits=num_splits)
    y = ternary_linear(x, weight, residual, dtype, gpu, config)
    assert torch.equal(y.cpu(), expected(x, weight, residual, dtype))


def test_rows_of_fused_matrices_keep_their_own_scales(gpu: Gpu, device: torch.device) -> None:
    parts = [make_weight(rows, 256, device) for rows in (80, 24, 24)]
    x = make_activations(3, 256, device)
    fused = ternary_linear(x, TernaryWeight.concatenate(parts), None, torch.float32, gpu)
    apart = [ternary_linear(x, part, None, torch.float32, gpu) for part in parts]
    assert torch.equal(fused, torch.cat(apart, dim=1))


def test_extreme_codes_do_not_overflow(gpu: Gpu, device: torch.device) -> None:
    codes = torch.full((2, 4096), -128, dtype=torch.int8, device=device)
    x = QuantizedActivations(codes, torch.ones(2, device=device), codes.sum(-1, dtype=torch.int32))
    ones = torch.ones(64, 4096, dtype=torch.int8)
    weight = TernaryWeight(pack(ones).to(device), torch.ones(64, device=device))
    y = ternary_linear(x, weight, None, torch.float32, gpu)
    assert torch.equal(y, torch.full_like(y, -128.0 * 4096))


@pytest.mark.parametrize("num_splits", [1, 4], ids="splits-{}".format)
def test_scratch_and_output_are_written_before_they_are_read(
    num_splits: int, gpu: Gpu, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = torch.empty

    def poisoned(*size: object, **options: object) -> torch.Tensor:
        tensor = empty(*size, **options)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**30) - 7)

    monkeypatch.setattr(torch, "empty", poisoned)
    x = make_activations(3, 1088, device)
    weight = make_weight(70, 1088, device)
    config = replace(DECODE, num_splits=num_splits)
    y = ternary_linear(x, weight, None, torch.float32, gpu, config)
    assert torch.equal(y.cpu(), expected(x, weight, None, torch.float32))


def test_a_token_gets_the_same_bits_in_every_batch_and_configuration(
    gpu: Gpu, device: torch.device
) -> None:
    x = make_activations(20, 576, device)
    weight = make_weight(40, 576, device)
    together = ternary_linear(x, weight, None, torch.bfloat16, gpu, PREFILL)
    for i in (0, 7, 19):
        one = QuantizedActivations(x.codes[i : i + 1], x.scales[i : i + 1], x.sums[i : i + 1])
        alone = ternary_linear(one, weight, None, torch.bfloat16, gpu)
        assert torch.equal(alone[0], together[i])


def test_no_tokens_give_no_rows(gpu: Gpu, device: torch.device) -> None:
    x = make_activations(1, 64, device)
    none = QuantizedActivations(x.codes[:0], x.scales[:0], x.sums[:0])
    assert ternary_linear(none, make_weight(8, 64, device), None, torch.float32, gpu).shape == (
        0,
        8,
    )


def test_arguments_that_do_not_fit_are_refused(gpu: Gpu, device: torch.device) -> None:
    x = make_activations(2, 128, device)
    with pytest.raises(ShapeError, match="activations have 128 features; the weight takes 64"):
        ternary_linear(x, make_weight(8, 64, device), None, torch.float32, gpu)
    weight = make_weight(8, 128, device)
    with pytest.raises(ShapeError, match="residual has shape"):
        ternary_linear(x, weight, torch.zeros(2, 9, device=device), torch.float32, gpu)
    residual = torch.zeros(2, 8, device=device, dtype=torch.float16)
    with pytest.raises(DtypeError, match=r"residual is torch\.float16"):
        ternary_linear(x, weight, residual, torch.float32, gpu)
    odd = TernaryWeight(torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8))
    small = QuantizedActivations(
        torch.zeros(1, 32, dtype=torch.int8), torch.ones(1), torch.zeros(1)
    )
    with pytest.raises(ShapeError, match="multiple of 64"):
        ternary_linear(small, odd, None, torch.float32, gpu)
