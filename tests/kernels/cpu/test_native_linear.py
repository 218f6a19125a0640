"""The native backend's codes and ternary outputs equal the reference's bit for bit."""

import pytest
import torch
from bitwatt_kernels.backend import QuantizedActivations, TernaryHead
from bitwatt_kernels.cpu.native_backend import NativeBackend
from bitwatt_kernels.errors import DtypeError, KernelError, ShapeError
from bitwatt_kernels.packing import TernaryWeight, pack
from bitwatt_kernels.reference.reference_backend import ReferenceBackend

from tests.kernels.cpu.factories import (
    DTYPES,
    make_activations,
    make_extreme_codes,
    make_ternary,
)

# Sizes that fill no row block, one, several, and an odd number of them; both ends of in_features.
SHAPES = [(1, 64), (5, 128), (16, 192), (40, 2560), (48, 6912), (100, 256)]
NUMS_OF_TOKENS = (1, 2, 3, 8, 12, 31)
# By scale groups: two of them and many, of both sizes that files have, and of one they don't.
GROUPED = [(1, 128, 64), (5, 256, 128), (48, 960, 64), (40, 2560, 128), (100, 384, 192)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [1, 17, 64, 2560])
def test_quantize_equals_the_reference(native, reference, in_features, dtype):
    for num_tokens in (1, 3, 70):
        x = make_activations(num_tokens, in_features).to(dtype)
        ours, theirs = native.quantize(x), reference.quantize(x)
        assert torch.equal(ours.codes, theirs.codes), num_tokens
        assert torch.equal(ours.scales, theirs.scales), num_tokens
        assert torch.equal(ours.sums, theirs.sums), num_tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("in_features", "group"), [(128, 64), (2560, 128), (384, 192)])
def test_quantize_by_groups_equals_the_reference(native, reference, in_features, group, dtype):
    for num_tokens in (1, 3, 70):
        x = make_activations(num_tokens, in_features)
        x[:, :group] *= 1e-6  # a group has a scale of its own, the smallest too
        x = x.to(dtype)
        ours, theirs = native.quantize(x, group=group), reference.quantize(x, group=group)
        assert ours.scales.shape == (num_tokens, in_features // group)
        assert torch.equal(ours.codes, theirs.codes), num_tokens
        assert torch.equal(ours.scales, theirs.scales), num_tokens
        assert torch.equal(ours.sums, theirs.sums), num_tokens


@pytest.mark.parametrize("group", [-64, 0, 32, 100, 128, 192])
def test_features_that_make_no_groups_are_refused(native, reference, group):
    for backend in (native, reference):
        with pytest.raises(ShapeError, match=f"128 features .* groups of {group}"):
            backend.quantize(torch.ones(1, 128), group=group)


def test_quantize_of_a_zero_row_is_zero(native: NativeBackend) -> None:
    q = native.quantize(torch.zeros(2, 64))
    assert not q.codes.any()
    assert torch.isfinite(q.scales).all()


def test_a_nan_reaches_the_output(native: NativeBackend) -> None:
    x = torch.ones(2, 64)
    x[0, 3] = torch.nan
    weight = native.prepare_ternary(make_ternary(8, 64))
    y = native.ternary_linear(native.quantize(x), weight, None, torch.bfloat16)
    assert y[0].isnan().all()
    assert not y[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"N{s[0]}-K{s[1]}")
def test_ternary_linear_equals_the_reference(native, reference, shape, dtype):
    weight = make_ternary(*shape, bias=shape[0] % 2 == 1)
    prepared = native.prepare_ternary(weight)
    for num_tokens in NUMS_OF_TOKENS:
        x = reference.quantize(make_activations(num_tokens, shape[1]))
        residual = torch.randn(num_tokens, shape[0]).to(dtype) if num_tokens % 2 else None
        ours = native.ternary_linear(x, prepared, residual, dtype)
        theirs = reference.ternary_linear(x, weight, residual, dtype)
        assert torch.equal(ours, theirs), num_tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GROUPED, ids=lambda s: f"N{s[0]}-K{s[1]}-group{s[2]}")
@pytest.mark.parametrize("scales_dtype", [torch.float32, torch.float16], ids=str)
def test_scales_by_groups_equal_the_reference(native, reference, scales_dtype, shape, dtype):
    rows, columns, group = shape
    weight = make_ternary(rows, columns, bias=rows % 2 == 1, group=group, scales_dtype=scales_dtype)
    assert weight.scales.dtype == scales_dtype
    prepared = native.prepare_ternary(weight)
    for num_tokens in NUMS_OF_TOKENS:
        x = reference.quantize(make_activations(num_tokens, columns), group=group)
        residual = torch.randn(num_tokens, rows).to(dtype) if num_tokens % 2 else None
        ours = native.ternary_linear(x, prepared, residual, dtype)
        theirs = reference.ternary_linear(x, weight, residual, dtype)
        assert torch.equal(ours, theirs), num_tokens


def test_activations_of_other_groups_are_refused(native, reference):
    x = reference.quantize(torch.ones(1, 256), group=64)
    for group, expected in ((None, 256), (128, 128)):
        weight = native.prepare_ternary(make_ternary(16, 256, group=group))
        with pytest.raises(ShapeError, match=f"every 64 features; .* one to every {expected}"):
            native.ternary_linear(x, weight, None, torch.float32)


@pytest.mark.parametrize("group", [None, 64])
def test_ternary_linear_equals_the_reference_at_1000_tokens(native, reference, group):
    weight = make_ternary(80, 256, group=group)
    x = reference.quantize(make_activations(1000, 256), group=group)
    ours = native.ternary_linear(x, native.prepare_ternary(weight), None, torch.float32)
    assert torch.equal(ours, reference.ternary_linear(x, weight, None, torch.float32))


@pytest.mark.parametrize(
    ("group", "scales_dtype"), [(None, torch.float32), (64, torch.float16), (576, torch.float32)]
)
@pytest.mark.parametrize("num_tokens", [8, 27, 44, 70])
def test_many_rows_equal_the_reference(native, reference, num_tokens, group, scales_dtype):
    """So many that tables of sums serve them where the instruction set has those."""
    weight = make_ternary(555, 1152, bias=True, group=group, scales_dtype=scales_dtype)
    x = reference.quantize(make_activations(num_tokens, 1152), group=group)
    residual = torch.randn(num_tokens, 555)
    ours = native.ternary_linear(x, native.prepare_ternary(weight), residual, torch.float32)
    assert torch.equal(ours, reference.ternary_linear(x, weight, residual, torch.float32))


def test_the_largest_codes_of_many_rows_do_not_overflow(native, reference):
    codes = torch.tensor([0b10101010, 0b00000000], dtype=torch.uint8)
    weight = TernaryWeight(codes.repeat(256).unsqueeze(1).repeat(1, 512), torch.ones(512))
    x = QuantizedActivations(
        torch.full((40, 2048), -128, dtype=torch.int8),
        torch.ones(40),
        torch.full((40,), -128 * 2048, dtype=torch.int32),
    )
    ours = native.ternary_linear(x, native.prepare_ternary(weight), None, torch.float32)
    assert torch.equal(ours, reference.ternary_linear(x, weight, None, torch.float32))


@pytest.mark.parametrize("group", [None, 4096])
@pytest.mark.parametrize("num_tokens", [1, 4, 13])
def test_the_largest_codes_do_not_overflow(native, reference, num_tokens, group):
    in_features = 8192
    weight = TernaryWeight(
        torch.full((16, in_features // 4), 0b10101010, dtype=torch.uint8),
        torch.ones(16 if group is None else (16, in_features // group)),
    )
    x = make_extreme_codes(num_tokens, in_features, group=group)
    ours = native.ternary_linear(x, native.prepare_ternary(weight), None, torch.float32)
    assert torch.equal(ours, reference.ternary_linear(x, weight, None, torch.float32))


@pytest.mark.parametrize("group", [64, 128, 256])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 40])
def test_the_largest_sums_of_groups_do_not_overflow(native, reference, num_tokens, group):
    """Half of a group's activations are the largest, half the smallest, in turns of each length."""
    rows, columns = 320, 512
    codes = torch.tensor([0b10101010, 0b00000000, 0b10001000, 0b00100010], dtype=torch.uint8)
    weight = TernaryWeight(
        codes.repeat(rows // 4).unsqueeze(1).repeat(1, columns // 4),
        torch.ones(rows, columns // group),
    )
    place = torch.arange(columns)
    turns = torch.tensor([1, 2, 4, 32, 64, columns]).repeat(7)[:num_tokens, None]
    x_codes = torch.where(place // turns % 2 == 0, -128, 127).to(torch.int8)
    sums = x_codes.int().view(num_tokens, -1, group).sum(-1, dtype=torch.int32)
    x = QuantizedActivations(x_codes, torch.ones(sums.shape), sums)
    ours = native.ternary_linear(x, native.prepare_ternary(weight), None, torch.float32)
    assert torch.equal(ours, reference.ternary_linear(x, weight, None, torch.float32))


def test_a_prepared_weight_takes_two_bits_a_weight(native: NativeBackend) -> None:
    prepared = native.prepare_ternary(make_ternary(256, 2560))
    assert native.nbytes(prepared) == 256 * 2560 // 4 + 256 * 4
    grouped = native.prepare_ternary(make_ternary(256, 2560, group=128))
    assert native.nbytes(grouped) == 256 * 2560 // 4 + 256 * 20 * 4
    as_stored = make_ternary(256, 2560, group=128, scales_dtype=torch.float16)
    assert native.nbytes(native.prepare_ternary(as_stored)) == 256 * 2560 // 4 + 256 * 20 * 2


def test_every_finite_float16_scale_is_widened_exactly(native: NativeBackend) -> None:
    """Subnormal ones too. A sum of 1 at an activation's scale of 1 is the weight's scale."""
    scales = torch.arange(1 << 16).to(torch.uint16).view(torch.float16)
    scales = scales[scales.isfinite()].view(-1, 64)
    codes = torch.zeros(len(scales), 64 * 64, dtype=torch.int8)
    codes[:, ::64] = 1
    weight = native.prepare_ternary(TernaryWeight(pack(codes), scales))
    x = torch.zeros(64, 64, 64, dtype=torch.int8)
    x[torch.arange(64), torch.arange(64), 0] = 1  # token t reads group t alone
    one_each = torch.eye(64, dtype=torch.int32)
    x = QuantizedActivations(x.flatten(1), torch.ones(64, 64), one_each)
    sums = native.ternary_linear(x, weight, None, torch.float32)
    assert torch.equal(sums, scales.float().T)


def test_a_weight_of_other_width_is_refused(native, reference):
    prepared = native.prepare_ternary(make_ternary(16, 128))
    with pytest.raises(ShapeError, match="64 features; the weight takes 128"):
        native.ternary_linear(reference.quantize(torch.ones(1, 64)), prepared, None, torch.float32)


def test_an_element_type_without_a_kernel_is_refused(native: NativeBackend) -> None:
    with pytest.raises(DtypeError, match="float64"):
        native.quantize(torch.ones(1, 64, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vocab_size", "hidden_size"), [(3, 64), (77, 192), (500, 512), (33, 100), (40, 1312)]
)
def test_head_is_within_float32_rounding_of_the_reference(
    native, reference, vocab_size, hidden_size, dtype
):
    weight = torch.randn(vocab_size, hidden_size).to(dtype)
    prepared = native.prepare_head(weight)
    for num_tokens in (1, 2, 3, 9):
        x = torch.randn(num_tokens, hidden_size).to(dtype)
        # Products of 16-bit numbers are exact; a sum of n rounded terms of size 1 is off by about
        # sqrt(n) · 2^-24 · sqrt(n), and 1e-4 leaves a margin of several.
        torch.testing.assert_close(
            native.head(x, prepared), reference.head(x, weight), atol=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(3, 64), (77, 192), (500, 512), (33, 100)])
def test_int8_head_equals_the_reference(native, reference, vocab_size, hidden_size, dtype):
    weight = torch.randn(vocab_size, hidden_size).to(dtype)
    ours, theirs = (backend.prepare_head(weight, bits=8) for backend in (native, reference))
    for num_tokens in (1, 2, 3, 9):
        x = torch.randn(num_tokens, hidden_size).to(dtype)
        assert torch.equal(native.head(x, ours), reference.head(x, theirs)), num_tokens


def test_the_largest_int8_logits_do_not_overflow(native, reference):
    weight = torch.ones(20, 8192)
    weight[:, ::2] = -1
    x = weight[:2].clone()
    assert torch.equal(
        native.head(x, native.prepare_head(weight, bits=8)),
        reference.head(x, reference.prepare_head(weight, bits=8)),
    )


def test_a_wide_head_is_the_same_in_every_batch(native: NativeBackend) -> None:
    """More columns than one segment of the sums covers, and rows that fill no block."""
    weight, x = torch.randn(53, 1312).bfloat16(), torch.randn(19, 1312).bfloat16()
    weight = native.prepare_head(weight)
    together = native.head(x, weight)
    for first, last in [(0, 1), (3, 5), (4, 8), (5, 18)]:
        assert torch.equal(native.head(x[first:last], weight), together[first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(3, 64), (77, 33), (500, 512)])
def test_a_tied_embedding_is_read_from_the_head(native, vocab_size, hidden_size, dtype):
    """One matrix in memory serves both, and its rows are the checkpoint's bit for bit."""
    weight = torch.randn(vocab_size, hidden_size).to(dtype)
    head = native.prepare_head(weight)
    token_ids = torch.cat([torch.arange(vocab_size), torch.tensor([1, 0, vocab_size - 1])])
    assert torch.equal(native.embed(token_ids, head), weight[token_ids])
    assert torch.equal(native.embed(token_ids, weight), weight[token_ids])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 64, None), (77, 192, 64), (500, 512, 128)], ids=str)
def test_a_ternary_head_and_its_embedding_equal_the_reference(native, reference, shape, dtype):
    vocab_size, hidden_size, group = shape
    weight = make_ternary(vocab_size, hidden_size, group=group)
    ours = TernaryHead(native.prepare_ternary(weight), dtype)
    theirs = TernaryHead(weight, dtype)
    token_ids = torch.cat([torch.arange(vocab_size), torch.tensor([1, 0, vocab_size - 1])])
    assert torch.equal(native.embed(token_ids, ours), reference.embed(token_ids, theirs))
    x = torch.randn(9, hidden_size).to(dtype)
    assert torch.equal(native.head(x, ours), reference.head(x, theirs))


@pytest.mark.parametrize("token_id", [-1, 32])
def test_a_token_id_past_the_vocabulary_is_refused(native: NativeBackend, token_id: int) -> None:
    ternary = TernaryHead(native.prepare_ternary(make_ternary(32, 64)), torch.float32)
    for head in (native.prepare_head(torch.randn(32, 64)), ternary):
        with pytest.raises(KernelError, match="token id"):
            native.embed(torch.tensor([0, token_id]), head)


def test_a_prepared_head_is_a_copy(native: NativeBackend) -> None:
    """The checkpoint's file may change or vanish under a view of it."""
    weight = torch.randn(32, 64)
    head = native.prepare_head(weight)
    row = weight[:1].clone()
    weight.zero_()
    assert torch.equal(native.embed(torch.tensor([0]), head), row)
    assert native.nbytes(head) == weight.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_prepared_dense_weights_are_near_exact_sums_rounded_once(native, dtype):
    """K and N are no multiples of a line, a segment or a row block."""
    g = torch.Generator().manual_seed(1)
    x, weight, bias, residual = (
        torch.randn(*shape, generator=g).to(dtype)
        for shape in ((29, 531), (75, 531), (75,), (29, 75))
    )
    y = native.dense_linear(x, native.prepare_dense(weight), bias, residual)
    exact = x.double() @ weight.double().T + bias.double() + residual.double()
    magnitudes = x.double().abs() @ weight.double().abs().T + bias.abs() + residual.abs()
    # A float32 sum of K products errs by K roundings of their magnitudes at most.
    error = (531 + 3) * 2.0**-24 * magnitudes + torch.finfo(dtype).eps * exact.abs()
    assert ((y.double() - exact).abs() <= error).all()


def test_a_dense_linear_refuses_what_does_not_fit(native):
    weight, x = native.prepare_dense(torch.randn(75, 64)), torch.randn(3, 64)
    for misfit in (
        (torch.randn(3, 63), None, None),
        (x, torch.randn(74), None),
        (x, torch.randn(75).bfloat16(), None),
        (x, None, torch.randn(2, 75)),
    ):
        with pytest.raises(ShapeError):
            native.dense_linear(misfit[0], weight, *misfit[1:])
    assert native.dense_linear(x[:0], weight, None, None).shape == (0, 75)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dense_linear_is_near_the_reference(native, reference: ReferenceBackend, dtype):
    x, weight = torch.randn(5, 96).to(dtype), torch.randn(24, 96).to(dtype)
    bias, residual = torch.randn(24).to(dtype), torch.randn(5, 24).to(dtype)
    # Three roundings to bfloat16 (sum, bias, residual) of values up to about 40.
    atol = 0.5 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(
        native.dense_linear(x, weight, bias, residual),
        reference.dense_linear(x, weight, bias, residual),
        atol=atol,
        rtol=0,
    )
