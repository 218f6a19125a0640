"""What the compiler makes of the kernels for an MI300 (gfx942), which nothing here has run on.

With weights unpacked by Triton's own operations, as the interpreter runs them, and sm_80's tiles.
"""

import re
from typing import Any

import pytest
import triton
from bitwatt_kernels.gpu.attention import decode_attention_kernel, prefill_attention_kernel
from bitwatt_kernels.gpu.configs import load
from bitwatt_kernels.gpu.dense import dense_linear_kernel
from bitwatt_kernels.gpu.elementwise import gated_activation_kernel, rms_norm_kernel
from bitwatt_kernels.gpu.linear import ternary_linear_kernel
from bitwatt_kernels.gpu.normed_linear import config_for, normed_linear_kernel
from bitwatt_kernels.gpu.rope import rope_and_cache_kernel
from bitwatt_kernels.gpu.row_queue import rows_at_once
from triton.backends.compiler import GPUTarget

from tests.extent import TEST_ALL
from tests.kernels.gpu import test_attention_machine_code as attention
from tests.kernels.gpu import test_dense_machine_code as dense
from tests.kernels.gpu import test_elementwise_machine_code as elementwise
from tests.kernels.gpu import test_linear_machine_code as linear
from tests.kernels.gpu import test_normed_linear_machine_code as normed
from tests.kernels.gpu.machine_code import source_of

SHARED_BYTES = 64 * 1024  # of a workgroup: AMD CDNA 3 instruction set architecture, LDS
CONFIGS = load("", (8, 0))
ROWS, ROW_BLOCK = rows_at_once(1)
DENSE = CONFIGS.dense[0]
TILE = attention.constants_of(CONFIGS.attention, PRECISION="ieee")
QUANTIZING = {"BLOCK": 8192, "GROUP": 8192, "QUANTIZE": True}
Case = tuple[Any, dict[str, str], dict[str, Any], int]
MATMULS: list[Case] = [
    (
        dense_linear_kernel,
        dense.ARGUMENTS | {"x_ptr": "bfloat16", "w_ptr": "bfloat16"},
        dense.constants_of(DENSE, PRECISION="ieee"),
        DENSE.num_warps,
    ),
    *(
        (
            ternary_linear_kernel,
            linear.ARGUMENTS,
            {
                "BLOCK_OUT": config.block_out,
                "BLOCK_TOKENS": config.block_tokens,
                "BLOCK_BYTES": config.block_bytes,
                "GROUP_TOKENS": 8,
                "SPLIT_PLANES": config.split_planes,
                "BFLOAT16": False,
                "IS_SPLIT": True,
                "HAS_TAIL": False,
                "HAS_BIAS": False,
                "HAS_RESIDUAL": True,
                "RAW": True,
                "GATED": True,
                "SILU": True,
                "HAS_NORM": True,
                "ROWS": ROWS,
                "ROW_BLOCK": ROW_BLOCK,
                "INLINE_ASM": False,
            },
            config.num_warps,
        )
        for config in CONFIGS.linear[1:]
    ),
    (
        decode_attention_kernel,
        attention.ARGUMENTS,
        TILE | {"BLOCK_ROWS": CONFIGS.attention.decode.block_rows, "IS_SPLIT": True, "ROPE": True},
        CONFIGS.attention.decode.num_warps,
    ),
    (
        prefill_attention_kernel,
        attention.ARGUMENTS,
        TILE | {"BLOCK_ROWS": CONFIGS.attention.prefill.block_rows},
        CONFIGS.attention.prefill.num_warps,
    ),
]
# A tile of 8 tokens is too narrow for AMD's matrix instructions: exact, by plain multiplications.
OTHERS: list[Case] = [
    *(
        (
            normed_linear_kernel,
            normed.ARGUMENTS,
            normed.constants(num_tokens, is_gated=True) | {"INLINE_ASM": False},
            config_for(num_tokens).num_warps,
        )
        for num_tokens in (1, 8)
    ),
    (rms_norm_kernel, elementwise.ARGUMENTS, QUANTIZING, 16),
    (gated_activation_kernel, elementwise.ARGUMENTS, QUANTIZING | {"SILU": True, "NORM": True}, 16),
    (rope_and_cache_kernel, attention.ARGUMENTS, attention.ROPE, 4),
]
CASES = [*MATMULS, *OTHERS] if TEST_ALL else MATMULS[:1]


@pytest.mark.slow(30)
@pytest.mark.parametrize(
    ("kernel", "arguments", "constants", "num_warps"),
    CASES,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_kernel_fits_an_mi300_without_spills(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], num_warps: int
) -> None:
    unaligned = {"num_tokens", "num_splits", "num_sequences", "table_stride", "max_splits"}
    compiled = triton.compile(
        source_of(kernel, arguments, constants | {"PDL": False}, frozenset(unaligned)),
        target=GPUTarget("hip", "gfx942", 64),
        options={"num_warps": num_warps, "num_stages": 2, "enable_fp_fusion": False},
    )
    assembly = compiled.asm["amdgcn"]
    assert re.findall(r"\.vgpr_spill_count: *(\d+)", assembly) == ["0"]
    assert compiled.metadata.shared <= SHARED_BYTES
    assert re.search(r"\b(global|buffer)_load_dwordx4\b", assembly)
    is_matmul = any(kernel is case[0] for case in MATMULS)
    assert is_matmul == ("v_mfma" in assembly)
