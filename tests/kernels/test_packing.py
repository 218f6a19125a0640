"""The packed layout: two bits a weight, every value and size kept, everything else refused."""

import pytest
import torch
from bitwatt_kernels.errors import DtypeError, ShapeError
from bitwatt_kernels.packing import (
    IN_FEATURES_MULTIPLE,
    VALID_BYTES,
    TernaryWeight,
    concatenate_rows,
    pack,
    unpack,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def ternary_matrices(draw: st.DrawFn) -> Tensor:
    rows = draw(st.integers(0, 70))
    columns = draw(st.integers(1, 12)) * IN_FEATURES_MULTIPLE
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator)


@settings(deadline=None)
@given(ternary_matrices())
def test_unpacking_what_was_packed_gives_it_back(weight: Tensor) -> None:
    codes = pack(weight)
    assert codes.shape == (weight.shape[0], weight.shape[1] // 4)
    assert torch.equal(unpack(codes), weight)


@settings(deadline=None)
@given(ternary_matrices())
def test_code_3_never_occurs(weight: Tensor) -> None:
    codes = pack(weight)
    assert not bool((codes & codes >> 1 & 0b01010101).any())


@pytest.mark.parametrize(("value", "byte"), [(-1, 0b00000000), (0, 0b01010101), (1, 0b10101010)])
def test_each_value_fills_a_matrix(value: int, byte: int) -> None:
    weight = torch.full((3, 128), value, dtype=torch.int8)
    assert pack(weight).unique().tolist() == [byte]
    assert torch.equal(unpack(pack(weight)), weight)


def test_byte_j_holds_weights_a_quarter_row_apart_from_the_low_bits_up() -> None:
    """A row of 64 in four planes of 16: byte j is the codes of k = j, j + 16, j + 32, j + 48."""
    weight = torch.zeros(2, 64, dtype=torch.int8)
    weight[0, [0, 16, 32, 48]] = torch.tensor([1, -1, 0, 1], dtype=torch.int8)
    weight[0, 15] = -1
    weight[1, 63] = 1
    codes = pack(weight)
    assert codes[0, 0] == 0b10_01_00_10
    assert codes[0, 15] == 0b01_01_01_00
    assert codes[1, 15] == 0b10_01_01_01
    assert codes[0, 1:15].tolist() == codes[1, :15].tolist()[1:] == [0b01_01_01_01] * 14


@pytest.mark.parametrize("shape", [(2, 0), (2, 63), (2, 96), (64,), (2, 2, 64)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="multiple of 64"):
        pack(torch.zeros(shape, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(DtypeError, match=str(dtype)):
        pack(torch.zeros(2, 64, dtype=dtype))


@pytest.mark.parametrize("value", [-128, -2, 2, 127])
def test_other_values_are_refused(value: int) -> None:
    weight = torch.zeros(2, 64, dtype=torch.int8)
    weight[1, 63] = value
    with pytest.raises(ValueError, match=str(value)):
        pack(weight)


def test_only_bytes_are_unpacked() -> None:
    with pytest.raises(DtypeError, match="int8"):
        unpack(torch.zeros(2, 16, dtype=torch.int8))


def make_weight(rows: int, *, scale: float = 1.0, bias: float | None = None) -> TernaryWeight:
    return TernaryWeight(
        torch.full((rows, 16), 0b01010101, dtype=torch.uint8),
        torch.full((rows,), scale),
        None if bias is None else torch.full((rows,), bias),
    )


def test_rows_without_values_are_concatenated_to_the_size_of_those_with_values() -> None:
    for columns in ((), (3,), (3, 2)):
        rows = [torch.randn(2, *columns), torch.randn(5, *columns).half()]
        whole = concatenate_rows(rows)
        assert torch.equal(whole, torch.cat(rows))
        sizes = concatenate_rows([row.to("meta") for row in rows])
        assert sizes.is_meta
        assert (sizes.shape, sizes.dtype) == (whole.shape, whole.dtype)
        assert concatenate_rows([rows[1].to("meta")]).dtype == torch.float16


def test_concatenated_weights_keep_each_rows_scale_and_bias() -> None:
    fused = TernaryWeight.concatenate(
        [make_weight(2, scale=0.5), make_weight(3, scale=2.0, bias=7.0)]
    )
    assert (fused.out_features, fused.in_features) == (5, 64)
    assert fused.scales.tolist() == [0.5, 0.5, 2.0, 2.0, 2.0]
    assert fused.bias is not None
    assert fused.bias.tolist() == [0.0, 0.0, 7.0, 7.0, 7.0]
    assert TernaryWeight.concatenate([make_weight(2), make_weight(3)]).bias is None


def test_a_weight_checks_its_parts() -> None:
    codes = torch.zeros(4, 16, dtype=torch.uint8)
    with pytest.raises(DtypeError, match="codes"):
        TernaryWeight(codes.char(), torch.ones(4))
    with pytest.raises(DtypeError, match="scales"):
        TernaryWeight(codes, torch.ones(4, dtype=torch.float64))
    with pytest.raises(DtypeError, match=r"scales are torch\.float16; expected torch\.float32$"):
        TernaryWeight(codes, torch.ones(4, dtype=torch.float16))
    with pytest.raises(ShapeError, match="scales"):
        TernaryWeight(codes, torch.ones(1))
    with pytest.raises(ShapeError, match="bias"):
        TernaryWeight(codes, torch.ones(4), torch.ones(3))


def test_fused_groups_are_split_to_a_size_that_divides_all() -> None:
    codes = torch.zeros(2, 96, dtype=torch.uint8)  # 384 weights a row
    by_row = TernaryWeight(codes, torch.tensor([1.0, 2.0]))
    by_128 = TernaryWeight(codes, torch.tensor([[3.0, 4.0, 5.0]] * 2))
    by_192 = TernaryWeight(codes, torch.tensor([[6.0, 7.0]] * 2), torch.ones(2))
    assert (by_row.group, by_128.group, by_192.group) == (None, 128, 192)
    two = TernaryWeight.concatenate([by_row, by_128])
    assert two.group == 128
    assert two.scales.tolist() == [[1] * 3, [2] * 3, [3, 4, 5], [3, 4, 5]]
    three = TernaryWeight.concatenate([by_row, by_128, by_192])
    assert three.group == 64
    assert three.scales[2:5].tolist() == [[3, 3, 4, 4, 5, 5]] * 2 + [[6, 6, 6, 7, 7, 7]]
    assert three.scales.dtype == torch.float32
    halves = TernaryWeight(codes, by_128.scales.half())
    assert TernaryWeight.concatenate([halves, halves]).scales.dtype == torch.float16
    mixed = TernaryWeight.concatenate([by_row, halves])
    assert torch.equal(mixed.scales, two.scales)
    assert mixed.scales.dtype == torch.float32
    assert three.bias is not None
    assert three.bias.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("num_groups", [0, 1, 4, 6])
def test_scales_that_go_with_no_whole_groups_are_refused(num_groups: int) -> None:
    codes = torch.zeros(4, 48, dtype=torch.uint8)  # 192 weights a row: three groups of 64
    assert TernaryWeight(codes, torch.ones(4, 3)).group == 64
    with pytest.raises(ShapeError, match=r"scales have shape .* groups of whole 64 weights"):
        TernaryWeight(codes, torch.ones(4, num_groups))


def test_the_valid_bytes_are_those_that_packing_can_make() -> None:
    rows = torch.cartesian_prod(*[torch.arange(-1, 2, dtype=torch.int8)] * 4)  # [81, 4]
    made = pack(rows.repeat_interleave(16, dim=1))[:, 0]
    assert sorted(made.tolist()) == sorted(VALID_BYTES)
    assert len(set(VALID_BYTES)) == 81
