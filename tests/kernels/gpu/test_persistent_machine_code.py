"""What the compiler makes of a persistent step, read from the machine code."""

import re

import pytest
import triton
import triton.language as tl
from bitwatt_kernels.gpu.persistent import (
    PROGRAMS_PER_MULTIPROCESSOR,
    config_for,
    persistent_layers_kernel,
    wait_for_all,
)

from tests.extent import TEST_ALL
from tests.kernels.gpu import test_attention_machine_code as attention
from tests.kernels.gpu.machine_code import SHARED_MEMORY_BYTES, MachineCode, compile_for
from tests.kernels.gpu.test_linear_machine_code import order_of

ARGUMENTS = attention.ARGUMENTS | {
    "weights_ptr": "int64",
    "h_ptr": "bfloat16",
    "attended_ptr": "bfloat16",
    "gated_ptr": "float32",
    "arrivals_ptr": "int32",
    "key_scales_ptr": "bfloat16",  # the keys again, unless they are codes
    "value_scales_ptr": "bfloat16",
    "num_layers": "i32",
    "num_tokens": "i32",
    "num_programs": "i32",
    "layer_stride": "i32",
}
UNALIGNED = ("num_layers", "num_tokens", "num_sequences", "num_programs", "max_splits")
# Of one token and of eight: values that live from phase to phase, moved outside the linears' loops.
# By Triton 3.6.0 and 3.7.1.
MOST_SPILLS = {80: (0, 32), 90: (24, 72), 100: (256, 320), 120: (8, 144)}
ALIKE = {80: (80, 86, 89), 90: (90,), 100: (100, 103), 120: (120,)}  # cards of one machine code
SIZES_2B4T = {"HIDDEN": 2560, "QKV": 3840, "ATTENDED": 2560, "INTERMEDIATE": 6912}


def compile_step(capability: int, num_tokens: int) -> MachineCode:
    """Return the machine code of BitNet 2B4T's step."""
    linear, config = config_for(num_tokens), attention.CONFIGS[capability]
    return compile_for(
        capability,
        persistent_layers_kernel,
        ARGUMENTS,
        attention.constants_of(config, BLOCK_ROWS=config.decode.block_rows)
        | SIZES_2B4T
        | {
            "SUB_NORMS": True,
            "SILU": False,
            "TOKENS": linear.tokens,
            "BLOCK_OUT": linear.block_out,
            "BLOCK_BYTES": linear.block_bytes,
            "BLOCK_IN": linear.block_in,
            "UNROLL": linear.unroll,
            "IS_SPLIT": True,
            "INLINE_ASM": True,
        },
        num_warps=config.decode.num_warps,
        num_stages=config.decode.num_stages,
        unaligned=frozenset({*UNALIGNED, "table_stride"}),
    )


@triton.jit
def two_phases_kernel(x_ptr, y_ptr, arrivals_ptr, target):  # type: ignore[no-untyped-def]
    """Write a tile, wait for all, and read the next program's."""
    i = tl.arange(0, 512)
    own = tl.program_id(0) * 512
    tl.store(x_ptr + own + i, tl.load(y_ptr + own + i))
    wait_for_all(arrivals_ptr, target)
    tl.store(y_ptr + own + i, tl.load(x_ptr + (own + 512) + i))


@pytest.mark.parametrize(
    "capability", SHARED_MEMORY_BYTES if TEST_ALL else [90], ids="sm_{}".format
)
def test_what_was_stored_before_the_wait_is_released_and_acquired_behind_it(
    capability: int,
) -> None:
    """One thread arrives for all: a barrier, a fence, the count; a fence, a barrier, then reads."""
    code = compile_for(
        capability,
        two_phases_kernel,
        {"x_ptr": "float32", "y_ptr": "float32", "arrivals_ptr": "int32", "target": "i32"},
        {},
        num_warps=4,
    )
    order_of(
        code,
        r"\bSTG\.E\.128\b",
        r"\bBAR\.SYNC\b",
        r"\bMEMBAR\.\w+\.GPU\b",
        r"\bREDG?\.E\.ADD\.STRONG\.GPU\b",
        r"\bLDG\.E\.STRONG\.GPU\b",
        r"\bCCTL\.IVALL\b",
        r"\bBAR\.SYNC\b",
        r"\bLDG\.E\.128\b",
        r"\bSTG\.E\.128\b",
    )


@pytest.mark.slow(250)
@pytest.mark.skipif(not TEST_ALL, reason="compiles for half a minute: BITWATT_TEST_ALL=1 runs it")
@pytest.mark.parametrize("num_tokens", [1, 8])
@pytest.mark.parametrize("capability", ALIKE, ids="sm_{}".format)
def test_linears_loops_stay_in_registers_and_as_many_programs_fit_as_are_launched(
    capability: int, num_tokens: int
) -> None:
    code = compile_step(capability, num_tokens)
    loops = code.innermost_loops(r"\bIMMA\b")
    assert len(loops) == 4, "one a linear"
    assert not any(re.search(r"\b(STL|LDL|MUFU)\b", text) for loop in loops for text in loop)
    assert code.count(r"\b(HMMA|HGMMA|UTCHMMA)\b"), "attention's"
    assert code.count(r"\b(LDGSTS|LDG)\.E.*\.128\b")
    assert code.spills <= MOST_SPILLS[capability][num_tokens == 8]
    shared = PROGRAMS_PER_MULTIPROCESSOR * (code.shared_bytes + 1024)
    assert shared <= min(SHARED_MEMORY_BYTES[card] for card in ALIKE[capability]) + 1024
    # Each linear's weights are on their way before the wait that comes first in it.
    assert code.count(r"\bCCTL\.E\.PF2\b") >= 4
    order_of(code, r"\bCCTL\.E\.PF2\b", r"\bREDG?\.E\.ADD\.STRONG\.GPU\b", r"\bCCTL\.IVALL\b")
