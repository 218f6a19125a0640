"""What the compiler makes of the norms and activations, read from the machine code."""

import pytest
from bitwatt_kernels.gpu.elementwise import (
    gated_activation_kernel,
    quantize_kernel,
    rms_norm_kernel,
    row_block,
)

from tests.extent import TEST_ALL
from tests.kernels.gpu.machine_code import SHARED_MEMORY_BYTES, MachineCode, compile_for

QUANTIZED = {"codes_ptr": "int8", "scales_ptr": "float32", "sums_ptr": "int32"}
ARGUMENTS = QUANTIZED | {
    "x_ptr": "bfloat16",
    "gate_up_ptr": "bfloat16",
    "weight_ptr": "float32",
    "y_ptr": "int8",
    "num_features": "i32",
    "eps": "fp32",
}


def compile_row(
    kernel: object, constants: dict[str, bool], num_features: int, capability: int
) -> MachineCode:
    block, num_warps = row_block(num_features)
    return compile_for(
        capability,
        kernel,
        ARGUMENTS,
        {**constants, "BLOCK": block, "GROUP": block, "PDL": False},
        num_warps=num_warps,
    )


@pytest.mark.compiles(by=compile_row)
@pytest.mark.parametrize(
    "capability", SHARED_MEMORY_BYTES if TEST_ALL else [80, 90, 100], ids="sm_{}".format
)
@pytest.mark.parametrize(
    ("kernel", "constants", "num_features"),
    [
        (quantize_kernel, {}, 8640),
        (rms_norm_kernel, {"QUANTIZE": True}, 2560),
        (gated_activation_kernel, {"SILU": False, "NORM": True, "QUANTIZE": True}, 6912),
        (gated_activation_kernel, {"SILU": True, "NORM": False, "QUANTIZE": True}, 28672),
    ],
    ids=["quantize-8640", "rms_norm_quantize-2560", "relu2_norm_quantize-6912", "silu-28672"],
)
def test_a_row_is_read_sixteen_bytes_at_a_time_and_stays_in_registers(
    kernel: object, constants: dict[str, bool], num_features: int, capability: int
) -> None:
    code = compile_row(kernel, constants, num_features, capability)
    assert code.spills == 0
    assert code.count(r"\bLDG\.E\.128\b")
