"""What only a GPU can show: capture, launch order, and the same bits from every kernel."""

from dataclasses import replace

import pytest
import torch
from bitwatt_kernels.backend import StepLayout
from bitwatt_kernels.gpu.attention import attention
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.interpreter import INTERPRETED
from bitwatt_kernels.gpu.linear import ternary_linear
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from bitwatt_kernels.reference import linear as reference

from tests.kernels.gpu.ops.test_attention import make_step
from tests.kernels.gpu.ops.test_linear import make_activations, make_weight

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("num_tokens", [1, 8, 32, 128, 1024])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(3840, 2560), (2560, 6912), (3200, 8640)], ids=str
)
def test_published_shapes_are_exact_in_every_regime(
    out_features: int, in_features: int, num_tokens: int, device: torch.device
) -> None:
    x = make_activations(num_tokens, in_features, device)
    weight = make_weight(out_features, in_features, device)
    y = ternary_linear(x, weight, None, torch.float32, Gpu(device))
    codes = x.codes.double() @ reference.unpack(weight.codes).double().T  # exact: below 2⁵³
    expected = codes.float() / x.scales[:, None] * weight.scales
    assert torch.equal(y, expected)


def test_a_captured_step_replays_to_the_same_bits(device: torch.device) -> None:
    backend = TritonBackend(device)
    step = make_step([(70, 1), (0, 0), (300, 1)], head_dim=64, dtype=torch.bfloat16).to(device)
    packed = backend.prepare_ternary(make_weight(256, 64 * 4, device))

    def run() -> torch.Tensor:
        q = backend.rope_and_cache(step.qkv, step.rope, step.kv_cache, step.layout, step.num_heads)
        attended = backend.attention(q, step.kv_cache, step.layout, 0.125)
        return backend.ternary_linear(backend.quantize(attended), packed, None, torch.bfloat16)

    eager = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, eager)


def test_programmatic_dependent_launch_changes_no_bits(device: torch.device) -> None:
    backend = TritonBackend(device)
    if backend.gpu.capability < (9, 0):
        pytest.skip("needs compute capability 9.0")
    x = torch.randn(4, 2560, device=device).to(torch.bfloat16)
    weights = [backend.prepare_ternary(make_weight(2560, 2560, device)) for _ in range(8)]
    norm = torch.ones(2560, device=device)

    def run() -> torch.Tensor:
        h = x
        for weight in weights:
            q = backend.rms_norm_quantize(h, norm, 1e-5)
            h = backend.ternary_linear(q, weight, h, torch.bfloat16)
        return h

    plain = run()
    backend.gpu.configs = replace(backend.gpu.configs, pdl=True)
    for _ in range(20):
        assert torch.equal(run(), plain)


@pytest.mark.parametrize("group", [1, 4], ids="group-{}".format)
def test_decode_and_prefill_give_a_token_the_same_bits(group: int, device: torch.device) -> None:
    gpu = Gpu(device)
    step = make_step(
        [(0, 700)],
        num_heads=2 * group,
        num_kv_heads=2,
        head_dim=128,
        dtype=torch.bfloat16,
    ).to(device)
    backend = TritonBackend(device)
    q = backend.rope_and_cache(step.qkv, step.rope, step.kv_cache, step.layout, 2 * group)
    whole = attention(q, step.kv_cache, step.layout, 0.088, gpu)
    positions = torch.tensor([0, 63, 64, 255, 256, 511, 699], device=device)
    alone = StepLayout(
        positions=positions,
        slots=step.layout.slots[positions],
        query_starts=torch.arange(8, dtype=torch.int32, device=device),
        context_lens=(positions + 1).to(torch.int32),
        block_tables=step.layout.block_tables.repeat(7, 1),
        max_query_len=1,
        max_context_len=700,
    )
    decoded = attention(q[positions].contiguous(), step.kv_cache, alone, 0.088, gpu)
    assert torch.equal(decoded, whole[positions])


def test_dense_matmuls_give_a_token_the_same_bits_at_every_batch(device: torch.device) -> None:
    backend = TritonBackend(device)
    x = torch.randn(512, 2560, device=device).to(torch.bfloat16)
    weight = torch.randn(3840, 2560, device=device).to(torch.bfloat16)
    whole = backend.dense_linear(x, weight, None, None)
    for num_tokens in (1, 7, 16, 33, 64, 65):
        assert torch.equal(
            backend.dense_linear(x[:num_tokens], weight, None, None), whole[:num_tokens]
        )
