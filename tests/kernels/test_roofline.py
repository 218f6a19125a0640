"""The roofline model agrees with arithmetic done by hand for published model sizes."""

import pytest
from bitwatt_kernels.roofline import Gpu, ModelSizes, linear, step

H200_COPY = Gpu(bandwidth_bytes_s=4.3e12, int8_ops_s=1.979e15, bf16_ops_s=0.989e15)
SIZES = {
    "2B4T": ModelSizes(2560, 6912, 30, 20, 5, 128, 128256),
    "3B": ModelSizes(3200, 8640, 26, 32, 32, 100, 32002),
    "7B": ModelSizes(4096, 11008, 32, 32, 32, 128, 32000),
    "13B": ModelSizes(5120, 13824, 40, 40, 40, 128, 32000),
    "70B": ModelSizes(8192, 28672, 80, 64, 8, 128, 32000),
}


@pytest.mark.parametrize(
    ("name", "bf16", "ternary", "ternary_int8_head"),
    [
        ("2B4T", (4825, 891), (1178, 3651), (849, 5063)),
        ("3B", (6648, 647), (1010, 4257), (908, 4737)),
        ("7B", (13214, 325), (1881, 2286), (1750, 2457)),
        ("13B", (25703, 167), (3500, 1229), (3336, 1289)),
        ("70B", (137426, 31), (17637, 244), (17375, 247)),
    ],
)
def test_weight_megabytes_and_tokens_a_second_at_batch_1(
    name: str,
    bf16: tuple[int, int],
    ternary: tuple[int, int],
    ternary_int8_head: tuple[int, int],
) -> None:
    steps = [
        (step(SIZES[name], "dense", num_sequences=1, context_tokens=0), bf16),
        (step(SIZES[name], "ternary", num_sequences=1, context_tokens=0), ternary),
        (
            step(SIZES[name], "ternary", num_sequences=1, context_tokens=0, head_bits=8),
            ternary_int8_head,
        ),
    ]
    for cost, (megabytes, tokens_per_s) in steps:
        assert cost.weight_bytes / 1e6 == pytest.approx(megabytes, abs=1)
        assert 4.3e12 / cost.weight_bytes == pytest.approx(tokens_per_s, abs=1)


def test_ternary_parameters_and_cache_bytes_of_2b4t() -> None:
    assert SIZES["2B4T"].linear_parameters == 2_084_044_800
    assert SIZES["2B4T"].kv_bytes_per_token == 75 * 1024


def test_long_contexts_cost_their_keys_and_values() -> None:
    short = step(SIZES["2B4T"], "ternary", num_sequences=8, context_tokens=1)
    long = step(SIZES["2B4T"], "ternary", num_sequences=8, context_tokens=4097)
    assert long.num_bytes - short.num_bytes == 8 * 4096 * 75 * 1024


def test_prefill_counts_the_causal_half_of_the_scores() -> None:
    sizes = ModelSizes(64, 128, 1, 1, 1, 64, 100)
    whole = step(sizes, "dense", num_sequences=1, context_tokens=4, new_tokens=4)
    attention = next(op for op in whole.ops if op.name == "attention")
    assert attention.bf16_ops == 4 * 64 * (1 + 2 + 3 + 4)
    tail = step(sizes, "dense", num_sequences=1, context_tokens=4, new_tokens=1)
    assert next(op for op in tail.ops if op.name == "attention").bf16_ops == 4 * 64 * 4


def test_a_matmul_turns_from_memory_bound_to_compute_bound() -> None:
    one = linear("down", 1, 8192, 8192, "ternary")
    many = linear("down", 4096, 8192, 8192, "ternary")
    assert one.floor_s(H200_COPY) == (one.weight_bytes + one.other_bytes) / 4.3e12
    assert many.floor_s(H200_COPY) == 2 * 4096 * 8192**2 / 1.979e15


def test_launches_are_what_bounds_a_small_model() -> None:
    """2B's layers are 121 µs of bytes; 150 kernels of 1.3 µs are 195, and there were 300."""
    launches = Gpu(4.3e12, 1.979e15, 0.989e15, kernel_s=1.3e-6)
    for num_sequences, num_kernels in (
        (1, 30 * 5 + 3),
        (8, 30 * 5 + 3),
        (256, 30 * 5 + 3),
        (257, 30 * 7 + 3),
    ):
        decode = step(SIZES["2B4T"], "ternary", num_sequences=num_sequences, context_tokens=0)
        assert decode.num_kernels == num_kernels
        launching_s = decode.floor_s(launches) - decode.floor_s(H200_COPY)
        assert launching_s == pytest.approx(num_kernels * 1.3e-6)
