"""Under programmatic dependent launch every kernel waits before it reads what others write."""

import re
from typing import Any

import pytest
from bitwatt_kernels.gpu.attention import decode_attention_kernel, prefill_attention_kernel
from bitwatt_kernels.gpu.configs import load
from bitwatt_kernels.gpu.dense import dense_linear_kernel
from bitwatt_kernels.gpu.elementwise import (
    gated_activation_kernel,
    quantize_kernel,
    rms_norm_kernel,
)
from bitwatt_kernels.gpu.normed_linear import config_for, normed_linear_kernel
from bitwatt_kernels.gpu.rope import rope_and_cache_kernel

from tests.kernels.gpu import test_attention_machine_code as attention
from tests.kernels.gpu import test_dense_machine_code as dense
from tests.kernels.gpu import test_elementwise_machine_code as elementwise
from tests.kernels.gpu import test_normed_linear_machine_code as normed
from tests.kernels.gpu.machine_code import MachineCode, compile_for

CONFIGS = load("", (9, 0))
TILE = attention.constants_of(CONFIGS.attention)
DENSE = CONFIGS.dense[0]


def compile_dependent(
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> MachineCode:
    return compile_for(
        90,
        kernel,
        arguments,
        constants | {"PDL": True},
        num_warps=num_warps,
        num_stages=num_stages,
        unaligned=frozenset({"num_tokens", "num_sequences", "table_stride", "max_splits"}),
    )


@pytest.mark.compiles(by=compile_dependent)
@pytest.mark.parametrize(
    ("kernel", "arguments", "constants", "num_warps", "num_stages"),
    [
        (quantize_kernel, elementwise.ARGUMENTS, {"BLOCK": 4096, "GROUP": 4096}, 8, 1),
        (
            rms_norm_kernel,
            elementwise.ARGUMENTS,
            {"BLOCK": 4096, "GROUP": 4096, "QUANTIZE": True},
            8,
            1,
        ),
        (
            gated_activation_kernel,
            elementwise.ARGUMENTS,
            {"BLOCK": 8192, "GROUP": 8192, "SILU": False, "NORM": True, "QUANTIZE": True},
            16,
            1,
        ),
        (rope_and_cache_kernel, attention.ARGUMENTS, attention.ROPE, 4, 1),
        (
            decode_attention_kernel,
            attention.ARGUMENTS,
            TILE
            | {
                "BLOCK_ROWS": CONFIGS.attention.decode.block_rows,
                "IS_SPLIT": True,
                "ROPE": True,
            },
            CONFIGS.attention.decode.num_warps,
            CONFIGS.attention.decode.num_stages,
        ),
        (
            prefill_attention_kernel,
            attention.ARGUMENTS,
            TILE | {"BLOCK_ROWS": CONFIGS.attention.prefill.block_rows},
            CONFIGS.attention.prefill.num_warps,
            CONFIGS.attention.prefill.num_stages,
        ),
        *(
            (
                normed_linear_kernel,
                normed.ARGUMENTS,
                normed.constants(num_tokens, is_gated=False),
                config_for(num_tokens).num_warps,
                config_for(num_tokens).num_stages,
            )
            for num_tokens in (1, 8)
        ),
        (
            dense_linear_kernel,
            dense.ARGUMENTS | {"x_ptr": "bfloat16", "w_ptr": "bfloat16"},
            dense.constants_of(DENSE, HAS_RESIDUAL=False),
            DENSE.num_warps,
            DENSE.num_stages,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_kernel_waits_before_its_first_load_and_lets_the_next_one_start(
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> None:
    code = compile_dependent(kernel, arguments, constants, num_warps, num_stages)
    assert code.spills == 0
    texts = [text for _, text in code.instructions]
    waits = next(i for i, text in enumerate(texts) if "ACQBULK" in text)
    assert not any(re.search(r"\b(LDG|LDGSTS|STG)\b", text) for text in texts[:waits])
    assert any("PREEXIT" in text for text in texts[waits:])
