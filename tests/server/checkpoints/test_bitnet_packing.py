"""The layout of packed BitNet checkpoints, against bytes written out by hand."""

import pytest
import torch
from bitwatt.checkpoints.bitnet_packing import pack_bitnet, unpack_bitnet

# Rows 0, 2, 4, 6 share the first byte and rows 1, 3, 5, 7 the second, lowest bits first.
VALUES = [[-1], [0], [0], [1], [1], [1], [-1], [0]]
PACKED = [[0b00_10_01_00], [0b01_10_10_01]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_packing_stripes_rows_over_the_quarters_of_the_output(dtype: torch.dtype) -> None:
    packed = pack_bitnet(torch.tensor(VALUES, dtype=dtype))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == PACKED


def test_unpacking_undoes_packing() -> None:
    values = unpack_bitnet(torch.tensor(PACKED, dtype=torch.uint8))
    assert values.dtype == torch.int8
    assert values.tolist() == VALUES


def test_rows_that_do_not_fill_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="6 rows"):
        pack_bitnet(torch.zeros(6, 4))


def test_a_code_of_3_is_refused() -> None:
    with pytest.raises(ValueError, match="code of 3"):
        unpack_bitnet(torch.tensor([[0b00_11_01_00]], dtype=torch.uint8))
