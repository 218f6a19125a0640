"""What the compiler makes of the fixed-order matmul, read from the machine code."""

from typing import Any

import pytest
from bitwatt_kernels.gpu.configs import DenseConfig, load
from bitwatt_kernels.gpu.dense import dense_linear_kernel

from tests.extent import TEST_ALL
from tests.kernels.gpu.machine_code import SHARED_MEMORY_BYTES, MachineCode, compile_for

ARGUMENTS = {
    "x_scales_ptr": "float32",
    "w_scales_ptr": "float32",
    "bias_ptr": "bfloat16",
    "residual_ptr": "bfloat16",
    "y_ptr": "float32",
    "best_ptr": "int64",
    "num_tokens": "i32",
    "out_features": "i32",
    "in_features": "i32",
}
CONFIGS = load("", (9, 0)).dense


def constants_of(config: DenseConfig, **changes: Any) -> dict[str, Any]:
    """Return the constants of a multiplication by bfloat16 weights, added to a residual."""
    return {
        "BLOCK_OUT": config.block_out,
        "BLOCK_TOKENS": config.block_tokens,
        "BLOCK_IN": config.block_in,
        "GROUP_TOKENS": 8,
        "HAS_TAIL": False,
        "HAS_BIAS": False,
        "HAS_RESIDUAL": True,
        "HAS_BEST": False,
        "IS_INT8": False,
        "PRECISION": "tf32",
    } | changes


def compile_dense(config: DenseConfig, is_int8: bool, capability: int) -> MachineCode:
    operand = "int8" if is_int8 else "bfloat16"
    constants = constants_of(
        config,
        BLOCK_IN=config.block_in * (2 if is_int8 else 1),
        HAS_RESIDUAL=not is_int8,
        HAS_BEST=is_int8 or config is not CONFIGS[0],
        IS_INT8=is_int8,
        PDL=False,
    )
    return compile_for(
        capability,
        dense_linear_kernel,
        ARGUMENTS | {"x_ptr": operand, "w_ptr": operand},
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        unaligned=frozenset({"num_tokens"}),
    )


@pytest.mark.slow(35)
@pytest.mark.compiles(by=compile_dense)
@pytest.mark.parametrize(
    ("config", "is_int8", "capability"),
    [
        (config, is_int8, capability)
        for capability in SHARED_MEMORY_BYTES
        for config in load("", divmod(capability, 10)).dense
        for is_int8 in (False, True)
    ]
    if TEST_ALL
    else [
        (CONFIGS[0], False, 80),
        (CONFIGS[0], True, 90),
        *((config, False, 90) for config in CONFIGS),
        (CONFIGS[-1], True, 80),
        (CONFIGS[-1], False, 100),
    ],
    ids=lambda value: f"tokens-{value.block_tokens}" if isinstance(value, DenseConfig) else None,
)
def test_matmuls_use_tensor_cores_wide_loads_and_no_local_memory(
    config: DenseConfig, is_int8: bool, capability: int
) -> None:
    code = compile_dense(config, is_int8, capability)
    assert code.spills == 0
    assert code.shared_bytes <= SHARED_MEMORY_BYTES[capability]
    hopper = "IGMMA" if is_int8 else "HGMMA"
    ampere = "IMMA" if is_int8 else "HMMA"
    blackwell = "IMMA" if is_int8 else "UTCHMMA"
    tensor_core = {90: hopper, 100: blackwell, 103: blackwell}.get(capability, ampere)
    assert code.count(rf"\b{tensor_core}\b")
    assert code.count(r"\bLDGSTS\.E.*\.128\b")
