"""What the compiler makes of norm, quantization and linear in one, read from the machine code."""

import re
from typing import Any

import pytest
from bitwatt_kernels.gpu.normed_linear import config_for, normed_linear_kernel

from tests.extent import TEST_ALL
from tests.kernels.gpu.machine_code import SHARED_MEMORY_BYTES, MachineCode, compile_for

ARGUMENTS = {
    "x_ptr": "bfloat16",
    "norm_ptr": "float32",
    "w_ptr": "uint8",
    "w_scales_ptr": "float32",
    "bias_ptr": "float32",
    "residual_ptr": "bfloat16",
    "y_ptr": "bfloat16",
    "num_tokens": "i32",
    "out_features": "i32",
    "row_bytes": "i32",
    "eps": "fp32",
}
CASES = [
    (capability, num_tokens, role)
    for capability in SHARED_MEMORY_BYTES
    for num_tokens in (1, 8)
    for role in ("qkv", "o", "gate_up", "down")
    if capability != 103 or (num_tokens == 8 and role in ("gate_up", "down"))  # else as sm_100
]
SAMPLE = [(90, 1, "gate_up"), (90, 8, "down"), (86, 8, "gate_up")]


def constants(num_tokens: int, *, is_gated: bool) -> dict[str, Any]:
    config = config_for(num_tokens, is_gated=is_gated)
    return {
        "TOKENS": config.tokens,
        "BLOCK_OUT": config.block_out,
        "BLOCK_BYTES": config.block_bytes,
        "BLOCK_IN": config.block_in,
        "UNROLL": config.unroll,
        "HAS_TAIL": False,
        "HAS_NORM": True,
        "HAS_BIAS": False,
        "HAS_RESIDUAL": not is_gated,
        "GATED": is_gated,
        "SILU": False,
        "INLINE_ASM": True,
    }


def compile_normed(capability: int, num_tokens: int, role: str) -> MachineCode:
    """Return the kernel's machine code; down reads what gate_up leaves in float32."""
    config = config_for(num_tokens)
    arguments = ARGUMENTS | ({"x_ptr": "float32"} if role == "down" else {})
    arguments |= {"y_ptr": "float32"} if role == "gate_up" else {}
    options = constants(num_tokens, is_gated=role == "gate_up")
    options["HAS_RESIDUAL"] = role in ("o", "down")
    return compile_for(
        capability,
        normed_linear_kernel,
        arguments,
        options | {"PDL": False},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        unaligned=frozenset({"num_tokens"}),
    )


@pytest.mark.slow(100)
@pytest.mark.compiles(by=compile_normed)
@pytest.mark.parametrize(("capability", "num_tokens", "role"), CASES if TEST_ALL else SAMPLE)
def test_what_is_normed_stays_in_registers_and_meets_the_weights_on_tensor_cores(
    capability: int, num_tokens: int, role: str
) -> None:
    code = compile_normed(capability, num_tokens, role)
    assert code.spills == 0
    assert code.shared_bytes <= min(SHARED_MEMORY_BYTES[capability], 64 * 1024)
    assert any("IMMA" in text for text in code.main_loop(r"\bIMMA\b"))
    assert code.count(r"\b(LDGSTS|LDG)\.E.*\.128\b")
    # A quotient or root in the loop over weights would be one a feature: scales are outside it.
    assert not any("MUFU" in text for text in code.main_loop(r"\bIMMA\b"))
    # Weights are on their way before the first activation is asked for.
    asked = [text for _, text in code.instructions if re.search(r"\b(LDG|CCTL)\.E", text)]
    assert "CCTL" in asked[0]
