"""What an engine compiles before it is ready is all that its steps need, counted without a GPU."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitwatt.model import graphs
from bitwatt.model.config import Weights
from bitwatt.model.graphs import DecodeGraphs
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.prompt_graphs import PromptGraphs
from bitwatt.model.random_weights import random_model
from bitwatt.model.runner import ModelRunner, warm_up_sizes
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import Request, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from triton.runtime.jit import JITFunction

from tests.factories import make_model_config
from tests.kernels.gpu.test_launches import make_backend
from tests.server.model.lagging import LaggingStream
from tests.server.model.test_runner import drive

CPU = torch.device("cpu")
MAX_NUM_SEQS, MAX_TOKENS, MAX_MODEL_LEN = 12, 700, 2048
CONFIG = make_model_config(max_model_len=MAX_MODEL_LEN)
WAVES = (
    (1, 1500, 17, 2, 640, 701, 33, 5, 64, 1, 129, 300, 1, 9),  # at once: full steps, then decoding
    *((length,) for length in (1, 2, 6, 10, 20, 40, 90, 150, 300, 420, 600)),  # steps of each size
)


def variant(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
    """Return what Triton compiles a kernel anew for: types, alignment, constants, options."""
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    key: list[Any] = [kernel.fn.__name__]
    for parameter in kernel.params:
        value = given.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            key.append(value)
        elif isinstance(value, torch.Tensor):
            key.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and not parameter.do_not_specialize:
            key.append((value == 1, value % 16 == 0, value.bit_length() > 31))
        else:
            key.append(type(value))
    return (*key, *sorted(given.items()))


@pytest.fixture
def ahead() -> set[tuple[Any, ...]]:
    """Variants that are compiled in parallel, before anything is launched."""
    return set()


@pytest.fixture
def compiled(ahead: set[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    variants: set[tuple[Any, ...]] = set()

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        variants.add(variant(kernel, arguments, keywords))
        if "tokens_ptr" in kernel.arg_names:  # what is drawn is fed
            dict(zip(kernel.arg_names, arguments, strict=False))["tokens_ptr"].zero_()

    def capture(step: Callable[[], None], pool: object, device: torch.device) -> object:
        step()
        return SimpleNamespace(replay=lambda: None)

    def compile_together(_: TritonBackend, call: Callable[[], object]) -> None:
        call()
        ahead.update(variants)

    monkeypatch.setattr(TritonBackend, "compile_together", compile_together)
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return variants


def warmed_runner(weights: Weights) -> ModelRunner:
    """Return a runner that has done what one on a GPU does before its engine is ready."""
    model = random_model(
        CONFIG, weights=weights, backend=make_backend(), dtype=torch.bfloat16, seed=0
    )
    kv_cache = KVCache(CONFIG, 4096 // 16, torch.bfloat16, CPU)
    runner = ModelRunner(
        model,
        kv_cache,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        stream=LaggingStream(),
    )
    assert runner._device_step is not None
    runner._graphs = DecodeGraphs(
        model,
        kv_cache,
        runner._device_step,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
    )
    runner._prompt_graphs = PromptGraphs(
        model,
        kv_cache,
        runner._device_step,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_TOKENS,
        max_model_len=MAX_MODEL_LEN,
    )
    runner._warm_up(warm_up_sizes(MAX_TOKENS), MAX_MODEL_LEN)
    return runner


@pytest.mark.parametrize("weights", ["ternary", "dense"])
def test_no_step_compiles_what_was_not_compiled_before_ready(
    weights: Weights,
    compiled: set[tuple[Any, ...]],
    ahead: set[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = warmed_runner(weights)
    assert ahead == compiled
    runner._prompt_graphs = None  # replayed, a step compiles nothing anyway
    head = runner._model.logits

    def logits(h: torch.Tensor, logit_tokens: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros_like(head(h, logit_tokens))  # of kernels that did nothing

    monkeypatch.setattr(runner._model, "logits", logits)
    before = set(compiled)
    compiled.clear()
    scheduler = Scheduler(
        BlockAllocator(4096 // 16, 16, prefix_caching=False),
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_TOKENS,
        max_model_len=MAX_MODEL_LEN,
    )
    results = []
    try:
        for lengths in WAVES:
            add_requests(scheduler, lengths)
            results += drive(scheduler, runner.launch)
    finally:
        runner.close()
    assert len(results) > 30
    assert len(compiled) > 5
    assert any(key[0] == "draw_kernel" for key in compiled)
    assert compiled - before == set()


def add_requests(scheduler: Scheduler, lengths: Sequence[int]) -> None:
    for i, length in enumerate(lengths):
        filters = ({"temperature": 0.0}, {}, {"top_p": 0.9, "top_k": 5})[i % 3]
        sampling = ResolvedSampling(max_tokens=3 + i % 4, **filters)  # type: ignore[arg-type]
        prompt = [j % 300 for j in range(length)]
        scheduler.add(Request(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
