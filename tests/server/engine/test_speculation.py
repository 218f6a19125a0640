"""Speculation changes no answer: tokens, log-probabilities and ends are those without it.

The models' weights are random, so what they say repeats itself only where they are made to: greedy
ones fall into loops, and a bias makes others draw from a few tokens.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import EngineStats, Submit, TokenOutput
from bitwatt.model.config import weights_named
from bitwatt.model.fake_runner import FakeRunner
from bitwatt.model.transformer import Transformer
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import FinishReason, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler

from tests.extent import TEST_ALL
from tests.server.constraints.tokens import VOCABULARY, written
from tests.server.engine.test_exactness import Limits, make_core, make_model, run_together

pytestmark = pytest.mark.slow

EOS = 0
ONE_OF_THREE = dict.fromkeys((40, 41, 42), 30.0)  # so seldom another that drafts often hold
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.8, "logit_bias": ONE_OF_THREE},
    {"temperature": 0.0, "repetition_penalty": 1.05},
    {"temperature": 0.5, "logit_bias": ONE_OF_THREE, "top_k": 20, "logprobs": 2},
    {"temperature": 0.0, "presence_penalty": 0.2, "frequency_penalty": 0.01, "logprobs": 2},
    {"temperature": 1.0, "top_p": 0.8, "min_p": 0.02, "seed": 5},
    {"temperature": 0.0, "min_tokens": 30, "prompt_logprobs": 0},
    # One after the other, as each is penalized in turn: by what drafts before it would count.
    {"temperature": 0.0, "logit_bias": ONE_OF_THREE, "frequency_penalty": 2.0},
]
GRAMMARS = [
    None,
    written(regex="(ab|abc){8,20}"),
    None,
    written(regex="([a-c]{2}-){5,9}"),
    None,
    written(choice=["abababababababab", "abababab"]),
]


def make_requests(count: int) -> list[Submit]:
    chance = random.Random(0)
    prefixes = [[chance.randrange(320) for _ in range(40)] for _ in range(3)]
    requests = []
    for i in range(count):
        own = [chance.randrange(320) for _ in range(chance.randint(1, 20))]
        prompt = chance.choice(prefixes)[: chance.choice([0, 16, 40])] + own
        sampling = ResolvedSampling(
            **{
                "max_tokens": chance.randint(1, 70),
                "seed": i,
                "stop_token_ids": (EOS, 41) if i % 9 == 0 else (EOS,),
                "grammar": GRAMMARS[i // len(SETTINGS) % len(GRAMMARS)],
                **SETTINGS[i % len(SETTINGS)],
            }
        )
        requests.append(
            Submit(request_id=str(i), prompt_token_ids=prompt * (1 + i % 3), sampling=sampling)
        )
    return requests


def ready(core: EngineCore) -> EngineCore:
    core.learn_tokens(VOCABULARY.for_grammars())
    return core


def run(core: EngineCore, requests: list[Submit]) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        core.submit(request)
    while core.has_work:
        for output in core.step():
            outputs[output.request_id].append(output)
    core.check_integrity()
    return outputs


def answers(outputs: dict[str, list[TokenOutput]]) -> dict[str, object]:
    """What a caller sees of each: tokens, log-probabilities, its end."""
    return {
        name: (
            [token for output in some for token in output.token_ids],
            [entry for output in some for entry in output.logprobs],
            [scores.unpacked() for o in some if (scores := o.prompt_logprobs) is not None],
            some[-1].finish_reason,
            some[-1].error,
        )
        for name, some in outputs.items()
    }


@dataclass(frozen=True)
class Case:
    model: Transformer
    kv_dtype: torch.dtype
    requests: list[Submit]
    truth: dict[str, object]


@pytest.fixture(
    scope="module",
    params=[
        f"native-ternary-bfloat16-{200 if TEST_ALL else 64}",
        f"torch-ternary-bfloat16-{24 if TEST_ALL else 16}",
        f"native-dense-bfloat16-{48 if TEST_ALL else 32}",
        f"native-ternary-int8-{200 if TEST_ALL else 32}",
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    backend, weights, kv_dtype, count = request.param.split("-")
    dtype = getattr(torch, kv_dtype)
    num_threads = 2 if TEST_ALL or dtype == torch.int8 else 1
    model = make_model(backend, weights_named(weights), num_threads=num_threads)
    requests = make_requests(int(count))
    core = ready(make_core(model, Limits(prefix_caching=False, kv_dtype=dtype)))
    truth: dict[str, object] = {}
    for one in requests:
        truth |= answers(run(core, [one]))
    core.close()
    return Case(model, dtype, requests, truth)


def check_drafts(stats: EngineStats) -> None:
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 0
    assert stats.num_running == stats.num_waiting == stats.num_blocks_used == 0


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix-cache", "no-prefix-cache"])
def test_answers_are_those_without_speculation(case: Case, prefix_caching: bool) -> None:
    """Together, through chunked prefill, forced preemption and shared prefixes."""
    limits = Limits(
        num_blocks=40,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        prefix_caching=prefix_caching,
        speculates=True,
        kv_dtype=case.kv_dtype,
    )
    core = ready(make_core(case.model, limits))
    together = answers(run(core, case.requests))
    stats = core.stats()
    core.close()
    assert together == case.truth
    check_drafts(stats)
    assert stats.num_preemptions > 0
    assert (stats.num_prefix_cache_hits > 0) == prefix_caching


def test_requests_that_come_and_go_leave_the_others_their_answers(case: Case) -> None:
    limits = Limits(num_blocks=40, max_num_seqs=8, speculates=True, kv_dtype=case.kv_dtype)
    core = ready(make_core(case.model, limits))
    free = [
        request for request in case.requests if request.sampling.grammar is None
    ]  # taken at once
    tokens, doomed, stats = run_together(core, free, aborts=len(free) // 5)
    core.close()
    for name, got in tokens.items():
        alone, *_ = case.truth[name]
        assert got == (alone[: len(got)] if name in doomed else alone)
    check_drafts(stats)


def test_one_request_alone_takes_fewer_steps_where_it_repeats_itself() -> None:
    model = make_model("torch")
    request = Submit(
        request_id="x",
        prompt_token_ids=[1, 2, 3],
        sampling=ResolvedSampling(max_tokens=120, temperature=0.0, logit_bias={40: 1000.0}),
    )
    stats = {}
    for speculates in (False, True):
        core = make_core(model, Limits(speculates=speculates))
        [outputs] = run(core, [request]).values()
        assert [token for output in outputs for token in output.token_ids] == [40] * 120
        stats[speculates] = core.stats()
        core.close()
    assert stats[False].num_drafts == stats[False].num_draft_tokens == 0
    assert stats[False].num_steps == 120
    assert stats[True].num_steps < 20
    assert stats[True].num_accepted_tokens == stats[True].num_draft_tokens
    assert stats[True].num_steps + stats[True].num_accepted_tokens == 120


def test_a_token_that_cant_be_drawn_behind_drafts_ends_its_request_with_those_before_it() -> None:
    """Repetitions of 30, until a grammar leaves no token: what it asks for ends the answer."""
    model = make_model("torch")
    a = VOCABULARY.token_bytes.index(b"a")
    request = Submit(
        request_id="x",
        prompt_token_ids=[1, 2, 3],
        sampling=ResolvedSampling(
            max_tokens=60,
            temperature=0.0,
            logit_bias={a: 1000.0},
            grammar=written(regex="a{30}b"),
            stop_token_ids=(EOS, VOCABULARY.token_bytes.index(b"b")),
        ),
    )
    ends = []
    for speculates in (False, True):
        core = ready(make_core(model, Limits(speculates=speculates)))
        ends.append(answers(run(core, [request]))["x"])
        stats = core.stats()
        core.close()
    assert ends[0] == ends[1]
    tokens, _, _, reason, error = ends[0]
    assert tokens == [a] * 30
    assert reason is FinishReason.ERROR
    assert "allows none of the model's tokens" in error
    assert stats.num_accepted_tokens > 0


def make_fake_core(*, speculates: bool) -> EngineCore:
    scheduler = Scheduler(
        BlockAllocator(64, 16),
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=256,
        speculates=speculates,
    )
    return EngineCore(scheduler, FakeRunner(2))


def test_stops_and_lengths_end_a_request_at_the_token_they_end_it_at_without_drafts() -> None:
    """Of two tokens, drawn at random: drafts are often half right, and stops stand among them."""
    num_accepted = 0
    for seed in range(60):
        request = Submit(
            request_id="x",
            prompt_token_ids=[0, 1] * 8,
            sampling=ResolvedSampling(
                max_tokens=1 + seed, seed=seed, stop_token_ids=(1,) if seed % 3 == 0 else ()
            ),
        )
        cores = [make_fake_core(speculates=speculates) for speculates in (False, True)]
        alone, drafted = (answers(run(core, [request])) for core in cores)
        assert alone == drafted
        num_accepted += cores[1].stats().num_accepted_tokens
        assert cores[1].stats().num_generation_tokens == cores[0].stats().num_generation_tokens
    assert num_accepted > 0


def test_a_verifying_step_counts_as_decoding_by_the_tokens_it_computed() -> None:
    core = make_fake_core(speculates=True)
    core.submit(
        Submit(
            request_id="x",
            prompt_token_ids=[0, 1] * 20,
            sampling=ResolvedSampling(max_tokens=100, seed=3),
        )
    )
    num_drafted = 0
    while core.has_work:
        num_steps = core.stats().num_steps
        core.step()
        stats = core.stats()
        if stats.num_steps > num_steps and (drafts := stats.step_drafts.get("x")):
            num_drafted += drafts
            assert stats.step_prefill == {}
            assert stats.step_tokens == 1 + drafts
    assert num_drafted == stats.num_draft_tokens > 0


def test_drafts_leave_running_and_waiting_requests_their_tokens() -> None:
    """A step of 8 tokens: three that run, and a prompt that waits behind a full house."""
    scheduler = Scheduler(
        BlockAllocator(64, 16),
        max_num_seqs=4,
        max_num_batched_tokens=8,
        max_model_len=256,
        speculates=True,
    )
    # Drafts pay by the clock, and a busy machine's says of steps without arithmetic what it likes.
    core = EngineCore(scheduler, FakeRunner(2), clock=lambda: 0.0)
    for i in range(8):
        sampling = ResolvedSampling(max_tokens=100, seed=i)
        core.submit(Submit(request_id=str(i), prompt_token_ids=[0, 1] * 10, sampling=sampling))
    while core.has_work:
        core.step()
        assert core.stats().step_tokens <= 8
    core.check_integrity()
    assert core.stats().num_draft_tokens > 0
    assert core.stats().num_generation_tokens == 800
