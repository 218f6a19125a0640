"""What a step launches, by a driver that does nothing: the budget, and the roofline's count."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitwatt.model import graphs
from bitwatt.model.config import Weights
from bitwatt.model.graphs import DecodeGraphs
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.presets import PRESETS
from bitwatt.model.random_weights import random_model
from bitwatt.model.step_buffers import DeviceStep
from bitwatt_kernels.gpu.configs import load
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.normed_linear import MAX_TOKENS
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from bitwatt_kernels.roofline import Gpu as Rates
from bitwatt_kernels.roofline import ModelSizes, StepCost, step
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from tests.factories import make_step_layout

CPU = torch.device("cpu")
H200 = Rates(bandwidth_bytes_s=4.3e12, int8_ops_s=1.4e15, bf16_ops_s=7e14, kernel_s=2.2e-6)
"""kernel_s: at least what a kernel of a graph takes beyond its bytes, begun after another's end."""

# Its layers, and sizes small: launches depend on none of them.
SHAPE_2B4T = replace(
    PRESETS["2B4T"],
    hidden_size=128,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=1,
    head_dim=32,
    max_model_len=512,
    vocab_size=1024,
    bos_token_id=0,
    eos_token_ids=(1,),
)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counted: Counter[str] = Counter()

    def run(kernel: Any, *_: Any, grid: Any, warmup: bool, **__: Any) -> None:
        counted[kernel.fn.__name__] += 1

    monkeypatch.setattr(JITFunction, "run", run)
    return counted


def make_backend(*, persistent_step: bool = False) -> TritonBackend:
    """Return the backend of a card that isn't here."""
    gpu = Gpu.__new__(Gpu)
    gpu.device, gpu.name, gpu.num_multiprocessors, gpu.capability = CPU, "fake", 132, (9, 0)
    gpu.configs = load("", (9, 0))
    gpu.add_scratch()
    backend = TritonBackend.__new__(TritonBackend)
    backend.gpu, backend.device, backend.batch_invariant = gpu, CPU, True
    backend.persistent_step = persistent_step
    return backend


@pytest.fixture(scope="module")
def run_step() -> Callable[..., None]:
    def run(
        weights: Weights, num_sequences: int, new_tokens: int, *, persistent_step: bool = False
    ) -> None:
        # The dense roofline is of a layer without sub-norms, which its kernels would not take in.
        config = replace(SHAPE_2B4T, has_sub_norms=weights == "ternary")
        backend = make_backend(persistent_step=persistent_step)
        model = random_model(config, weights=weights, backend=backend, dtype=torch.bfloat16, seed=0)
        kv_cache = KVCache(SHAPE_2B4T, num_sequences, torch.bfloat16, CPU)
        tables = torch.arange(num_sequences, dtype=torch.int32)[:, None]
        counts = [new_tokens] * num_sequences
        layout = make_step_layout(tables, counts, counts)
        tokens = torch.zeros(num_sequences * new_tokens, dtype=torch.int64)
        model.forward(tokens, layout, kv_cache, None)

    return run


def sizes_of_2b4t() -> ModelSizes:
    config = PRESETS["2B4T"]
    names = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    figures = {name: getattr(config, name) for name in (*names, "head_dim", "vocab_size")}
    return ModelSizes(**figures)


def cost(weights: Weights, num_sequences: int, new_tokens: int = 1) -> StepCost:
    return step(
        sizes_of_2b4t(),
        weights,
        num_sequences=num_sequences,
        context_tokens=512,
        new_tokens=new_tokens,
    )


@pytest.mark.parametrize("num_sequences", [1, 2, 8, 9, 64, 256])
def test_a_step_that_decodes_takes_five_kernels_a_layer(
    num_sequences: int, launches: Counter[str], run_step: Callable[[Weights, int, int], None]
) -> None:
    run_step("ternary", num_sequences, 1)
    num_layers = SHAPE_2B4T.num_layers
    linear = "normed_linear_kernel" if num_sequences <= MAX_TOKENS else "ternary_linear_kernel"
    assert launches == {
        linear: 4 * num_layers,
        "decode_attention_kernel": num_layers,
        "rms_norm_kernel": 1,
        "dense_linear_kernel": 1,
    }
    assert launches.total() + 1 <= 160  # with the embedding, which torch gathers


@pytest.mark.parametrize("num_sequences", [257, 512])
def test_above_256_sequences_a_layer_takes_seven(
    num_sequences: int, launches: Counter[str], run_step: Callable[[Weights, int, int], None]
) -> None:
    run_step("ternary", num_sequences, 1)
    num_layers = SHAPE_2B4T.num_layers
    assert launches == {
        "ternary_linear_kernel": 4 * num_layers,
        "decode_attention_kernel": num_layers,
        "rms_norm_kernel": num_layers + 1,
        "gated_activation_kernel": num_layers,
        "dense_linear_kernel": 1,
    }


@pytest.mark.parametrize(
    ("num_sequences", "new_tokens", "is_persistent"),
    [(1, 1, True), (8, 1, True), (9, 1, False), (2, 2, False)],
)
def test_a_persistent_step_is_one_kernel_for_all_layers_up_to_eight_tokens(
    num_sequences: int,
    new_tokens: int,
    is_persistent: bool,
    launches: Counter[str],
    run_step: Callable[..., None],
) -> None:
    run_step("ternary", num_sequences, new_tokens, persistent_step=True)
    if is_persistent:
        assert launches == {
            "_meet_kernel": 1,  # once, to see that it can
            "persistent_layers_kernel": 1,
            "rms_norm_kernel": 1,
            "dense_linear_kernel": 1,
        }
        modelled = step(
            sizes_of_2b4t(),
            "ternary",
            num_sequences=num_sequences,
            context_tokens=512,
            is_persistent=True,
        )
        assert launches.total() - 1 + 1 == modelled.num_kernels  # with the embedding
    else:
        assert "persistent_layers_kernel" not in launches


class TorchKernels(TorchDispatchMode):
    """Counts torch's own operations that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::new_empty")):
            self.launched[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_a_captured_step_feeds_decodes_and_draws_in_160_kernels(
    launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[Callable[[], None]] = []
    monkeypatch.setattr(graphs, "capture", lambda step, pool, device: captured.append(step))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(TritonBackend, "compile_together", lambda backend, call: None)
    model = random_model(
        SHAPE_2B4T, weights="ternary", backend=make_backend(), dtype=torch.bfloat16, seed=0
    )
    DecodeGraphs(
        model,
        KVCache(SHAPE_2B4T, 8, torch.bfloat16, CPU),
        DeviceStep(8, 16, 4, CPU),
        max_num_seqs=8,
        max_model_len=64,
    )
    for run in captured:
        launches.clear()
        with TorchKernels() as torch_kernels:
            run()
        assert launches["draw_kernel"] == 1
        assert torch_kernels.launched.total() == 6, torch_kernels.launched
        assert launches.total() + torch_kernels.launched.total() <= 160


@pytest.mark.parametrize(
    ("weights", "num_sequences", "new_tokens"),
    [
        ("ternary", 1, 1),
        ("ternary", 8, 1),
        ("ternary", 2, 4),
        ("ternary", 9, 1),
        ("ternary", 5, 16),
        ("ternary", 257, 1),
        ("ternary", 17, 16),
        ("dense", 1, 1),
    ],
)
def test_the_roofline_counts_what_is_launched(
    weights: Weights,
    num_sequences: int,
    new_tokens: int,
    launches: Counter[str],
    run_step: Callable[[Weights, int, int], None],
) -> None:
    run_step(weights, num_sequences, new_tokens)
    embedding = 1
    counted = launches.total() + embedding
    assert counted == cost(weights, num_sequences, new_tokens).num_kernels


def test_the_model_of_a_step_with_its_launches_meets_the_goal() -> None:
    """Arithmetic, not a measurement: with ten kernels a layer the goal would be out of reach."""
    ternary, dense = cost("ternary", 1), cost("dense", 1)
    assert dense.floor_s(H200) / ternary.floor_s(H200) >= 2.5
    byte_floor_s = ternary.floor_s(replace(H200, kernel_s=0.0))
    assert byte_floor_s / ternary.floor_s(H200) >= 0.42
    more = 5 * SHAPE_2B4T.num_layers * H200.kernel_s
    assert dense.floor_s(H200) / (ternary.floor_s(H200) + more) < 2.5
