"""What the compiler makes of ternary_linear, read from the machine code: no GPU needed."""

import re
from dataclasses import replace

import pytest
from bitwatt_kernels.gpu.configs import LinearConfig, load
from bitwatt_kernels.gpu.linear import ternary_linear_kernel
from bitwatt_kernels.gpu.row_queue import MAX_QUEUED_TOKENS, rows_at_once

from tests.extent import TEST_ALL
from tests.kernels.gpu.machine_code import SHARED_MEMORY_BYTES, MachineCode, compile_for

pytestmark = pytest.mark.slow(100)

ARGUMENTS = {
    "x_ptr": "int8",
    "x_scales_ptr": "float32",
    "x_sums_ptr": "int32",
    "w_ptr": "uint8",
    "w_scales_ptr": "float32",
    "bias_ptr": "float32",
    "residual_ptr": "bfloat16",
    "y_ptr": "bfloat16",
    "sums_ptr": "int32",
    "counters_ptr": "int32",
    "raw_ptr": "bfloat16",
    "norm_ptr": "float32",
    "queue_ptr": "int32",
    "eps": "fp32",
    "num_tokens": "i32",
    "out_features": "i32",
    "row_bytes": "i32",
    "num_splits": "i32",
}
SAMPLE = (80, 90, 100)
CONFIGS_OF = {
    capability: load("", divmod(capability, 10)).linear
    for capability in (SHARED_MEMORY_BYTES if TEST_ALL else SAMPLE)
}
if TEST_ALL:  # what an entry of tuned/ may ask for where int8 is slow
    for slow in (100, 103):
        CONFIGS_OF[slow] += (replace(CONFIGS_OF[slow][-1], block_tokens=64, bfloat16=True),)
CONFIGS = CONFIGS_OF[90]
# Instructions a weight, above which an H200 couldn't stream weights at its bandwidth is about
# 1.7; these are what the layout and the unpacking are for.
MOST_INSTRUCTIONS_PER_WEIGHT = {8: 0.8, 16: 1.1, 32: 1.1, 64: 1.1, 128: 1.5}


def compile_linear(
    config: LinearConfig,
    capability: int,
    *,
    has_tail: bool = False,
    is_split: bool = True,
    has_residual: bool = True,
    has_bias: bool = False,
    pdl: bool = False,
    is_raw: bool = False,
    is_gated: bool = False,
    num_rows: int = 0,
) -> MachineCode:
    rows, row_block = rows_at_once(num_rows)
    constants = {
        "BLOCK_OUT": config.block_out,
        "BLOCK_TOKENS": config.block_tokens,
        "BLOCK_BYTES": config.block_bytes,
        "GROUP_TOKENS": 8,
        "SPLIT_PLANES": config.split_planes,
        "BFLOAT16": config.bfloat16,
        "IS_SPLIT": is_split,
        "HAS_TAIL": has_tail,
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": has_residual,
        "RAW": is_raw,
        "GATED": is_gated,
        "SILU": False,
        "HAS_NORM": is_raw,
        "ROWS": rows,
        "ROW_BLOCK": row_block,
        "INLINE_ASM": True,
        "PDL": pdl,
    }
    return compile_for(
        capability,
        ternary_linear_kernel,
        ARGUMENTS,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        unaligned=frozenset({"num_tokens", "num_splits"}),
    )


def instructions_per_weight(code: MachineCode, config: LinearConfig) -> float:
    weights_per_thread = config.block_out * config.block_bytes * 4 / (32 * config.num_warps)
    return len(code.main_loop("MMA")) / weights_per_thread


def name(config: LinearConfig) -> str:
    return f"tokens-{config.block_tokens}" + "-bfloat16" * config.bfloat16


def assert_sound(code: MachineCode, config: LinearConfig, capability: int) -> None:
    assert code.spills == 0
    assert code.shared_bytes <= SHARED_MEMORY_BYTES[capability]
    hopper = capability == 90 and config.block_tokens >= 16
    tensor_core = "UTCHMMA" if config.bfloat16 else "IGMMA" if hopper else "IMMA"
    assert code.count(rf"\b{tensor_core}\b")
    assert code.count(r"\bLDGSTS\.E.*\.128\b")


@pytest.mark.compiles(by=compile_linear)
@pytest.mark.parametrize(
    ("capability", "config"),
    [(capability, config) for capability, configs in CONFIGS_OF.items() for config in configs],
    ids=lambda value: name(value) if isinstance(value, LinearConfig) else f"sm_{value}",
)
def test_main_loop_uses_tensor_cores_wide_loads_and_no_local_memory(
    config: LinearConfig, capability: int
) -> None:
    code = compile_linear(config, capability)
    per_weight = instructions_per_weight(code, config)
    print(f"sm_{capability}, {name(config)}: {per_weight:.2f} instructions a weight")
    assert_sound(code, config, capability)
    if capability == 90:
        assert per_weight <= MOST_INSTRUCTIONS_PER_WEIGHT[config.block_tokens]


def compile_with_tail(config: LinearConfig) -> MachineCode:
    return compile_linear(config, 90, has_tail=True)


@pytest.mark.compiles(by=compile_with_tail)
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_a_tail_of_the_row_costs_no_spills_and_no_narrow_loads(config: LinearConfig) -> None:
    code = compile_with_tail(config)
    per_weight = instructions_per_weight(code, config)
    print(f"sm_90, {name(config)}, tail: {per_weight:.2f} instructions a weight")
    assert_sound(code, config, 90)
    assert per_weight <= MOST_INSTRUCTIONS_PER_WEIGHT[config.block_tokens]


def test_every_epilogue_compiles() -> None:
    for is_split in (False, True):
        code = compile_linear(
            CONFIGS[0], 90, is_split=is_split, has_bias=True, has_residual=not is_split
        )
        assert code.spills == 0


def order_of(code: MachineCode, *patterns: str) -> list[int]:
    """Return where the first instruction that matches each pattern, after the one before, is."""
    places: list[int] = []
    for pattern in patterns:
        start = places[-1] + 1 if places else 0
        places.append(
            next(
                i
                for i, (_, text) in enumerate(code.instructions)
                if i >= start and re.search(pattern, text)
            )
        )
    return places


def test_partial_sums_are_released_before_a_split_is_counted_and_acquired_after() -> None:
    """One thread counts for all: a barrier, a fence, the count, a fence, a barrier, then reads."""
    code = compile_linear(CONFIGS[0], 90)
    order_of(
        code,
        r"\bREDG\.E\.ADD\b",
        r"\bBAR\.SYNC\b",
        r"\bMEMBAR\.\w+\.GPU\b",
        r"\bATOMG\.E\.ADD\.STRONG\.GPU\b",
        r"\bCCTL\.IVALL\b",
        r"\bBAR\.SYNC\b",
        r"\bLDG\.E\.128\.STRONG\.GPU\b",
        r"\bBAR\.SYNC\b",
        r"\bSTG\.E\.128\b.*\bRZ\b",
    )


MANY_ROWS = MAX_QUEUED_TOKENS + 1  # of which a program takes several at once
RAW_CASES = [
    (capability, config, num_rows)
    for capability in CONFIGS_OF
    for config in CONFIGS_OF[capability]
    for num_rows in (0, MANY_ROWS)
    if config.block_tokens > 8 and (num_rows == 0 or config.max_tokens is None)
]
RAW_SAMPLE = [(100, CONFIGS_OF[100][3], 0), (90, CONFIGS[-1], MANY_ROWS)]


def compile_queued(capability: int, config: LinearConfig, num_rows: int) -> MachineCode:
    """Return what reads a queue: down's rows, up to MAX_QUEUED_TOKENS gated on the way."""
    is_gated = num_rows == 0
    return compile_linear(config, capability, is_raw=True, is_gated=is_gated, num_rows=num_rows)


@pytest.mark.compiles(by=compile_queued)
@pytest.mark.parametrize(
    ("capability", "config", "num_rows"),
    RAW_CASES if TEST_ALL else RAW_SAMPLE,
    ids=lambda value: name(value) if isinstance(value, LinearConfig) else str(value),
)
def test_rows_of_a_queue_cost_the_loop_over_weights_nothing(
    capability: int, config: LinearConfig, num_rows: int
) -> None:
    """Codes are released turn by turn, waited for, and then read; weights travel from the start."""
    code = compile_queued(capability, config, num_rows)
    assert_sound(code, config, capability)
    # Waits for sm_100's tensor cores lie behind the epilogue and jump back: no loop is to be told.
    if not config.bfloat16:
        loop = code.main_loop("MMA")
        assert not any(re.search(r"\b(MUFU|DFMA|ATOMG|REDG)\b", text) for text in loop)
    if capability == 90:
        bound = MOST_INSTRUCTIONS_PER_WEIGHT[config.block_tokens]
        assert instructions_per_weight(code, config) <= bound
    order_of(
        code,
        r"\bCCTL\.E\.PF2\b",
        r"\bATOMG\.E\.ADD\.STRONG\.GPU\b",
        r"\bSTG\.E\b",
        r"\bBAR\.SYNC\b",
        r"\bMEMBAR\.\w+\.GPU\b",
        r"\bREDG?\.E\.ADD\.STRONG\.GPU\b",
        r"\bATOMG\.E\.ADD\.STRONG\.GPU\b",
        r"\bLDG\.E\.STRONG\.GPU\b",
        r"\bCCTL\.IVALL\b",
        r"\bBAR\.SYNC\b",
        r"\bLDGSTS\b",
    )
    queued = next(i for i, (_, text) in enumerate(code.instructions) if "CCTL.IVALL" in text)
    assert not any("LDGSTS" in text for _, text in code.instructions[:queued])


def test_programmatic_dependent_launch_prefetches_weights_before_it_waits() -> None:
    code = compile_linear(CONFIGS[0], 90, pdl=True, is_raw=True)
    order_of(
        code, r"\bCCTL", r"\bACQBULK\b", r"\bATOMG\b", r"\bLDGSTS\b", r"\bIMMA\b", r"\bPREEXIT\b"
    )
    waits = next(i for i, (_, text) in enumerate(code.instructions) if "ACQBULK" in text)
    before = [text for _, text in code.instructions[:waits]]
    assert not any(re.search(r"\b(LDG|LDGSTS|ATOMG)\b", text) for text in before)
