"""TritonBackend equals ReferenceBackend, operation by operation."""

import pytest
import torch
from bitwatt_kernels.backend import Backend, TernaryHead
from bitwatt_kernels.errors import BackendError, DtypeError, ShapeError
from bitwatt_kernels.gpu.dense import dense_linear
from bitwatt_kernels.gpu.head import Int8Head
from bitwatt_kernels.gpu.interpreter import INTERPRETED
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from bitwatt_kernels.packing import TernaryWeight, pack
from bitwatt_kernels.reference.reference_backend import ReferenceBackend
from bitwatt_kernels.registry import choose_backend

from tests.kernels.gpu.ops.test_attention import make_step

EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="module")
def backend(device: torch.device) -> TritonBackend:
    return TritonBackend(device)


@pytest.fixture(scope="module")
def reference() -> ReferenceBackend:
    return ReferenceBackend(torch.device("cpu"))


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of float32 sums and one rounding to the output's dtype."""
    assert actual.dtype == expected.dtype
    tolerance = max(2 * torch.finfo(actual.dtype).eps, 2e-5)
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance)


def test_it_meets_the_protocol_and_is_chosen_by_name(device: torch.device) -> None:
    chosen: Backend = choose_backend(device, "triton").backend
    assert chosen.name == "triton"
    assert chosen.batch_invariant


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU machine the device is there")
def test_a_device_that_cannot_run_it_is_refused_with_the_reason() -> None:
    with pytest.raises(BackendError, match="runs on cpu, not on cuda"):
        TritonBackend(torch.device("cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_ternary_layer_equals_the_reference(
    dtype: torch.dtype, backend: TritonBackend, reference: ReferenceBackend, device: torch.device
) -> None:
    def layer(backend: Backend) -> list[torch.Tensor]:
        here = backend.device
        codes = torch.randint(-1, 2, (512, 192), generator=torch.Generator().manual_seed(1))
        packed = TernaryWeight(pack(codes.to(torch.int8)), randn(512, seed=2).abs(), randn(512))
        down = TernaryWeight(
            pack(codes[:192].T.repeat(1, 2)[:, :256].contiguous().to(torch.int8)), randn(192).abs()
        )
        x = randn(5, 192, dtype=dtype).to(here)
        weight = randn(192, dtype=dtype, seed=3).to(here)
        sub_norm = randn(256, dtype=dtype, seed=4).to(here)
        normed = backend.rms_norm_quantize(x, weight, EPS)
        gate_up = backend.ternary_linear(normed, backend.prepare_ternary(packed), None, dtype)
        q = backend.gated_activation_quantize(gate_up, "relu2", sub_norm, EPS)
        y = backend.ternary_linear(q, backend.prepare_ternary(down), x, dtype)
        again = backend.quantize(y)
        return [normed.codes, normed.scales, gate_up, q.codes, q.sums, y, again.codes]

    for actual, expected in zip(layer(backend), layer(reference), strict=True):
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 17, 100])
def test_dense_linear_and_head_equal_the_reference(
    num_tokens: int,
    dtype: torch.dtype,
    backend: TritonBackend,
    reference: ReferenceBackend,
    device: torch.device,
) -> None:
    x, weight = randn(num_tokens, 96, dtype=dtype), randn(130, 96, dtype=dtype, seed=1)
    bias, residual = randn(130, dtype=dtype, seed=2), randn(num_tokens, 130, dtype=dtype, seed=3)
    there = [tensor.to(device) for tensor in (x, weight, bias, residual)]
    assert_near(backend.dense_linear(*there), reference.dense_linear(x, weight, bias, residual))
    assert_near(
        backend.dense_linear(there[0], there[1], None, None),
        reference.dense_linear(x, weight, None, None),
    )
    logits = backend.head(there[0], backend.prepare_head(weight))
    assert_near(logits, reference.head(x, weight))


def test_a_token_gets_the_same_dense_bits_in_every_batch(
    backend: TritonBackend, device: torch.device
) -> None:
    x = randn(100, 256, dtype=torch.bfloat16).to(device)
    weight = randn(96, 256, dtype=torch.bfloat16, seed=1).to(device)
    together = backend.dense_linear(x, weight, None, None)
    for num_tokens in (1, 20):
        assert torch.equal(
            backend.dense_linear(x[:num_tokens], weight, None, None), together[:num_tokens]
        )


def test_the_int8_head_stays_near_and_takes_half_the_bytes(
    backend: TritonBackend, device: torch.device
) -> None:
    x = randn(5, 128, dtype=torch.bfloat16).to(device)
    weight = randn(200, 128, dtype=torch.bfloat16, seed=1)
    prepared = backend.prepare_head(weight, bits=8)
    assert isinstance(prepared, Int8Head)
    exact, rounded = backend.head(x, weight.to(device)), backend.head(x, prepared)
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.02
    assert backend.nbytes(prepared) == 200 * 128 + 200 * 4
    assert backend.nbytes(backend.prepare_head(weight)) == 200 * 128 * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden_size", "group"), [(192, None), (192, 64), (1280, 128)])
def test_a_ternary_head_and_its_embedding_equal_the_reference(
    hidden_size: int,
    group: int | None,
    dtype: torch.dtype,
    backend: TritonBackend,
    reference: ReferenceBackend,
    device: torch.device,
) -> None:
    """Five groups or three fill no chunk of four; 130 rows fill no tile."""
    values = torch.randint(-1, 2, (130, hidden_size), generator=torch.Generator().manual_seed(1))
    by_group = () if group is None else (hidden_size // group,)
    scales_dtype = torch.float16 if group == 128 else torch.float32  # files have either
    scales = randn(130, *by_group, dtype=scales_dtype, seed=2)
    weight = TernaryWeight(pack(values.to(torch.int8)), scales)
    ours = TernaryHead(backend.prepare_ternary(weight), dtype)
    theirs = TernaryHead(reference.prepare_ternary(weight), dtype)
    token_ids = torch.tensor([129, 0, 7, 7, 64])
    rows = backend.embed(token_ids.to(device), ours)
    assert torch.equal(rows.cpu(), reference.embed(token_ids, theirs))
    x = randn(5, hidden_size, dtype=dtype, seed=3)
    assert torch.equal(backend.head(x.to(device), ours).cpu(), reference.head(x, theirs))
    assert backend.nbytes(ours) == backend.nbytes(ours.weight)


@pytest.mark.parametrize("sequences", [[(20, 1), (3, 1)], [(9, 30), (0, 1)]], ids=str)
def test_attention_equals_the_reference(
    sequences: list[tuple[int, int]],
    backend: TritonBackend,
    reference: ReferenceBackend,
    device: torch.device,
) -> None:
    outputs = []
    for current in (backend, reference):
        step = make_step(sequences).to(current.device)
        q = current.rope_and_cache(step.qkv, step.rope, step.kv_cache, step.layout, step.num_heads)
        outputs.append(current.attention(q, step.kv_cache, step.layout, step.head_dim**-0.5))
    torch.testing.assert_close(outputs[0].cpu(), outputs[1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("activation", ["relu2", "silu"])
def test_norm_and_activation_equal_the_reference(
    activation: str, backend: TritonBackend, reference: ReferenceBackend, device: torch.device
) -> None:
    x, weight = randn(3, 192), randn(192, seed=1)
    assert_near(
        backend.rms_norm(x.to(device), weight.to(device), EPS), reference.rms_norm(x, weight, EPS)
    )
    gated = backend.gated_activation(x.to(device), activation)  # type: ignore[arg-type]
    assert_near(gated, reference.gated_activation(x, activation))  # type: ignore[arg-type]


def test_what_another_backend_prepared_is_refused(
    backend: TritonBackend, device: torch.device
) -> None:
    with pytest.raises(TypeError, match="str was not prepared by this backend"):
        backend.nbytes("weight")
    x = randn(2, 96).to(device)
    with pytest.raises(ShapeError, match=r"the weight is torch\.float32 \[8, 64\]"):
        backend.dense_linear(x, randn(8, 64).to(device), None, None)
    with pytest.raises(DtypeError, match=r"activations are torch\.int32"):
        dense_linear(x.int(), x.int(), None, None, backend.gpu)
