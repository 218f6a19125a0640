"""The unpacking in PTX equals packing.unpack: its few instructions are carried out here.

The interpreter runs the plain-Triton form of the same functions, for it has no inline assembly.
"""

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from bitwatt_kernels.gpu.linear import _unpack, unpack_in_place
from bitwatt_kernels.packing import pack, unpack

INSTRUCTIONS = {"shr.b32": np.right_shift, "and.b32": np.bitwise_and}


def run(function: Any, words: np.ndarray) -> list[np.ndarray]:
    """Return outputs $0 to $3 of a jit function's assembly for each 32-bit word in $4."""
    source = inspect.getsource(function.fn)
    body = re.search(r"\.reg \.b32 \w+;(.*?)\}", source, re.DOTALL)
    assert body is not None
    registers = {"$4": words}
    for line in body[1].strip().splitlines():
        operation, operands = line.strip().rstrip(";").split(" ", 1)
        target, left, right = operands.split(", ")
        value = registers.get(right)
        literal = np.uint32(int(right, 0)) if value is None else value
        registers[target] = INSTRUCTIONS[operation](registers[left], literal)
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize(
    ("function", "factors"), [(_unpack, (1, 1, 1, 1)), (unpack_in_place, (1, 4, 1, 4))]
)
def test_each_plane_holds_its_codes_times_its_factor(
    function: Any, factors: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (16, 256), generator=generator, dtype=torch.int8)
    codes = pack(weight)
    words = codes.numpy().view(np.uint32)
    planes = [plane.view(np.int8) for plane in run(function, words)]
    expected = (unpack(codes) + 1).view(16, 4, 64).numpy()
    for i, (plane, factor) in enumerate(zip(planes, factors, strict=True)):
        assert np.array_equal(plane, expected[:, i] * factor)
