"""What the compiler makes of the draw, read from the machine code."""

import pytest
from bitwatt_kernels.gpu.drawing import MAX_CANDIDATES, NUM_BINS, NUM_WARPS, draw_kernel

from tests.extent import TEST_ALL
from tests.kernels.gpu.machine_code import SHARED_MEMORY_BYTES, MachineCode, compile_for

ARGUMENTS = {
    "logits_ptr": "float32",
    "best_ptr": "int64",
    "settings_ptr": "float64",
    "candidates_ptr": "float32",
    "ids_ptr": "int32",
    "tokens_ptr": "int64",
    "vocab_size": "i32",
    "num_tiles": "i32",
}


def compile_draw(capability: int, has_best: bool) -> MachineCode:
    return compile_for(
        capability,
        draw_kernel,
        ARGUMENTS,
        {
            "HAS_BEST": has_best,
            "MAX_CANDIDATES": MAX_CANDIDATES,
            "NUM_BINS": NUM_BINS,
            "BLOCK": MAX_CANDIDATES,
        },
        num_warps=NUM_WARPS,
        unaligned=frozenset({"num_tiles"}),
    )


@pytest.mark.slow(30)
@pytest.mark.compiles(by=compile_draw)
@pytest.mark.parametrize("has_best", [True, False] if TEST_ALL else [True], ids="best-{}".format)
@pytest.mark.parametrize(
    "capability", SHARED_MEMORY_BYTES if TEST_ALL else [90], ids="sm_{}".format
)
def test_a_draw_stays_in_registers_and_reads_sixteen_bytes_at_a_time(
    capability: int, has_best: bool
) -> None:
    code = compile_draw(capability, has_best)
    assert code.spills == 0
    assert code.shared_bytes <= 48 * 1024
    assert code.count(r"\bLDG\.E\.128\b")
    assert not code.count(r"\bDFMA\b"), "sums are of integers: float64 is slow on many cards"
