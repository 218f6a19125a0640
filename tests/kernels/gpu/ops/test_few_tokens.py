"""A layer in five kernels gives the bits of its operations one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.random_weights import random_model
from bitwatt_kernels.backend import StepLayout
from bitwatt_kernels.errors import DtypeError, ShapeError
from bitwatt_kernels.gpu import few_tokens, row_queue, triton_backend
from bitwatt_kernels.gpu.attention import rotated_attention
from bitwatt_kernels.gpu.linear import ternary_linear
from bitwatt_kernels.gpu.normed_linear import MAX_TOKENS, normed_linear
from bitwatt_kernels.gpu.row_queue import MAX_QUEUED_TOKENS, RawRows
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from bitwatt_kernels.packing import TernaryWeight

from tests.factories import make_model_config, make_step_layout, moved
from tests.kernels.gpu.ops.test_attention import SMALL, make_step, run
from tests.kernels.gpu.ops.test_linear import make_weight


@pytest.fixture(scope="module")
def backend(device: torch.device) -> TritonBackend:
    return TritonBackend(device)


@pytest.mark.parametrize("has_norm", [True, False], ids=["normed", "as-it-is"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 19])
def test_norm_quantization_and_linear_in_one_are_those_one_by_one(
    num_tokens: int, dtype: torch.dtype, has_norm: bool, backend: TritonBackend
) -> None:
    """640 features are a tail of the packed row; 70 outputs, of the tiles."""
    device = backend.device
    torch.manual_seed(num_tokens)
    x = (torch.randn(num_tokens, 640, device=device) * 3).to(dtype)
    x[0, :5] = torch.tensor([0, -0.0, 1e4, -1e-6, 77], device=device)
    norm = torch.rand(640, device=device) + 0.5 if has_norm else None
    weight = make_weight(70, 640, device)
    weight = TernaryWeight(weight.codes, weight.scales, torch.randn(70, device=device))
    residual = torch.randn(num_tokens, 70, device=device).to(torch.bfloat16)
    if num_tokens <= MAX_TOKENS:
        y = normed_linear(x, norm, 1e-5, weight, residual, torch.bfloat16, backend.gpu)
    else:
        rows = RawRows(x, norm, 1e-5)
        y = ternary_linear(rows, weight, residual, torch.bfloat16, backend.gpu)
    assert not backend.gpu.queue.any()
    codes = backend.quantize(x) if norm is None else backend.rms_norm_quantize(x, norm, 1e-5)
    assert torch.equal(y, backend.ternary_linear(codes, weight, residual, torch.bfloat16))


def test_a_row_of_zeros_gives_the_bias(backend: TritonBackend) -> None:
    weight = make_weight(20, 128, backend.device)
    bias = torch.randn(20, device=backend.device)
    weight = TernaryWeight(weight.codes, weight.scales, bias)
    x, norm = torch.zeros(1, 128, device=backend.device), torch.ones(128, device=backend.device)
    y = normed_linear(x, norm, 1e-5, weight, None, torch.float32, backend.gpu)
    assert torch.equal(y[0], bias)


@pytest.mark.parametrize("head_dim", [32, 12], ids="head_dim-{}".format)
@pytest.mark.parametrize("sequences", [[(0, 1)], [(40, 1), (0, 0), (31, 1), (96, 1)]], ids=str)
def test_attention_rotates_and_caches_as_the_kernel_before_it_would(
    sequences: list[tuple[int, int]], head_dim: int, backend: TritonBackend
) -> None:
    step = make_step(sequences, head_dim=head_dim, dtype=torch.bfloat16)
    apart = step.to(backend.device)
    expected = run(apart, backend.gpu)
    together = step.to(backend.device)
    y = rotated_attention(
        together.qkv,
        together.rope,
        together.kv_cache,
        together.layout,
        step.num_heads,
        head_dim**-0.5,
        backend.gpu,
        SMALL,
    )
    assert torch.equal(y.cpu(), expected)
    cached = step.to(backend.device)
    backend.rope_and_cache(cached.qkv, cached.rope, cached.kv_cache, cached.layout, step.num_heads)
    written = together.kv_cache.view(torch.int16)
    assert torch.equal(written, cached.kv_cache.view(torch.int16))
    assert not backend.gpu.counters.any()


@contextmanager
def operations_one_by_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(triton_backend, "are_fusable", lambda layers: False)
        yield


def forward(
    backend: TritonBackend, config: dict[str, Any], layout: StepLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    model = random_model(
        make_model_config(vocab_size=64, **config),
        weights="ternary",
        backend=backend,
        dtype=torch.bfloat16,
        seed=0,
    )
    kv_cache = KVCache(model.config, 16, torch.bfloat16, backend.device)
    kv_cache.layers.copy_(
        torch.randn(kv_cache.layers.shape, generator=torch.Generator().manual_seed(1))
    )
    tokens = torch.arange(len(layout.positions), device=backend.device)
    return model.forward(tokens, layout, kv_cache, None), kv_cache.layers


CONFIGS: dict[str, dict[str, Any]] = {
    "bitnet": {"activation": "relu2", "has_sub_norms": True},
    "llama": {"activation": "silu", "has_sub_norms": False},
    "qwen3": {"activation": "silu", "has_sub_norms": False, "has_head_norms": True},
    "biases": {"has_qkv_bias": True, "has_o_bias": True, "has_mlp_bias": True},
}
DECODE = ([20, 1, 33], [1, 1, 1])
CHUNKS = ([20, 7], [3, 5])
MORE_THAN_EIGHT = ([20, 1, 33, *range(7, 13)], [1] * 9)
CASES = [(name, step) for name in CONFIGS for step in (DECODE, CHUNKS)]
CASES += [(name, MORE_THAN_EIGHT) for name in ("bitnet", "llama")]


@pytest.mark.parametrize(
    ("name", "step", "most_queued"),
    [(name, step, MAX_QUEUED_TOKENS) for name, step in CASES]
    + [("bitnet", MORE_THAN_EIGHT, 8)],  # as if more were decoded: four rows a turn
    ids=str,
)
def test_layers_in_few_kernels_are_the_operations_one_by_one(
    name: str,
    step: tuple[list[int], list[int]],
    most_queued: int,
    backend: TritonBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (few_tokens, row_queue):
        monkeypatch.setattr(module, "MAX_QUEUED_TOKENS", most_queued)
    context_lens, counts = step
    tables = torch.tensor([[3, 1, 2], [0, 6, 5], [4, 7, 2]], dtype=torch.int32)
    tables = torch.cat([tables, torch.arange(8, 14, dtype=torch.int32)[:, None].expand(6, 3)])
    layout = make_step_layout(tables[: len(counts)], context_lens, counts)
    layout = moved(layout, backend.device)
    logits, cache = forward(backend, CONFIGS[name], layout)
    with operations_one_by_one(monkeypatch):
        expected, expected_cache = forward(backend, CONFIGS[name], layout)
    assert torch.equal(logits, expected)
    assert torch.equal(cache, expected_cache)


def test_what_does_not_fit_is_refused(backend: TritonBackend) -> None:
    device, gpu = backend.device, backend.gpu
    weight = make_weight(8, 128, device)
    x = torch.zeros(2, 128, device=device)
    with pytest.raises(ShapeError, match="expected contiguous"):
        normed_linear(torch.zeros(9, 128, device=device), None, 0, weight, None, x.dtype, gpu)
    with pytest.raises(ShapeError, match="activations have 64 features"):
        normed_linear(x[:, :64].contiguous(), None, 0, weight, None, x.dtype, gpu)
    with pytest.raises(ShapeError, match="norm weight has shape"):
        normed_linear(x, x[0, :64], 0, weight, None, x.dtype, gpu)
    with pytest.raises(DtypeError, match="residual is"):
        normed_linear(x, None, 0, weight, x[:, :8].bfloat16(), x.dtype, gpu)
    with pytest.raises(ShapeError, match="residual has shape"):
        normed_linear(x, None, 0, weight, x, x.dtype, gpu)
    with pytest.raises(ShapeError, match="a residual can't be added"):
        normed_linear(x, None, 0, weight, x[:, :4], x.dtype, gpu, activation="silu")
    with pytest.raises(ShapeError, match="activations have 64 features"):
        ternary_linear(RawRows(x, None, 0, "silu"), weight, None, x.dtype, gpu)
    with pytest.raises(ShapeError, match="norm weight has shape"):
        ternary_linear(RawRows(x, x[0, :64], 0), weight, None, x.dtype, gpu)
    step = make_step([(3, 2)]).to(device)
    with pytest.raises(ShapeError, match="brings 2 tokens"):
        rotated_attention(step.qkv, step.rope, step.kv_cache, step.layout, 4, 1.0, gpu)
    one = replace(step.layout, max_query_len=1)
    with pytest.raises(ShapeError, match="qkv has shape"):
        rotated_attention(step.qkv, step.rope, step.kv_cache, one, 5, 1.0, gpu)
