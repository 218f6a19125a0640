"""A token's result doesn't depend on its neighbours, on the threads, or on the instruction set."""

from collections.abc import Callable

import pytest
import torch
from bitwatt_kernels.backend import QuantizedActivations, TernaryHead
from bitwatt_kernels.cpu.native_backend import NativeBackend
from torch import Tensor

from tests.kernels.cpu.conftest import available, make_native
from tests.kernels.cpu.factories import make_ternary

HIDDEN = 320
NUM_TOKENS = 45

Operation = Callable[[NativeBackend, Tensor], Tensor | QuantizedActivations]


def _ternary(backend: NativeBackend, x: Tensor) -> Tensor:
    weight = backend.prepare_ternary(make_ternary(300, HIDDEN))
    return backend.ternary_linear(backend.quantize(x), weight, None, x.dtype)


def _ternary_by_groups(backend: NativeBackend, x: Tensor) -> Tensor:
    weight = backend.prepare_ternary(make_ternary(300, HIDDEN, group=64))
    return backend.ternary_linear(backend.quantize(x, group=64), weight, None, x.dtype)


def _head(backend: NativeBackend, x: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(203, HIDDEN, generator=g).to(torch.bfloat16)
    return backend.head(x, backend.prepare_head(weight))


def _ternary_head(backend: NativeBackend, x: Tensor) -> Tensor:
    weight = backend.prepare_ternary(make_ternary(203, HIDDEN, group=64))
    return backend.head(x, TernaryHead(weight, x.dtype))


def _dense(backend: NativeBackend, x: Tensor) -> Tensor:
    weight = torch.randn(203, HIDDEN, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    return backend.dense_linear(x, backend.prepare_dense(weight), None, None)


NORM = torch.linspace(0.5, 2, HIDDEN)
OPERATIONS: dict[str, Operation] = {
    "quantize": lambda b, x: b.quantize(x),
    "rms_norm": lambda b, x: b.rms_norm(x, NORM, 1e-5),
    "rms_norm_quantize": lambda b, x: b.rms_norm_quantize(x, NORM, 1e-5),
    "gated_activation": lambda b, x: b.gated_activation(x, "silu"),
    "gated_activation_quantize": lambda b, x: b.gated_activation_quantize(
        x, "silu", NORM[: HIDDEN // 2].clone(), 1e-5
    ),
    "ternary_linear": _ternary,
    "quantize by groups": lambda b, x: b.quantize(x, group=64),
    "ternary_linear by groups": _ternary_by_groups,
    "head": _head,
    "ternary head": _ternary_head,
    "dense_linear": _dense,
}


def _rows(result: Tensor | QuantizedActivations) -> Tensor:
    if isinstance(result, Tensor):
        return result
    num_tokens = len(result.codes)
    parts = (result.codes, result.scales, result.sums)
    return torch.cat([part.view(num_tokens, -1) for part in parts], dim=1)


def _inputs(dtype: torch.dtype) -> Tensor:
    return torch.randn(NUM_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)


MULTIPLIES_BFLOAT16_PAIRS = {"avx512_bf16", "amx_int8"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_token_is_the_same_in_every_batch(native, operation, dtype):
    x = _inputs(dtype)
    together = _rows(OPERATIONS[operation](native, x))
    for first, last in [(0, 1), (7, 8), (44, 45), (3, 5), (10, 13), (20, 28), (1, 34)]:
        alone = _rows(OPERATIONS[operation](native, x[first:last]))
        assert torch.equal(alone, together[first:last]), (first, last)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_token_is_the_same_on_every_number_of_threads(native, operation):
    x = _inputs(torch.bfloat16)
    two = _rows(OPERATIONS[operation](native, x))
    for num_threads in (1, 3, 7):
        other = make_native(instruction_set=native.instruction_set, num_threads=num_threads)
        assert torch.equal(_rows(OPERATIONS[operation](other, x)), two)


def _with_each_fused_set(operation: str, x: Tensor) -> dict[str, Tensor]:
    """Return its result on each instruction set that fuses multiply and add: all but portable."""
    return {
        name: _rows(OPERATIONS[operation](make_native(instruction_set=name), x))
        for name in available()
        if name != "portable"
    }


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "head"])
def test_a_token_is_the_same_on_every_instruction_set_with_fused_multiply_add(operation):
    results = [*_with_each_fused_set(operation, _inputs(torch.bfloat16)).values()]
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_a_head_sums_in_one_order_or_by_pairs_of_bfloat16():
    """Where the processor multiplies those pairs, in an order of its own, all such sets agree."""
    x = _inputs(torch.bfloat16)
    widened = [*_with_each_fused_set("head", x.float()).values()]
    assert all(torch.equal(logits, widened[0]) for logits in widened[1:])
    results = _with_each_fused_set("head", x)
    by_pairs = {name for name, logits in results.items() if not torch.equal(logits, widened[0])}
    assert by_pairs <= MULTIPLIES_BFLOAT16_PAIRS
    first, *rest = [results[name] for name in sorted(by_pairs)] or [widened[0]]
    assert all(torch.equal(logits, first) for logits in rest)
