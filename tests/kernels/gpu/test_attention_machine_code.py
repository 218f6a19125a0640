"""What the compiler makes of attention and rope_and_cache, read from the machine code."""

import re
from itertools import product
from typing import Any

import pytest
from bitwatt_kernels.gpu.attention import decode_attention_kernel, prefill_attention_kernel
from bitwatt_kernels.gpu.configs import AttentionConfig, load
from bitwatt_kernels.gpu.rope import rope_and_cache_kernel

from tests.extent import TEST_ALL
from tests.kernels.gpu.machine_code import SHARED_MEMORY_BYTES, MachineCode, compile_for

CONFIGS = {
    capability: load("", divmod(capability, 10)).attention for capability in SHARED_MEMORY_BYTES
}
CASES = [(128, 80), (128, 90), (128, 100), (100, 90)]
if TEST_ALL:  # cards of 99 KiB, and B300
    CASES += [(128, 86), (128, 89), (128, 120), (128, 103)]
# gpu.few_tokens rotates apart where head_dim is padded.
ROTATED = [case for case in CASES if case[0] == 128] if TEST_ALL else [(128, 90)]
KINDS = {"decode": CASES, "prefill": CASES, "rotated decode": ROTATED}
ARGUMENTS = {
    "qkv_ptr": "bfloat16",
    "rope_ptr": "float32",
    "positions_ptr": "int64",
    "slots_ptr": "int64",
    "queries_ptr": "bfloat16",
    "keys_ptr": "bfloat16",
    "values_ptr": "bfloat16",
    "key_scales_ptr": "float32",
    "value_scales_ptr": "float32",
    "query_norm_ptr": "float32",
    "key_norm_ptr": "float32",
    "query_starts_ptr": "int32",
    "context_lens_ptr": "int32",
    "tables_ptr": "int32",
    "out_ptr": "bfloat16",
    "partial_ptr": "float32",
    "partial_max_ptr": "float32",
    "partial_sum_ptr": "float32",
    "counters_ptr": "int32",
    "block_stride": "i32",
    "table_stride": "i32",
    "scale": "fp32",
    "eps": "fp32",
    "num_sequences": "i32",
    "max_splits": "i32",
}
ROPE = {
    "NUM_HEADS": 20,
    "NUM_KV_HEADS": 5,
    "HEAD_DIM": 128,
    "BLOCK_SIZE": 16,
    "HEADS_BLOCK": 32,
    "KV_HEADS_BLOCK": 8,
    "HALF_BLOCK": 64,
    "NORM": False,
    "INT8": False,
}


def constants_of(config: AttentionConfig, **changes: Any) -> dict[str, Any]:
    """Return the constants that decode and prefill share, of four queries a head of 128."""
    return {
        "BLOCK_SIZE": 16,
        "BLOCK_CONTEXT": config.block_context,
        "SPLIT_TOKENS": config.split_tokens,
        "GROUP": 4,
        "HEAD_DIM": 128,
        "DIM_BLOCK": 128,
        "PRECISION": "tf32",
        "INT8": False,
    } | changes


def compile_attention(kind: str, head_dim: int, capability: int) -> MachineCode:
    is_decode = kind != "prefill"
    config = CONFIGS[capability]
    tile = config.decode if is_decode else config.prefill
    constants = constants_of(config, HEAD_DIM=head_dim, BLOCK_ROWS=tile.block_rows, PDL=False)
    return compile_for(
        capability,
        decode_attention_kernel if is_decode else prefill_attention_kernel,
        ARGUMENTS,
        constants | {"IS_SPLIT": True, "ROPE": kind == "rotated decode"}
        if is_decode
        else constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        unaligned=frozenset({"table_stride", "num_sequences", "max_splits"}),
    )


@pytest.mark.slow(90)
@pytest.mark.compiles(by=compile_attention)
@pytest.mark.parametrize(
    ("kind", "head_dim", "capability"),
    [(kind, *case) for kind, cases in KINDS.items() for case in cases],
    ids=str,
)
def test_attention_uses_tensor_cores_and_no_local_memory(
    kind: str, head_dim: int, capability: int
) -> None:
    code = compile_attention(kind, head_dim, capability)
    # Masks of a padded head_dim cost prefill a few registers, spilled once a split of the context.
    if head_dim == 128 or kind != "prefill":
        assert code.spills == 0
    assert not any(re.search(r"\b(STL|LDL)\b", text) for text in code.main_loop("MMA"))
    assert code.shared_bytes <= SHARED_MEMORY_BYTES[capability]
    assert code.count(
        {90: r"\bHGMMA\b", 100: r"\bUTCHMMA\b", 103: r"\bUTCHMMA\b"}.get(capability, r"\bHMMA\b")
    )
    if kind == "rotated decode":  # its own key is written, waited for, and then read
        texts = [text for _, text in code.instructions]
        read = next(i for i, text in enumerate(texts) if "LDGSTS" in text)
        written = [i for i, text in enumerate(texts[:read]) if re.search(r"\bSTG\b", text)]
        assert written
        assert any("BAR.SYNC" in text for text in texts[written[-1] : read])
    if head_dim == 128:  # rows of 100 values are aligned to 8 bytes
        assert code.count(r"\b(LDGSTS|LDG)\.E.*\.128\b")


INT8_CASES = [(90, True)]
if TEST_ALL:
    INT8_CASES = list(product(SHARED_MEMORY_BYTES, (True, False)))


def compile_over_codes(capability: int, is_decode: bool) -> MachineCode:
    config = CONFIGS[capability]
    tile = config.decode if is_decode else config.prefill_of_codes
    constants = constants_of(config, BLOCK_ROWS=tile.block_rows, INT8=True, PDL=False)
    return compile_for(
        capability,
        decode_attention_kernel if is_decode else prefill_attention_kernel,
        ARGUMENTS | {"keys_ptr": "int8", "values_ptr": "int8"},
        constants | ({"IS_SPLIT": True, "ROPE": True} if is_decode else {}),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        unaligned=frozenset({"table_stride", "num_sequences", "max_splits"}),
    )


@pytest.mark.slow(90)
@pytest.mark.compiles(by=compile_over_codes)
@pytest.mark.parametrize(("capability", "is_decode"), INT8_CASES, ids=str)
def test_attention_over_codes_multiplies_them_on_tensor_cores(
    capability: int, is_decode: bool
) -> None:
    code = compile_over_codes(capability, is_decode)
    assert code.spills == 0
    assert code.shared_bytes <= SHARED_MEMORY_BYTES[capability]
    assert code.count(r"\bIG?MMA\b"), "scores"
    assert code.count(r"\b(HMMA|HGMMA|UTCHMMA)\b"), "weighted values"
    assert code.count(r"\bLDG(STS)?\.E.*\.128\b")


def compile_rope(capability: int, changes: dict[str, bool]) -> MachineCode:
    cache = {"keys_ptr": "int8", "values_ptr": "int8"} if changes.get("INT8") else {}
    return compile_for(
        capability,
        rope_and_cache_kernel,
        ARGUMENTS | cache,
        ROPE | changes | {"PDL": False},
        num_warps=4,
    )


@pytest.mark.compiles(by=compile_rope)
@pytest.mark.parametrize(
    "changes",
    [{}, {"NORM": True}, {"INT8": True}] if TEST_ALL else [{}],
    ids=lambda changes: "".join(changes) or "plain",
)
@pytest.mark.parametrize(
    "capability", SHARED_MEMORY_BYTES if TEST_ALL else [80, 90], ids="sm_{}".format
)
def test_rope_and_cache_moves_sixteen_bytes_at_a_time(
    capability: int, changes: dict[str, bool]
) -> None:
    code = compile_rope(capability, changes)
    assert code.spills == 0
    assert code.count(r"\bLDG\.E\.128\b")
    assert code.count(r"\bSTG\.E\.128\b")
