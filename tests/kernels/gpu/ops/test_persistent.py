"""All layers of a step in one kernel give the bits of five kernels a layer, in every order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.random_weights import random_model
from bitwatt_kernels.backend import HeadNorms, LayerWeights, StepLayout
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.gpu import persistent
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.few_tokens import run_layers
from bitwatt_kernels.gpu.interpreter import INTERPRETED
from bitwatt_kernels.gpu.persistent import PersistentLayers
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from bitwatt_kernels.packing import TernaryWeight
from bitwatt_kernels.reference.attention import rope_table

from tests.extent import TEST_ALL
from tests.factories import make_model_config, make_step_layout, moved
from tests.kernels.gpu.ops.interleaving import interleaved
from tests.kernels.gpu.ops.test_attention import SMALL

interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="a GPU has orders of its own")
HIDDEN, HEAD_DIM = 128, 32


class Keeping(TritonBackend):
    """Keeps a model's layers as they are."""

    layers: Sequence[LayerWeights[Any]]

    def prepare_layers(self, layers: Sequence[LayerWeights[object]]) -> object:
        self.layers = layers
        return tuple(layers)


@dataclass(frozen=True)
class Step:
    """What layers run on."""

    layers: Sequence[LayerWeights[Any]]
    h: torch.Tensor
    rope: torch.Tensor
    kv_caches: torch.Tensor
    layout: StepLayout
    gpu: Gpu

    def run(self, run: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual stream and the caches after run(h, rope, kv_caches, layout)."""
        kv_caches = self.kv_caches.clone()
        return run(self.h, self.rope, kv_caches, self.layout), kv_caches

    def in_five_kernels(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.run(lambda h, *rest: run_layers(h, self.layers, *rest, self.gpu))

    def in_one(self, num_programs: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.run(PersistentLayers(self.layers, self.gpu, num_programs).run)


def make_step(
    context_lens: Sequence[int],
    device: torch.device,
    kv_dtype: torch.dtype = torch.bfloat16,
    **config: Any,
) -> Step:
    """Return a step of a token to each context, in splits of 32 tokens; a context of 0 pads."""
    backend = Keeping(device)
    backend.gpu.configs = replace(backend.gpu.configs, attention=SMALL)
    model = random_model(
        make_model_config(vocab_size=64, hidden_size=HIDDEN, head_dim=HEAD_DIM, **config),
        weights="ternary",
        backend=backend,
        dtype=torch.bfloat16,
        seed=0,
    )
    torch.manual_seed(1)
    blocks = -(-max(context_lens) // 16)
    kv_cache = KVCache(model.config, len(context_lens) * blocks, kv_dtype, device).layers
    values = torch.randint(-100, 100, kv_cache.shape, device=device)
    kv_cache.copy_(values if kv_dtype == torch.int8 else values / 50)
    if kv_dtype == torch.int8:  # scales of 0.01 behind the codes
        scales = kv_cache.view(torch.float32)
        scales[..., 16 * HEAD_DIM // 4 :] = 0.01
    tables = torch.randperm(len(context_lens) * blocks).int().view(len(context_lens), blocks)
    layout = make_step_layout(tables, context_lens, [1] * len(context_lens))
    return Step(
        backend.layers,
        torch.randn(len(context_lens), HIDDEN).to(device, torch.bfloat16),
        rope_table(max(context_lens), HEAD_DIM, 1e4).to(device),
        kv_cache,
        moved(layout, device),
        backend.gpu,
    )


def assert_same(
    one: tuple[torch.Tensor, torch.Tensor], five: tuple[torch.Tensor, torch.Tensor], step: Step
) -> None:
    is_real = step.layout.slots >= 0
    assert torch.equal(one[0][is_real], five[0][is_real])
    assert torch.equal(one[1].view(torch.int8), five[1].view(torch.int8))
    assert not step.gpu.counters.any()


@pytest.mark.parametrize(
    ("context_lens", "kv_dtype", "config"),
    [
        ([40, 0, 90], torch.bfloat16, {"num_kv_heads": 1, "num_layers": 3}),
        ([*range(40, 48)], torch.int8, {}),
        ([70], torch.bfloat16, {}),
        ([20], torch.bfloat16, {"activation": "silu", "has_sub_norms": False}),
    ][: None if TEST_ALL else 2],
)
def test_layers_in_one_kernel_are_those_in_five_a_layer(
    context_lens: list[int], kv_dtype: torch.dtype, config: dict[str, Any], device: torch.device
) -> None:
    """192 features of the MLP are a tail of the packed row."""
    step = make_step(context_lens, device, kv_dtype, **config)
    assert_same(step.in_one(), step.in_five_kernels(), step)


@pytest.fixture(scope="module")
def three(device: torch.device) -> Step:
    """Of splits of 32 tokens two, padding, three."""
    return make_step([40, 0, 90], device)


@pytest.fixture(scope="module")
def three_in_five_kernels(three: Step) -> tuple[torch.Tensor, torch.Tensor]:
    return three.in_five_kernels()


@interpreted_only
@pytest.mark.parametrize("num_programs", [5, 2] if TEST_ALL else [5])
def test_programs_at_once_wait_for_one_another_and_end(
    num_programs: int, three: Step, three_in_five_kernels: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Whichever goes on after an atomic; and each launch finds the arrivals at zero."""
    with interleaved(0):  # they meet once before the first step
        layers = PersistentLayers(three.layers, three.gpu, num_programs)
    for seed in range(4 if TEST_ALL else 2):
        with interleaved(seed) as baton:
            result = three.run(layers.run)
        assert_same(result, three_in_five_kernels, three)
        assert baton.num_switches > 2 * num_programs * 5 * len(three.layers)


@interpreted_only
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what was not written yet may be no number
@pytest.mark.parametrize("phase", range(5) if TEST_ALL else [1])
def test_without_the_wait_before_any_phase_the_result_is_wrong(
    phase: int,
    three: Step,
    three_in_five_kernels: tuple[torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Phases are qkv, attention, o, gate_up and down."""
    num_programs, wait = 3, persistent.wait_for_all

    def wait_elsewhere(arrivals_ptr: Any, target: Any) -> None:
        before = (int(target) // num_programs - 1) % 5
        wait(arrivals_ptr, target * 0 if before == phase else target)

    monkeypatch.setattr(persistent, "wait_for_all", wait_elsewhere)

    def is_wrong(seed: int) -> bool:
        with interleaved(seed):
            result, _ = three.in_one(num_programs)
        return not torch.equal(result[[0, 2]], three_in_five_kernels[0][[0, 2]])

    assert any(is_wrong(seed) for seed in range(8))


def test_a_model_that_the_kernel_does_not_know_is_refused(device: torch.device) -> None:
    step = make_step([1], device)
    first, second = step.layers
    ones = torch.ones(HEAD_DIM, device=device)
    biased = TernaryWeight(first.o.codes, first.o.scales, torch.zeros(HIDDEN, device=device))
    grouped = TernaryWeight(first.o.codes, torch.ones(HIDDEN, 2, device=device))
    for changed, reason in (
        (replace(first, o=biased), "biases"),
        (replace(first, o=grouped), "scales by groups"),
        (replace(first, head_norms=HeadNorms(ones, ones, 1e-5)), "norm queries and keys"),
        (replace(first, eps=1e-6), "its layers differ"),
        (replace(first, num_heads=3), "3 heads of 128 features"),
    ):
        layers = [changed, second] if "differ" in reason else [changed]
        with pytest.raises(BackendError, match=f"{reason}.*--persistent-step"):
            PersistentLayers(layers, step.gpu)
