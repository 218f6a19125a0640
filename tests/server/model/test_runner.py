"""A runner whose device lags: what it stages, launches and hands over."""

from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitwatt.model import graphs
from bitwatt.model.graphs import DecodeGraphs
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.prompt_graphs import PromptGraphs, token_buckets
from bitwatt.model.random_weights import random_model
from bitwatt.model.runner import ModelRunner
from bitwatt.model.runner_protocol import StepResult, StepResultHandle
from bitwatt.model.truncation_sampling import draw
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.plan import Plan
from bitwatt.scheduling.request import FinishReason, Request, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler
from bitwatt_kernels.reference.reference_backend import ReferenceBackend
from bitwatt_kernels.registry import choose_backend
from torch.overrides import TorchFunctionMode

from tests.factories import make_model_config
from tests.server.constraints.tokens import make_grammar, token_ids
from tests.server.model.lagging import LaggingStream

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 256}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "logprobs": 2},
    "filtered": {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "penalized": {
        "temperature": 0.0,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {5: 1.0},
        "min_tokens": 100,
        "stop_token_ids": (3,),
    },
    "scored": {"temperature": 0.0, "prompt_logprobs": 1},
    "embedded": {"max_tokens": 0, "embeds": True},
    "drafted": {
        "temperature": 0.0,
        "max_tokens": 24,
        "logit_bias": {5: 1000.0, 6: 1000.0},
        "frequency_penalty": 0.5,
        "logprobs": 1,
    },
    "constrained": {"temperature": 0.0, "max_tokens": 24},
    "drafted and constrained": {
        "temperature": 0.0,
        "max_tokens": 24,
        "logit_bias": dict.fromkeys(token_ids("ab"), 1000.0),
        "frequency_penalty": 0.5,
    },
}


def make_scheduler(name: str) -> Scheduler:
    sampling = {"max_tokens": 6, **SETTINGS[name]}
    grammar = make_grammar(320, regex="[ab]{30}") if "constrained" in name else None
    blocks = BlockAllocator(64, 16, prefix_caching=False)
    scheduler = Scheduler(blocks, speculates="drafted" in name, **LIMITS)
    for i, length in enumerate((90, 40, 33)):
        prompt = [(7 * i + j) % 300 for j in range(length)]
        scheduler.add(
            Request(
                request_id=str(i),
                prompt_token_ids=prompt,
                sampling=ResolvedSampling(seed=i, **sampling),
                grammar=grammar,
            )
        )
    return scheduler


def make_runner(
    stream: LaggingStream | None, backend: str | type[ReferenceBackend] = "torch"
) -> ModelRunner:
    cpu = torch.device("cpu")
    model = random_model(
        make_model_config(num_layers=1),
        weights="ternary",
        backend=choose_backend(cpu, backend).backend if isinstance(backend, str) else backend(cpu),
        dtype=torch.float32,
        seed=0,
    )
    kv_cache = KVCache(model.config, 64, torch.float32, torch.device("cpu"))
    kv_cache.layers.zero_()
    return ModelRunner(model, kv_cache, stream=stream, **LIMITS)


def drive(
    scheduler: Scheduler,
    launch: Callable[[Plan], StepResultHandle],
    look: Callable[[int], None] = lambda num_sampling: None,
) -> list[StepResult]:
    """Run to the end as the engine does: a step is launched before the last is waited for."""
    results: list[StepResult] = []
    flight: tuple[Plan, StepResultHandle] | None = None
    while scheduler.has_work or flight:
        plan = scheduler.plan()
        launched = (plan, launch(plan)) if plan.chunks else None
        done, flight = flight, launched
        if done:
            results.append(done[1].wait())
            look(len(results))
            scheduler.commit(done[0], results[-1].tokens)
            for chunk in done[0].embedded:
                scheduler.abort(chunk.request.request_id, FinishReason.LENGTH)
    return results


@pytest.mark.parametrize("name", SETTINGS)
def test_a_device_that_lags_reads_what_was_staged_and_gives_the_same_results(name: str) -> None:
    stream = LaggingStream()
    late = make_runner(stream)
    prompt = make_runner(None)
    try:
        scheduler = make_scheduler(name)
        results = drive(scheduler, late.launch)
        assert results == drive(make_scheduler(name), prompt.launch)
        assert sum(not result.tokens for result in results) >= 2, "steps that draw nothing"
        assert stream.num_overwritten == 0
        assert (scheduler.counters.num_accepted_tokens > 0) == ("drafted" in name)
    finally:
        late.close()
        prompt.close()


class DrawingBackend(ReferenceBackend):
    """Draws by a call of its own, as a GPU's backend does."""

    def mask_logits(self, logits: torch.Tensor, rows: Sequence[int], bits: torch.Tensor) -> None:
        raise AssertionError("no step of these has both masks and log-probabilities")

    def draw_tokens(
        self,
        logits: torch.Tensor,
        settings: torch.Tensor,
        bits: torch.Tensor | None,
        best: torch.Tensor | None = None,
    ) -> torch.Tensor:
        token = torch.arange(logits.shape[1])
        tokens = logits.argmax(dim=-1)
        for i, (temperature, top_k, top_p, min_p, _, mask) in enumerate(settings.tolist()):
            if bits is not None and mask >= 0:
                is_allowed = bits[int(mask)][token // 32] >> token % 32 & 1
                logits[i].masked_fill_(is_allowed == 0, -torch.inf)
                tokens[i] = logits[i].argmax()
            if temperature:
                row = ResolvedSampling(
                    max_tokens=1,
                    temperature=temperature,
                    top_k=int(top_k),
                    top_p=top_p,
                    min_p=min_p,
                )
                tokens[i] = draw(logits[i : i + 1], [row], settings[i : i + 1, 4])[0]
        return tokens


@pytest.fixture
def num_replays(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """A fake graph runs its step anew, on the tensors it was captured with, and counts."""
    counted = Counter[int]()

    def capture(step: Callable[[], None], pool: object, device: torch.device) -> SimpleNamespace:
        number = len(counted)
        counted[number] = 0

        def replay() -> None:
            counted[number] += 1
            step()

        return SimpleNamespace(replay=replay)

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return counted


@pytest.mark.parametrize("backend", [ReferenceBackend, DrawingBackend])
@pytest.mark.parametrize(
    "name", ["greedy", "filtered", "penalized", "drafted", "constrained", "scored", "embedded"]
)
def test_replayed_graphs_give_a_lagging_device_s_tokens(
    name: str, backend: type[ReferenceBackend], num_replays: Counter[int]
) -> None:
    stream = LaggingStream()
    replaying, eager = make_runner(stream, backend), make_runner(None, "reference")
    try:
        assert replaying._device_step is not None
        shared = (replaying._model, replaying._kv_cache, replaying._device_step)
        limits = {"max_num_seqs": LIMITS["max_num_seqs"], "max_model_len": LIMITS["max_model_len"]}
        replaying._graphs = DecodeGraphs(*shared, **limits)
        num_decode_graphs = len(num_replays)
        replaying._prompt_graphs = PromptGraphs(
            *shared, **limits, max_num_batched_tokens=LIMITS["max_num_batched_tokens"]
        )
        results = drive(make_scheduler(name), replaying.launch)
        assert results == drive(make_scheduler(name), eager.launch)
        assert stream.num_overwritten == 0
        decodes = sum(n for i, n in num_replays.items() if i < num_decode_graphs)
        assert decodes >= (0 if name == "embedded" else 3)
        assert num_replays.total() - decodes >= 3
    finally:
        replaying.close()
        eager.close()


@pytest.mark.parametrize("limit", [1, 16, 17, 100, 512, 2048, 8192])
def test_a_step_with_pieces_of_prompts_is_padded_by_a_quarter_or_has_no_graph(limit: int) -> None:
    sizes = token_buckets(limit)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == limit
    for num_tokens in range(1, min(limit, 1024) + 1):
        size = next(size for size in sizes if size >= num_tokens)
        assert size <= 64 or 4 * size <= 5 * num_tokens or size == limit


def test_buffers_of_a_step_whose_launch_raised_are_not_written_before_they_are_copied() -> None:
    stream = LaggingStream()
    runner = make_runner(stream)
    scheduler = make_scheduler("greedy")
    plan = scheduler.plan()
    hidden_states = runner._model.hidden_states

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    runner._model.hidden_states = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.launch(plan)
    runner._model.hidden_states = hidden_states  # type: ignore[method-assign]
    for _ in range(4):
        drive(make_scheduler("greedy"), runner.launch)
    assert stream.num_overwritten == 0
    runner.close()


WAITING = ("scored", "constrained", "drafted and constrained")  # for logits, and for tokens drawn
WAITS = ("tolist", "item", "nonzero", "__bool__", "bincount", "cpu", "numpy", "unique")


class Waits(TorchFunctionMode):
    """Names the calls that would wait for a device of which "meta" stands in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.tensor and str(kwargs.get("device")) == "meta":
            self.found["torch.tensor(device=)"] += 1
        if name == "pin_memory":
            return args[0]
        if name in ("to", "copy_"):
            devices = {torch.device("meta"), torch.device("cpu")}
            other = args[1] if isinstance(args[1], torch.device) else getattr(args[1], "device", 0)
            if {args[0].device, other} == devices and not kwargs.get("non_blocking"):
                self.found[f"{name} without non_blocking"] += 1
        if name == "where" and any(isinstance(arg, int | float) for arg in args):
            self.found["where of a scalar, which is copied"] += args[0].device.type == "meta"
        if name in WAITS and args[0].device.type == "meta":
            self.found[name] += 1
        return func(*args, **kwargs)


class MetaStream:
    """Copies nothing."""

    def pinned(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        pass

    def record(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None)


@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in WAITING])
def test_no_call_in_launch_waits_for_the_device(name: str) -> None:
    meta = torch.device("meta")
    vocab_size = 320

    model: Any = SimpleNamespace(
        backend=SimpleNamespace(
            device=meta,
            mask_logits=lambda *_: None,
            draw_tokens=lambda logits, *_: torch.zeros(len(logits), dtype=torch.int64, device=meta),
        ),
        config=SimpleNamespace(vocab_size=vocab_size),
        hidden_states=lambda token_ids, *_, **__: torch.zeros(len(token_ids), 8, device=meta),
        normed=lambda hidden_states: hidden_states,
        logits=lambda _, rows: torch.zeros(len(rows), vocab_size, device=meta),
    )
    runner = ModelRunner(model, None, stream=MetaStream(), **LIMITS)  # type: ignore[arg-type]
    waits = Waits()

    def launch(plan: Plan) -> StepResultHandle:
        with waits:
            runner.launch(plan)
        tokens = [5 for chunk in plan.chunks for _ in range(chunk.num_drawn)]
        return SimpleNamespace(wait=lambda: StepResult(tokens, [None] * len(tokens)))

    drive(make_scheduler(name), launch)
    assert waits.found == {}
    runner.close()
