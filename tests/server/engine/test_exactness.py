"""The engine's promise: a request's tokens are the same whatever else runs.

Small models of random weights in bfloat16, on every CPU backend that runs here.
"""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import EngineStats, Submit
from bitwatt.model.config import Weights, weights_named
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.random_weights import random_model
from bitwatt.model.runner import ModelRunner
from bitwatt.model.transformer import Transformer
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.registry import choose_backend

from tests.extent import TEST_ALL
from tests.factories import make_model_config

pytestmark = pytest.mark.slow

MAX_MODEL_LEN = 256
CONFIG = make_model_config(max_model_len=MAX_MODEL_LEN)


def make_model(backend: str, weights: Weights = "ternary", *, num_threads: int = 1) -> Transformer:
    try:
        choice = choose_backend(
            torch.device("cpu"), backend, batch_invariant=True, num_threads=num_threads
        )
    except BackendError as error:
        pytest.skip(f"{backend}: {error}")
    return random_model(
        CONFIG,
        weights=weights,
        backend=choice.backend,
        dtype=torch.bfloat16,
        seed=0,
    )


@dataclass(frozen=True)
class Limits:
    num_blocks: int = 512
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    prefix_caching: bool = True
    speculates: bool = False  # and finds that drafts pay, whatever else the machine does
    kv_dtype: torch.dtype | None = None  # the model's


def make_core(model: Transformer, limits: Limits) -> EngineCore:
    dtype = limits.kv_dtype or model.dtype
    kv_cache = KVCache(model.config, limits.num_blocks, dtype, torch.device("cpu"))
    kv_cache.layers.fill_(-1 if dtype == torch.int8 else torch.nan)  # scales of NaN
    scheduler = Scheduler(
        BlockAllocator(limits.num_blocks, 16, prefix_caching=limits.prefix_caching),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=MAX_MODEL_LEN,
        speculates=limits.speculates,
    )
    runner = ModelRunner(
        model,
        kv_cache,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=MAX_MODEL_LEN,
    )
    if limits.speculates:
        return EngineCore(scheduler, runner, clock=lambda: 0.0)
    return EngineCore(scheduler, runner)


def make_requests(count: int, seed: int = 0) -> list[Submit]:
    chance = random.Random(seed)
    prefixes = [[chance.randrange(320) for _ in range(100)] for _ in range(3)]
    settings = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.2, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0.0, "repetition_penalty": 1.2},
        {"temperature": 1.0, "logit_bias": {7: 2.0}, "min_tokens": 5},
    ]
    requests = []
    for i in range(count):
        shared = chance.choice(prefixes)[: chance.choice([0, 0, 16, 40, 90])]
        own = [chance.randrange(320) for _ in range(chance.randint(1, 40))]
        sampling = ResolvedSampling(
            max_tokens=chance.randint(1, 30),
            seed=i,
            stop_token_ids=(3,),
            logprobs=2 if i % 5 == 0 else None,
            **settings[i % len(settings)],  # type: ignore[arg-type]
        )
        requests.append(Submit(request_id=str(i), prompt_token_ids=shared + own, sampling=sampling))
    return requests


def run_together(
    core: EngineCore, requests: list[Submit], *, aborts: int = 0, seed: int = 1
) -> tuple[dict[str, list[int]], set[str], EngineStats]:
    """Submit requests over time and abort some; return tokens, the aborted, and the stats."""
    chance = random.Random(seed)
    doomed = set(chance.sample([r.request_id for r in requests], aborts))
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    waiting = list(requests)
    while waiting or core.has_work:
        for _ in range(min(len(waiting), chance.choice([0, 1, 5, 20]))):
            assert core.submit(waiting.pop(0)) is None
        if doomed and chance.random() < 0.3:
            core.abort([doomed_id for doomed_id in sorted(doomed) if chance.random() < 0.05])
        if core.has_work:
            for output in core.step():
                tokens[output.request_id] += output.token_ids
    core.check_integrity()
    return tokens, doomed, core.stats()


def run_alone(
    model: Transformer, requests: list[Submit], kv_dtype: torch.dtype | None = None
) -> dict[str, list[int]]:
    core = make_core(model, Limits(prefix_caching=False, kv_dtype=kv_dtype))
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        core.submit(request)
        while core.has_work:
            for output in core.step():
                tokens[request.request_id] += output.token_ids
    core.close()
    return tokens


@dataclass(frozen=True)
class Case:
    model: Transformer
    kv_dtype: torch.dtype
    requests: list[Submit]
    truth: dict[str, list[int]]


MANY = 200 if TEST_ALL else 50
FEW = 40 if TEST_ALL else 20  # plain torch takes some 10 ms a step here


@pytest.fixture(
    scope="module",
    params=[
        f"native-ternary-bfloat16-{MANY}",
        f"torch-ternary-bfloat16-{FEW}",
        f"native-dense-bfloat16-{MANY}",
        f"native-ternary-int8-{MANY}",
        *([f"torch-ternary-int8-{FEW}", f"native-dense-int8-{MANY}"] if TEST_ALL else []),
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    backend, weights, kv_dtype, count = request.param.split("-")
    dtype = getattr(torch, kv_dtype)
    # A second thread looks out for work between operations and doubles what such a model takes.
    num_threads = 2 if TEST_ALL or dtype == torch.int8 else 1
    model = make_model(backend, weights_named(weights), num_threads=num_threads)
    requests = make_requests(int(count))
    return Case(model, dtype, requests, run_alone(model, requests, dtype))


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix-cache", "no-prefix-cache"])
def test_requests_get_the_tokens_they_get_alone(case: Case, prefix_caching: bool) -> None:
    """Through chunked prefill, forced preemption, shared prefixes and random aborts."""
    requests, truth = case.requests, case.truth
    limits = Limits(
        num_blocks=40,
        max_num_seqs=24,
        max_num_batched_tokens=48,
        prefix_caching=prefix_caching,
        kv_dtype=case.kv_dtype,
    )
    core = make_core(case.model, limits)
    tokens, doomed, stats = run_together(core, requests, aborts=len(requests) // 10)
    core.close()
    for request in requests:
        name = request.request_id
        if name in doomed:
            assert tokens[name] == truth[name][: len(tokens[name])]
        else:
            assert tokens[name] == truth[name]
    assert stats.num_preemptions > 0
    assert (stats.num_prefix_cache_hits > 0) == prefix_caching
    assert stats.num_running == stats.num_waiting == stats.num_blocks_used == 0


def test_logprobs_are_the_same_alone_and_together() -> None:
    model = make_model("torch")
    requests = [replace_sampling(request, logprobs=3) for request in make_requests(12, seed=4)]

    def collect(core: EngineCore, batch: list[Submit]) -> dict[str, list[object]]:
        logprobs: dict[str, list[object]] = {request.request_id: [] for request in batch}
        for request in batch:
            core.submit(request)
        while core.has_work:
            for output in core.step():
                assert len(output.logprobs) == len(output.token_ids)
                logprobs[output.request_id] += output.logprobs
        core.close()
        return logprobs

    together = collect(make_core(model, Limits(max_num_batched_tokens=64)), requests)
    for request in requests:
        assert (
            collect(make_core(model, Limits()), [request])[request.request_id]
            == (together[request.request_id])
        )


def replace_sampling(request: Submit, **settings: object) -> Submit:
    return Submit(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=replace(request.sampling, **settings),  # type: ignore[arg-type]
    )


def test_shared_prefix_of_512_tokens_is_computed_once() -> None:
    model = make_model("torch")
    config = replace(model.config, max_model_len=1024)
    model = random_model(
        config, weights="ternary", backend=model.backend, dtype=torch.bfloat16, seed=0
    )
    chance = random.Random(0)
    shared = [chance.randrange(320) for _ in range(512)]
    kv_cache = KVCache(config, 128, model.dtype, torch.device("cpu"))
    scheduler = Scheduler(
        BlockAllocator(128, 16), max_num_seqs=4, max_num_batched_tokens=256, max_model_len=1024
    )
    runner = ModelRunner(
        model, kv_cache, max_num_seqs=4, max_num_batched_tokens=256, max_model_len=1024
    )
    core = EngineCore(scheduler, runner)

    def run(name: str, own: list[int]) -> EngineStats:
        core.submit(
            Submit(
                request_id=name,
                prompt_token_ids=shared + own,
                sampling=ResolvedSampling(max_tokens=1, temperature=0.0),
            )
        )
        while core.has_work:
            core.step()
        return core.stats()

    first = run("first", [1, 2, 3])
    assert first.num_prefix_cache_hits == 0
    second = run("second", [4, 5])
    assert second.num_prefix_cache_hits == 512
    assert second.num_steps == first.num_steps + 1
    assert second.step_tokens == 2
    core.close()
