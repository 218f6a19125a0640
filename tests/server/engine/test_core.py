"""The step loop over a fake model: every request ends once, however it ends."""

import random

from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import Submit, TokenOutput, merged
from bitwatt.model.fake_runner import FakeRunner, fake_token
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import FinishReason, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler

VOCAB_SIZE = 97


def make_core(num_blocks: int = 64, max_num_seqs: int = 8, **limits: int) -> EngineCore:
    scheduler = Scheduler(
        BlockAllocator(num_blocks, 16),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=limits.get("max_num_batched_tokens", 32),
        max_model_len=limits.get("max_model_len", 256),
    )
    return EngineCore(scheduler, FakeRunner(VOCAB_SIZE))


def make_submit(name: str, prompt: list[int], max_tokens: int = 5, seed: int = 0) -> Submit:
    sampling = ResolvedSampling(max_tokens=max_tokens, seed=seed)
    return Submit(request_id=name, prompt_token_ids=prompt, sampling=sampling)


def run(core: EngineCore) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    for _ in range(10_000):
        if not core.has_work:
            return outputs
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the core makes no progress")


def test_every_request_gets_its_own_tokens_and_one_end() -> None:
    core = make_core(num_blocks=20)
    chance = random.Random(0)
    prompts = {str(i): [chance.randrange(VOCAB_SIZE) for _ in range(1 + i * 3)] for i in range(30)}
    for name, prompt in prompts.items():
        assert core.submit(make_submit(name, prompt, 7 + len(prompt) % 5, seed=3)) is None
    outputs = run(core)
    core.check_integrity()
    assert outputs.keys() == prompts.keys()
    for name, prompt in prompts.items():
        tokens = [token for output in outputs[name] for token in output.token_ids]
        positions = range(len(prompt), len(prompt) + 7 + len(prompt) % 5)
        assert tokens == [fake_token(prompt, 3, position, VOCAB_SIZE) for position in positions]
        assert [output.finish_reason for output in outputs[name][:-1]] == [None] * (len(tokens) - 1)
        assert outputs[name][-1].finish_reason is FinishReason.LENGTH


def test_abort_ends_a_request_once_at_any_moment() -> None:
    for num_steps in range(8):
        core = make_core()
        core.submit(make_submit("x", [1] * 50, max_tokens=20))
        for _ in range(num_steps):
            core.step()
        [last] = core.abort(["x", "x", "unknown"])
        assert last.finish_reason is FinishReason.ABORT
        assert "x" not in run(core)
        core.check_integrity()
        assert core.stats().num_blocks_used == 0


def test_request_that_can_never_fit_is_answered_with_the_numbers() -> None:
    core = make_core()
    refused = core.submit(make_submit("x", [1] * 300))
    assert refused is not None
    assert refused.finish_reason is FinishReason.ERROR
    assert "300" in (refused.error or "")
    assert "--max-model-len" in (refused.error or "")
    assert not core.has_work


def test_last_output_splits_the_time_into_waiting_reading_and_writing() -> None:
    now = iter(range(1000))
    scheduler = Scheduler(
        BlockAllocator(8, 16), max_num_seqs=1, max_num_batched_tokens=8, max_model_len=64
    )
    core = EngineCore(scheduler, FakeRunner(VOCAB_SIZE), clock=lambda: float(next(now)))
    core.submit(make_submit("a", [1] * 20, max_tokens=3))
    first, second, last = run(core)["a"]
    assert last.queue_s is not None
    assert last.prefill_s is not None
    assert last.decode_s is not None
    assert min(last.queue_s, last.prefill_s, last.decode_s) > 0
    # The first has what is known by then: who stops reading before the end has no other.
    assert (first.queue_s, first.prefill_s, first.decode_s) == (last.queue_s, last.prefill_s, None)
    assert (second.queue_s, second.prefill_s) == (None, None)
    assert merged([first, second]).queue_s == first.queue_s
    assert merged([first, second]).token_ids == first.token_ids + second.token_ids
    assert merged([first, second, last]).decode_s == last.decode_s


def test_a_prompt_that_is_only_scored_counts_as_one_that_began_to_be_answered() -> None:
    core = make_core()
    scoring = ResolvedSampling(max_tokens=0, prompt_logprobs=0)
    core.submit(Submit(request_id="x", prompt_token_ids=[5] * 33, sampling=scoring))
    [output] = run(core)["x"]
    assert (output.token_ids, output.finish_reason) == ([], FinishReason.LENGTH)
    assert output.queue_s is not None
    stats = core.stats()
    assert stats.num_prompt_tokens == 33
    assert stats.num_generation_tokens == stats.num_prefix_cache_queries == 0
    assert stats.step_tokens == 32


def test_the_fake_backend_gives_log_probabilities_where_they_are_asked_for() -> None:
    core = make_core()
    asked = ResolvedSampling(max_tokens=3, logprobs=2)
    core.submit(Submit(request_id="x", prompt_token_ids=[5], sampling=asked))
    outputs = run(core)["x"]
    assert [len(output.logprobs) for output in outputs] == [1, 1, 1]
    assert [token for token, _ in outputs[0].logprobs[0].top] == [0, 1]


def test_counters_add_up() -> None:
    core = make_core()
    for i in range(4):
        core.submit(make_submit(str(i), [5] * 33, max_tokens=6))
    run(core)
    stats = core.stats()
    assert stats.num_prompt_tokens == 4 * 33
    assert stats.num_generation_tokens == 4 * 6
    assert stats.num_prefix_cache_queries == 4 * 33
    assert stats.num_prefix_cache_hits == 3 * 32
    assert stats.num_running == stats.num_waiting == stats.num_blocks_used == 0


def test_a_prompt_counts_with_its_first_token() -> None:
    scheduler = Scheduler(
        BlockAllocator(8, 16), max_num_seqs=2, max_num_batched_tokens=8, max_model_len=64
    )
    core = EngineCore(scheduler, FakeRunner(VOCAB_SIZE))
    counted = []
    for request_id in ("a", "b"):
        core.submit(make_submit(request_id, [1] * 17, max_tokens=1))
        while core.has_work:
            core.step()
            stats = core.stats()
            figures = stats.num_prompt_tokens, stats.num_cached_prompt_tokens
            if not counted or stats.num_steps > counted[-1][0]:
                counted.append((stats.num_steps, stats.num_generation_tokens, *figures))
    # In three pieces, then in one: 16 tokens of it are in the cache.
    assert [figures for num_steps, *figures in counted if num_steps] == [
        [0, 0, 0],
        [0, 0, 0],
        [1, 17, 0],
        [2, 34, 16],
    ]


def test_stats_tell_whose_prompt_a_step_computed_and_when_it_ended() -> None:
    now = iter(range(1000))
    scheduler = Scheduler(
        BlockAllocator(8, 16), max_num_seqs=2, max_num_batched_tokens=8, max_model_len=64
    )
    core = EngineCore(scheduler, FakeRunner(VOCAB_SIZE), clock=lambda: float(next(now)))
    core.submit(make_submit("a", [1] * 11, max_tokens=3))
    steps = []
    ended_s = 0.0
    while core.has_work:
        core.step()
        stats = core.stats()
        assert stats.time_s > stats.step_ended_s >= ended_s
        ended_s = stats.step_ended_s
        if stats.num_steps > len(steps):
            steps.append((stats.step_prefill, stats.step_tokens))
    assert steps == [({"a": 8}, 8), ({"a": 3}, 3), ({}, 1), ({}, 1)]
