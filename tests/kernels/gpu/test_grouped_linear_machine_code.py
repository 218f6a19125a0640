"""What the compiler makes of grouped_linear, read from the machine code: no GPU needed."""

from itertools import product

import pytest
from bitwatt_kernels.gpu.grouped_linear import GROUPS, TILES, GroupedTile, grouped_linear_kernel

from tests.extent import TEST_ALL
from tests.kernels.gpu.machine_code import SHARED_MEMORY_BYTES, MachineCode, compile_for

pytestmark = pytest.mark.slow(50)

ARGUMENTS = {
    "x_ptr": "int8",
    "x_scales_ptr": "float32",
    "x_sums_ptr": "int32",
    "w_ptr": "uint8",
    "w_scales_ptr": "float16",  # as files have them
    "bias_ptr": "float32",
    "residual_ptr": "bfloat16",
    "y_ptr": "bfloat16",
    "num_tokens": "i32",
    "out_features": "i32",
    "row_bytes": "i32",
    "num_groups": "i32",
}
# Instructions a weight, with groups of 128: a division and four operations a group's sum.
MOST_INSTRUCTIONS_PER_WEIGHT = {8: 2.0, 16: 3.1, 32: 5.2}
# By capability, tokens and group.
MORE_INSTRUCTIONS = {(103, 32, 128): 5.4}
# Compiling takes seconds each: the others with BITWATT_TEST_ALL=1.
TARGETS = list(product(SHARED_MEMORY_BYTES, GROUPS)) if TEST_ALL else [(90, 128)]


def compile_grouped(
    tile: GroupedTile,
    group: int,
    capability: int,
    *,
    scales: str = "float16",
    has_tail: bool = False,
    has_all: bool = False,
) -> MachineCode:
    constants = {
        "BLOCK_OUT": tile.block_out,
        "BLOCK_TOKENS": tile.block_tokens,
        "GROUP": group,
        "GROUP_TOKENS": 8,
        "HAS_TAIL": has_tail,
        "HAS_BIAS": has_all,
        "HAS_RESIDUAL": has_all,
        "INLINE_ASM": True,
        "PDL": False,
    }
    return compile_for(
        capability,
        grouped_linear_kernel,
        ARGUMENTS | {"w_scales_ptr": scales},
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
        unaligned=frozenset({"num_tokens", "num_groups"}),
    )


def name(value: object) -> str:
    return f"tokens-{value.block_tokens}" if isinstance(value, GroupedTile) else str(value)


@pytest.mark.compiles(by=compile_grouped)
@pytest.mark.parametrize(("capability", "group"), TARGETS)
@pytest.mark.parametrize("tile", TILES, ids=name)
def test_main_loop_uses_tensor_cores_wide_loads_and_no_local_memory(
    tile: GroupedTile, group: int, capability: int
) -> None:
    code = compile_grouped(tile, group, capability)
    weights_per_thread = tile.block_out * group * 4 / (32 * tile.num_warps)
    per_weight = len(code.main_loop("MMA")) / weights_per_thread
    print(f"sm_{capability}, {name(tile)}, groups of {group}: {per_weight:.2f} a weight")
    most = MOST_INSTRUCTIONS_PER_WEIGHT[tile.block_tokens] * 128 / group
    assert per_weight <= MORE_INSTRUCTIONS.get((capability, tile.block_tokens, group), most)
    assert code.spills == 0
    assert code.shared_bytes <= SHARED_MEMORY_BYTES[capability]
    hopper = capability == 90 and tile.block_tokens >= 16
    assert code.count(r"\bIGMMA\b" if hopper else r"\bIMMA\b")
    assert code.count(r"\bLDGSTS\.E.*\.128\b")


def test_every_epilogue_and_a_tail_of_groups_compile() -> None:
    for scales in ("float16", "float32"):
        code = compile_grouped(TILES[-1], 128, 90, scales=scales, has_tail=True, has_all=True)
        assert code.spills == 0
