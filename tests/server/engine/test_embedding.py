"""A prompt's embedding is the last token's hidden state, bit for bit whatever runs beside."""

import math
import random
from array import array
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import (
    StepOutputs,
    Submit,
    TokenOutput,
    decode_from_engine,
    encode,
    merged,
)
from bitwatt.model.fake_runner import FAKE_HIDDEN_SIZE, FakeRunner
from bitwatt.model.transformer import Transformer
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import FinishReason, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler

from tests.server.checkpoints.against_transformers import (
    DENSE_TOLERANCE,
    FLIPPED_TOLERANCE,
    PROMPT,
    load,
)
from tests.server.checkpoints.writers import write_dense, write_online
from tests.server.engine.failing import fail_step
from tests.server.engine.test_exactness import CONFIG, Limits, make_core, make_model
from tests.server.model.steps import CPU_BACKENDS, make_kv_cache, step_layout

pytestmark = pytest.mark.slow

ROOMY = Limits(prefix_caching=False)
CROWDED = Limits(num_blocks=26, max_num_seqs=12, max_num_batched_tokens=40, speculates=True)
make_model_once = cache(make_model)


def make_submit(name: str, prompt: list[int], **sampling: Any) -> Submit:
    given: dict[str, Any] = {"max_tokens": 0, "embeds": True} | sampling
    return Submit(request_id=name, prompt_token_ids=prompt, sampling=ResolvedSampling(**given))


def make_prompts(count: int) -> list[list[int]]:
    """Return prompts of 1 to 110 tokens, many of them with beginnings in common."""
    chance = random.Random(7)
    beginnings = [[chance.randrange(CONFIG.vocab_size) for _ in range(70)] for _ in range(2)]
    return [
        chance.choice(beginnings)[: chance.choice([0, 16, 32, 64])]
        + [chance.randrange(CONFIG.vocab_size) for _ in range(chance.randint(1, 40))]
        for _ in range(count)
    ]


def run(core: EngineCore, requests: list[Submit]) -> dict[str, TokenOutput]:
    """Run requests together, in a random order of coming, and return what each brought in all."""
    chance = random.Random(1)
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    waiting = list(requests)
    while waiting or core.has_work:
        for _ in range(min(len(waiting), chance.choice([0, 1, 4]))):
            request = waiting.pop(0)
            only = core.submit(request)
            outputs[request.request_id] += [] if only is None else [only]
        if core.has_work:
            for output in core.step():
                outputs[output.request_id].append(output)
    core.check_integrity()
    assert core.stats().num_blocks_used == 0
    for its in outputs.values():
        assert [output.finish_reason is None for output in its] == [True] * (len(its) - 1) + [False]
    return {name: merged(its) for name, its in outputs.items()}


def embedding_of(output: TokenOutput) -> list[float]:
    assert output.embedding is not None, output.error
    return array("f", output.embedding).tolist()


def expected(model: Transformer, prompt: list[int]) -> torch.Tensor:
    """Return the embedding of a prompt that is computed in one step of its own."""
    layout = step_layout([0], [len(prompt)], [list(range(16))])
    hidden = model.hidden_states(torch.tensor(prompt), layout, make_kv_cache(model, 16))[-1:]
    state = model.normed(hidden)[0].double()
    return (state / state.square().sum().sqrt()).float()


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_an_embedding_is_the_same_bits_alone_chunked_batched_cached_and_preempted(
    backend: str,
) -> None:
    model = make_model_once(backend)
    prompts = {str(i): prompt for i, prompt in enumerate(make_prompts(14))}
    requests = [make_submit(name, prompt) for name, prompt in prompts.items()]
    others = [
        make_submit(f"{kind} {name}", prompt, embeds=False, max_tokens=20, seed=7)
        for name, prompt in prompts.items()
        for kind in ("before", "behind")
    ]
    core = make_core(model, CROWDED)
    in_turns = zip(others[::2], requests, others[1::2], strict=True)
    outputs = run(core, [request for some in in_turns for request in some])
    stats = core.stats()
    core.close()
    assert stats.num_preemptions > 0
    assert sum(outputs[name].num_cached_tokens for name in prompts) > 0
    alone = make_core(model, ROOMY)
    for name, prompt in prompts.items():
        output = outputs[name]
        assert output.finish_reason is FinishReason.LENGTH
        assert output.token_ids == []
        assert output.embedding == run(alone, [make_submit(name, prompt)])[name].embedding
        by_hand = expected(model, prompt)
        # Both are rounded to float32 once, from lengths that float64 summed in two orders.
        values = torch.tensor(embedding_of(output))
        assert torch.allclose(values, by_hand, rtol=2**-23, atol=0)
        assert math.isclose(math.hypot(*embedding_of(output)), 1.0, rel_tol=2**-23)
    for other in others[:3]:
        tokens = run(alone, [other])[other.request_id].token_ids
        assert outputs[other.request_id].token_ids == tokens
    alone.close()


def test_a_prompt_in_the_prefix_cache_is_computed_from_there() -> None:
    model = make_model_once("torch")
    core = make_core(model, Limits())
    prompt = [i % 300 for i in range(100)]
    first = run(core, [make_submit("a", prompt)])["a"]
    again = run(core, [make_submit("b", prompt)])["b"]
    stats = core.stats()
    core.close()
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 96)
    assert again.embedding == first.embedding
    assert (stats.num_prefix_cache_queries, stats.num_prefix_cache_hits) == (200, 96)
    assert (stats.num_prompt_tokens, stats.num_generation_tokens) == (200, 0)


def test_a_prompt_may_be_as_long_as_the_context() -> None:
    core = make_core(make_model_once("torch"), Limits(num_blocks=16))
    prompt = [i % 300 for i in range(CONFIG.max_model_len)]
    assert len(embedding_of(run(core, [make_submit("x", prompt)])["x"])) == CONFIG.hidden_size
    refused = core.submit(make_submit("y", [*prompt, 1]))
    core.close()
    assert refused is not None
    assert "--max-model-len" in (refused.error or "")


def test_a_step_without_prompts_to_embed_takes_no_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("bitwatt.model.runner.embed", never)
    monkeypatch.setattr(Scheduler, "_plan_scores", never)
    core = make_core(make_model_once("torch"), ROOMY)
    request = make_submit("x", [1] * 20, embeds=False, max_tokens=4)
    assert len(run(core, [request])["x"].token_ids) == 4
    core.close()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hidden_state_that_is_not_finite_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    hidden_states = Transformer.hidden_states

    def poisoned(self: Transformer, token_ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        hidden = hidden_states(self, token_ids, *rest, **options)
        hidden[token_ids == 319] = value
        return hidden

    monkeypatch.setattr(Transformer, "hidden_states", poisoned)
    core = make_core(make_model_once("torch"), Limits())
    bad, good = make_submit("bad", [1] * 40 + [319]), make_submit("good", [1] * 41)
    outputs = run(core, [bad, good])
    core.close()
    assert outputs["bad"].finish_reason is FinishReason.ERROR
    assert "not finite" in (outputs["bad"].error or "")
    assert outputs["bad"].embedding is None
    assert len(embedding_of(outputs["good"])) == CONFIG.hidden_size


@pytest.mark.parametrize("is_launched", [True, False])
@pytest.mark.parametrize("failing", range(5))
def test_a_step_that_fails_costs_those_it_did_not_compute_for_no_embedding(
    monkeypatch: pytest.MonkeyPatch, failing: int, is_launched: bool
) -> None:
    model = make_model_once("torch")
    prompts = {str(i): prompt for i, prompt in enumerate(make_prompts(5))}
    core = make_core(model, Limits(num_blocks=64, max_num_batched_tokens=32))
    with monkeypatch.context() as patched:
        fail_step(patched, failing, is_launched=is_launched)
        outputs = run(core, [make_submit(name, prompt) for name, prompt in prompts.items()])
    core.close()
    ended = [name for name, output in outputs.items() if output.error]
    assert 1 <= len(ended) < 5
    alone = make_core(model, ROOMY)
    for name in outputs.keys() - ended:
        by_itself = run(alone, [make_submit(name, prompts[name])])[name]
        assert outputs[name].embedding == by_itself.embedding
    alone.close()


@pytest.mark.parametrize("num_steps", range(6))
def test_a_request_that_is_aborted_brings_nothing_more(num_steps: int) -> None:
    core = make_fake_core()
    core.submit(make_submit("x", [1] * 50))
    outputs = [output for _ in range(num_steps) for output in core.step()]
    outputs += core.abort(["x"])
    while core.has_work:
        outputs += core.step()
    core.check_integrity()
    assert len(outputs) == 1
    assert (outputs[0].embedding is None) == (outputs[0].finish_reason is FinishReason.ABORT)


def test_an_embedding_goes_over_the_wire_packed() -> None:
    core = make_fake_core()
    output = run(core, [make_submit("x", [1] * 101)])["x"]
    data = encode(StepOutputs(outputs=[output], stats=core.stats()))
    message = decode_from_engine(data)
    assert isinstance(message, StepOutputs)
    [received] = message.outputs
    assert received == output
    assert len(received.embedding or b"") == 4 * FAKE_HIDDEN_SIZE


def make_fake_core() -> EngineCore:
    scheduler = Scheduler(
        BlockAllocator(64, 16), max_num_seqs=4, max_num_batched_tokens=16, max_model_len=256
    )
    return EngineCore(scheduler, FakeRunner(320))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_dense_model_s_embedding_is_transformers_last_hidden_state(
    tmp_path: Path, backend: str
) -> None:
    """Vectors whose relative error is e are, divided by their lengths, at most 2e apart."""
    theirs = write_dense(tmp_path, "llama")
    core = make_core(load(tmp_path, "dense", backend), ROOMY)
    ours = torch.tensor(embedding_of(run(core, [make_submit("x", PROMPT)])["x"]))
    core.close()
    assert torch.linalg.vector_norm(ours - last_state(theirs)) < 2 * DENSE_TOLERANCE


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_ternary_model_s_embedding_is_transformers_last_hidden_state(
    tmp_path: Path, backend: str
) -> None:
    theirs = write_online(tmp_path, "bitnet")
    core = make_core(load(tmp_path, "ternary", backend), ROOMY)
    prompts = {str(i): PROMPT[i : i + 1] for i in range(len(PROMPT))} | {"all": PROMPT}
    outputs = run(core, [make_submit(name, prompt) for name, prompt in prompts.items()])
    core.close()
    apart = [
        float(torch.linalg.vector_norm(torch.tensor(embedding_of(outputs[name])) - expected))
        for name, expected in ((name, last_state(theirs, p)) for name, p in prompts.items())
    ]
    # Most tokens that are alone meet no rounding boundary; FLIPPED_TOLERANCE says what one does.
    assert sorted(apart)[len(apart) // 4] < 2 * DENSE_TOLERANCE
    assert max(apart) < 2 * FLIPPED_TOLERANCE


@torch.no_grad()
def last_state(theirs: Any, prompt: list[int] = PROMPT) -> torch.Tensor:
    """Return what transformers has for the last token behind its final norm, of length 1.

    Its BitNet's functions run as they stand: to compile them takes 15 s.
    """
    with torch.compiler.set_stance("force_eager"):
        hidden: torch.Tensor = theirs.model(torch.tensor([prompt])).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(hidden, dim=0)
