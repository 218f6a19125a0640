"""The log-probabilities of a prompt are those that decoding its tokens gives, bit for bit."""

import math
import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import (
    PromptLogprobs,
    StepOutputs,
    Submit,
    TokenOutput,
    decode_from_engine,
    encode,
    merged,
)
from bitwatt.model import prompt_scoring
from bitwatt.model.fake_runner import FakeRunner
from bitwatt.model.transformer import Transformer
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import FinishReason, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler

from tests.extent import TEST_ALL
from tests.server.engine.failing import fail_step
from tests.server.engine.test_exactness import CONFIG, Limits, make_core, make_model

pytestmark = pytest.mark.slow

Scored = list[tuple[float, int, list[tuple[int, float]]]]
ROOMY = Limits(prefix_caching=False)
CROWDED = Limits(num_blocks=26, max_num_seqs=12, max_num_batched_tokens=40)
make_model_once = cache(make_model)


def make_submit(name: str, prompt: list[int], **sampling: Any) -> Submit:
    given: dict[str, Any] = {"max_tokens": 0, "prompt_logprobs": 0} | sampling
    return Submit(request_id=name, prompt_token_ids=prompt, sampling=ResolvedSampling(**given))


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
    assert not core._scores
    for its in outputs.values():
        assert [output.finish_reason is None for output in its] == [True] * (len(its) - 1) + [False]
        assert all(output.prompt_logprobs is None for output in its[1:])
    return {name: merged(its) for name, its in outputs.items()}


def scores_of(output: TokenOutput) -> Scored:
    assert output.prompt_logprobs is not None
    return output.prompt_logprobs.unpacked()


@cache
def decoded(backend: str, seed: int, num_top: int) -> tuple[list[int], Scored]:
    """Return a prompt whose tokens were decoded from its first one on, and how they were."""
    chance = random.Random(seed)
    core = make_core(make_model_once(backend), ROOMY)
    sampling = {"temperature": chance.choice([0.0, 1.0]), "seed": seed, "max_tokens": 75 - seed}
    first = chance.randrange(CONFIG.vocab_size)
    # Twice: among equally likely tokens it depends on their number which are the likeliest.
    answer, ranked = (
        run(core, [make_submit("x", [first], prompt_logprobs=None, logprobs=k, **sampling)])["x"]
        for k in (num_top, 20)
    )
    core.close()
    scored = []
    for entry, wide in zip(answer.logprobs, ranked.logprobs, strict=True):
        rank = 1 + sum(value > entry.sampled for _, value in wide.top)
        scored.append((entry.sampled, rank, entry.top))
    return [first, *answer.token_ids], scored


def check(scored: Scored, expected: Scored) -> None:
    assert len(scored) == len(expected)
    for (value, rank, top), (their_value, their_rank, their_top) in zip(
        scored, expected, strict=True
    ):
        assert value == their_value
        assert min(rank, 21) == their_rank
        assert top == their_top


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_a_prompt_s_scores_are_those_of_decoding_it_whatever_runs_beside(backend: str) -> None:
    """In chunks, batched, preempted, with and without a prefix cache that holds the prompt."""
    # Plain torch takes ms a step; of four prompts each asks for another count of likeliest tokens.
    num_prompts = 12 if TEST_ALL else {"native": 8, "torch": 5, "reference": 4}[backend]
    prompts = {str(seed): decoded(backend, seed, seed % 4) for seed in range(num_prompts)}
    requests = [
        make_submit(
            name,
            prompt,
            prompt_logprobs=int(name) % 4,
            max_tokens=int(name) % 3,
            temperature=0.0,
            logprobs=1 if int(name) % 2 else None,
        )
        for name, (prompt, _) in prompts.items()
    ]
    others = [
        make_submit(f"{kind} {name}", prompt, prompt_logprobs=None, max_tokens=20, seed=7)
        for name, (prompt, _) in prompts.items()
        for kind in ("before", "behind")
    ]
    core = make_core(make_model_once(backend), CROWDED)
    in_turns = zip(others[::2], requests, others[1::2], strict=True)
    outputs = run(core, [request for some in in_turns for request in some])
    assert core.stats().num_preemptions > 0
    assert core.stats().num_prefix_cache_hits > 0
    core.close()
    for request in requests:
        output = outputs[request.request_id]
        check(scores_of(output), prompts[request.request_id][1])
        assert len(output.token_ids) == request.sampling.max_tokens
        assert output.num_cached_tokens == 0
    alone = make_core(make_model_once(backend), ROOMY)
    for other in others[:3]:
        expected = run(alone, [other])[other.request_id]
        assert outputs[other.request_id].token_ids == expected.token_ids
    alone.close()


def test_slices_of_few_rows_bound_the_logits_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model_once("native")
    prompt, expected = decoded("native", 3, 2)
    sizes: list[int] = []
    logits = Transformer.logits

    def watched(self: Transformer, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return logits(self, hidden, rows)

    monkeypatch.setattr(Transformer, "logits", watched)
    monkeypatch.setattr(prompt_scoring, "_SLICE_BYTES", 7 * 4 * CONFIG.vocab_size + 3)
    core = make_core(model, ROOMY)
    check(scores_of(run(core, [make_submit("x", prompt, prompt_logprobs=2)])["x"]), expected)
    core.close()
    assert max(sizes) == 7
    assert sum(sizes) == len(prompt) - 1


def test_a_step_without_prompts_to_score_takes_no_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("bitwatt.model.runner.score", never)
    monkeypatch.setattr(Scheduler, "_plan_scores", never)
    core = make_core(make_model_once("torch"), ROOMY)
    request = make_submit("x", [1] * 20, prompt_logprobs=None, max_tokens=4, logprobs=1)
    assert len(run(core, [request])["x"].token_ids) == 4
    core.close()


def test_a_prompt_of_one_token_has_no_scores() -> None:
    core = make_core(make_model_once("torch"), ROOMY)
    outputs = run(core, [make_submit("a", [5]), make_submit("b", [5], max_tokens=2)])
    core.close()
    assert all(output.prompt_logprobs is None for output in outputs.values())
    assert outputs["a"].finish_reason is FinishReason.LENGTH
    assert [len(outputs[name].token_ids) for name in "ab"] == [0, 2]


def test_a_prompt_may_be_as_long_as_the_context_where_nothing_is_drawn() -> None:
    core = make_core(make_model_once("torch"), Limits(num_blocks=16))
    prompt = [i % 300 for i in range(CONFIG.max_model_len)]
    output = run(core, [make_submit("x", prompt)])["x"]
    core.close()
    assert len(scores_of(output)) == CONFIG.max_model_len - 1
    assert core.submit(make_submit("y", [*prompt, 1])) is not None


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_of_a_prompt_that_are_not_finite_end_their_request_alone(
    monkeypatch: pytest.MonkeyPatch, value: float, max_tokens: int
) -> None:
    model = make_model_once("torch")
    prompt, expected = decoded("torch", 3, 0)
    hidden_states = Transformer.hidden_states

    def poisoned(self: Transformer, token_ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        hidden = hidden_states(self, token_ids, *rest, **options)
        hidden[token_ids == 319] = value
        return hidden

    monkeypatch.setattr(Transformer, "hidden_states", poisoned)
    core = make_core(model, Limits(max_num_batched_tokens=32))
    good = [token for token in prompt if token != 319]
    outputs = run(
        core,
        [
            make_submit("bad", [1] * 20 + [319] + [1] * 40, max_tokens=max_tokens),
            make_submit("good", good, max_tokens=max_tokens),
        ],
    )
    core.close()
    assert outputs["bad"].finish_reason is FinishReason.ERROR
    assert "prompt are not finite" in (outputs["bad"].error or "")
    assert outputs["bad"].prompt_logprobs is None
    assert outputs["good"].finish_reason is FinishReason.LENGTH
    if good == prompt:
        check(scores_of(outputs["good"]), expected)


@pytest.mark.parametrize("is_launched", [True, False])
@pytest.mark.parametrize("failing", range(6))
def test_a_step_that_fails_costs_those_it_did_not_compute_for_no_score(
    monkeypatch: pytest.MonkeyPatch, failing: int, is_launched: bool
) -> None:
    """The step planned behind it is given up: what it would have scored is scored again."""
    prompts = {str(seed): decoded("torch", seed, seed % 4) for seed in range(3)}
    core = make_core(make_model_once("torch"), Limits(num_blocks=64, max_num_batched_tokens=32))
    fail_step(monkeypatch, failing, is_launched=is_launched)
    requests = [
        make_submit(name, prompt, prompt_logprobs=int(name) % 4, max_tokens=int(name) % 2)
        for name, (prompt, _) in prompts.items()
    ]
    outputs = run(core, requests)
    core.close()
    ended = [name for name, output in outputs.items() if output.error]
    assert 1 <= len(ended) < 3
    for name in outputs.keys() - ended:
        check(scores_of(outputs[name]), prompts[name][1])


@pytest.mark.parametrize("num_steps", range(6))
def test_a_request_that_is_aborted_leaves_no_scores_behind(num_steps: int) -> None:
    scheduler = Scheduler(
        BlockAllocator(64, 16), max_num_seqs=4, max_num_batched_tokens=16, max_model_len=256
    )
    core = EngineCore(scheduler, FakeRunner(320))
    core.submit(make_submit("x", [1] * 50, max_tokens=2))
    for _ in range(num_steps):
        core.step()
    core.abort(["x"])
    while core.has_work:
        assert all(output.request_id != "x" for output in core.step())
    core.check_integrity()
    assert not core._scores


def test_scores_go_over_the_wire_packed() -> None:
    scheduler = Scheduler(
        BlockAllocator(64, 16), max_num_seqs=4, max_num_batched_tokens=16, max_model_len=256
    )
    core = EngineCore(scheduler, FakeRunner(320))
    output = run(core, [make_submit("x", [1] * 101, prompt_logprobs=3)])["x"]
    data = encode(StepOutputs(outputs=[output], stats=core.stats()))
    empty = encode(StepOutputs(outputs=[replace_scores(output)], stats=core.stats()))
    assert len(data) - len(empty) <= 100 * 8 * (1 + 3) + 120
    message = decode_from_engine(data)
    assert isinstance(message, StepOutputs)
    [received] = message.outputs
    assert received == output
    uniform = pytest.approx(-math.log(320))
    assert scores_of(received) == [(uniform, 1, [(i, uniform) for i in range(3)])] * 100


def replace_scores(output: TokenOutput) -> TokenOutput:
    return TokenOutput(
        request_id=output.request_id,
        token_ids=output.token_ids,
        finish_reason=output.finish_reason,
        queue_s=output.queue_s,
        prefill_s=output.prefill_s,
        decode_s=output.decode_s,
    )


def test_parts_of_a_prompt_join_in_their_order() -> None:
    whole = PromptLogprobs(1, bytes(8), b"abcdefgh", bytes(8), b"ijklmnop")
    parts = [
        replace(whole, values=bytes(4), ranks=ranks, top_values=bytes(4), top_token_ids=ids)
        for ranks, ids in ((b"abcd", b"ijkl"), (b"efgh", b"mnop"))
    ]
    assert PromptLogprobs.joined(parts) == whole
    assert len(whole) == 2
