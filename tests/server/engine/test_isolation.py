"""One request's trouble stays its own: the rest goes on, token for token, as without it."""

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from bitwatt.engine.core import MAX_FAILED_STEPS, EngineCore
from bitwatt.engine.messages import Submit, TokenOutput
from bitwatt.errors import EngineError
from bitwatt.model.fake_runner import FakeRunner, fake_token
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.runner_protocol import StepResult
from bitwatt.model.transformer import Transformer
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.plan import Plan
from bitwatt.scheduling.request import FinishReason, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler
from bitwatt_kernels.backend import StepLayout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.extent import TEST_ALL
from tests.server.engine.test_exactness import CONFIG, Limits, make_core, make_model

pytestmark = pytest.mark.slow

NUM_STREAMS = 8
STREAM_TOKENS = 12
VOCAB_SIZE = 97


def make_submit(name: str, prompt: list[int], **sampling: Any) -> Submit:
    given: dict[str, Any] = {"max_tokens": 6} | sampling
    return Submit(request_id=name, prompt_token_ids=prompt, sampling=ResolvedSampling(**given))


def make_streams() -> list[Submit]:
    """Seeded requests, one of each kind of sampling."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_k": 20},
        {"top_p": 0.8, "min_p": 0.02},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 2},
        {"repetition_penalty": 1.2},
        {"logit_bias": {7: 2.0}},
        {"temperature": 0.3, "logprobs": 0},
    ]
    return [
        make_submit(f"stream-{i}", [40 + i, 1, 2], max_tokens=STREAM_TOKENS, seed=i, **kinds[i])
        for i in range(NUM_STREAMS)
    ]


def run_all(core: EngineCore, requests: list[Submit]) -> dict[str, list[TokenOutput]]:
    """Run requests together to their ends, by name."""
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        refused = core.submit(request)
        if refused is not None:
            outputs[request.request_id].append(refused)
    while core.has_work:
        for output in core.step():
            outputs[output.request_id].append(output)
    core.check_integrity()
    assert core.stats().num_blocks_used == 0
    for name, its in outputs.items():
        ends = [output.finish_reason for output in its if output.finish_reason is not None]
        assert len(ends) == 1, name
        assert its[-1].finish_reason is ends[0]
        if ends[0] is FinishReason.ERROR:
            assert its[-1].error
            assert not its[-1].token_ids
            assert not its[-1].logprobs
    return outputs


def content(outputs: list[TokenOutput]) -> list[Any]:
    return [(o.token_ids, o.logprobs, o.finish_reason) for o in outputs]


@cache
def live_engine() -> tuple[Transformer, EngineCore, list[list[Any]]]:
    """A small engine, and what its streams bring alone."""
    model = make_model("torch")
    alone = []
    for stream in make_streams():
        core = make_core(model, Limits(prefix_caching=False))
        alone.append(content(run_all(core, [stream])[stream.request_id]))
        core.close()
    return model, make_core(model, Limits(num_blocks=64, max_num_batched_tokens=48)), alone


def check_streams(outputs: dict[str, list[TokenOutput]]) -> None:
    _, _, alone = live_engine()
    assert [content(outputs[s.request_id]) for s in make_streams()] == alone


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1e-39},
        {"repetition_penalty": 1e-39, "temperature": 0.0},
        {"frequency_penalty": 1e308},
        {"logit_bias": {5: 1e308}},
        {"logit_bias": {5: math.nan}, "top_p": 0.5},
        {"logit_bias": {5: math.inf}, "temperature": 0.0},
        {"temperature": 1e-300},
        {"temperature": 1e-300, "top_k": 4, "logprobs": 3},
        {"min_p": 1.5},
        {"top_k": -3},
        {"logit_bias": {5: 10**400}},
        {"presence_penalty": "much"},
        {"min_p": None, "top_k": 3},
    ],
    ids=str,
)
def test_a_row_that_can_not_be_drawn_ends_its_request_alone(sampling: dict[str, Any]) -> None:
    """A legal repetition_penalty of 1e-39 once killed the engine with every stream on it."""
    _, core, _ = live_engine()
    streams = make_streams()
    bad = make_submit("bad", [3, 4, 5], **sampling)
    outputs = run_all(core, [*streams[:4], bad, *streams[4:]])
    check_streams(outputs)
    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_s_logits_that_are_not_finite_end_their_request(
    monkeypatch: pytest.MonkeyPatch, value: float, temperature: float
) -> None:
    model, core, _ = live_engine()
    hidden_states, its_logits = model.hidden_states, model.logits
    positions: list[torch.Tensor] = []

    def watched(
        token_ids: torch.Tensor, layout: StepLayout, *rest: Any, **options: Any
    ) -> torch.Tensor:
        positions[:] = [layout.positions]
        h: torch.Tensor = hidden_states(token_ids, layout, *rest, **options)
        return h

    def poisoned(h: torch.Tensor, logit_tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = its_logits(h, logit_tokens)
        logits[positions[0][logit_tokens] == 0] = value  # prompts of one token
        return logits

    monkeypatch.setattr(model, "hidden_states", watched)
    monkeypatch.setattr(model, "logits", poisoned)
    bad = make_submit("bad", [319], temperature=temperature)
    outputs = run_all(core, [*make_streams(), bad])
    check_streams(outputs)
    assert "not finite" in (outputs["bad"][-1].error or "")


def test_keys_that_are_not_finite_fail_one_request_and_not_the_next_of_its_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, core, _ = live_engine()
    request = make_submit("x", list(range(40)), seed=5)
    expected = content(run_all(make_core(model, Limits()), [request])["x"])
    hidden_states = model.hidden_states

    def poisoned(
        token_ids: torch.Tensor, layout: StepLayout, kv_cache: KVCache, *rest: Any, **options: Any
    ) -> torch.Tensor:
        h: torch.Tensor = hidden_states(token_ids, layout, kv_cache, *rest, **options)
        kv_cache.layers.fill_(math.nan)
        return h.fill_(math.nan)

    with monkeypatch.context() as once:
        once.setattr(model, "hidden_states", poisoned)
        assert "not finite" in (run_all(core, [request])["x"][-1].error or "")
    assert content(run_all(core, [request])["x"]) == expected


@pytest.mark.parametrize(
    ("prompt", "sampling", "told"),
    [
        ([5, 10**6], {}, "prompt has token id 1000000; the model has ids 0 to 319"),
        ([-1], {}, "prompt has token id -1;"),
        ([2**70], {}, f"prompt has token id {2**70};"),
        ([1], {"logit_bias": {320: 1.0}}, "logit_bias has token id 320;"),
        ([1], {"logit_bias": {-1: 1.0}}, "logit_bias has token id -1;"),
    ],
)
def test_a_token_id_the_model_has_not_is_refused_with_the_range(
    prompt: list[int], sampling: dict[str, Any], told: str
) -> None:
    """They once raised in the middle of a step, and left their request behind."""
    _, core, _ = live_engine()
    outputs = run_all(core, [*make_streams(), make_submit("bad", prompt, **sampling)])
    check_streams(outputs)
    [refused] = outputs["bad"]
    assert told in (refused.error or "")


def test_a_stop_token_the_model_has_not_is_never_met() -> None:
    _, core, _ = live_engine()
    request = make_submit("x", [1], min_tokens=3, stop_token_ids=(10**6, -1, 2**70))
    assert run_all(core, [request])["x"][-1].finish_reason is FinishReason.LENGTH


ABSURD = st.sampled_from(
    [0.0, 1e-320, 1e-39, 1e-5, 0.5, 1.0, 2.0, 1e30, 1e308, math.inf, -1.0, -1e308, math.nan]
)
TOKEN_IDS = st.one_of(st.integers(0, 319), st.sampled_from([-1, 320, 2**31, 2**63, 2**70]))
HOSTILE = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 4)},
    optional={
        "temperature": ABSURD,
        "top_k": st.sampled_from([-(2**70), -1, 0, 1, 2, 319, 320, 2**31, 2**70]),
        "top_p": ABSURD,
        "min_p": ABSURD,
        "presence_penalty": ABSURD,
        "frequency_penalty": ABSURD,
        "repetition_penalty": ABSURD,
        "logit_bias": st.dictionaries(TOKEN_IDS, ABSURD, max_size=3),
        "logprobs": st.sampled_from([0, 1, 20]),
        "seed": st.sampled_from([0, -1, 2**63, 2**64, -(2**70)]),
        "stop_token_ids": st.lists(TOKEN_IDS, max_size=3).map(tuple),
        "min_tokens": st.sampled_from([0, 2, 2**70]),
    },
)


@settings(
    max_examples=100 if TEST_ALL else 10,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    hostile=st.lists(
        st.tuples(st.lists(TOKEN_IDS, min_size=1, max_size=20), HOSTILE), min_size=1, max_size=6
    ),
    where=st.integers(0, NUM_STREAMS),
)
def test_streams_beside_absurd_requests_get_the_tokens_they_get_alone(
    hostile: list[tuple[list[int], dict[str, Any]]], where: int
) -> None:
    _, core, _ = live_engine()
    requests: list[Submit] = make_streams()
    requests[where:where] = [
        make_submit(f"hostile-{i}", prompt, **sampling)
        for i, (prompt, sampling) in enumerate(hostile)
    ]
    outputs = run_all(core, requests)
    check_streams(outputs)
    for its in outputs.values():
        assert all(0 <= token < CONFIG.vocab_size for o in its for token in o.token_ids)


class FailingRunner(FakeRunner):
    """Raises in steps that should_fail says, where they are launched or where they end."""

    def __init__(self, should_fail: Callable[[Plan], bool], *, at_launch: bool) -> None:
        super().__init__(VOCAB_SIZE)
        self._should_fail = should_fail
        self._at_launch = at_launch

    def launch(self, plan: Plan) -> Any:
        if not self._should_fail(plan):
            return super().launch(plan)
        if self._at_launch:
            raise RuntimeError("no such block")
        return self

    def wait(self) -> StepResult:
        raise RuntimeError("no such block")


def make_failing_core(should_fail: Callable[[Plan], bool], *, at_launch: bool) -> EngineCore:
    scheduler = Scheduler(
        BlockAllocator(64, 16), max_num_seqs=4, max_num_batched_tokens=32, max_model_len=256
    )
    return EngineCore(scheduler, FailingRunner(should_fail, at_launch=at_launch))


def runs(plan: Plan, name: str) -> bool:
    return any(chunk.request.request_id == name for chunk in plan.chunks)


@pytest.mark.parametrize("at_launch", [True, False])
def test_a_step_that_raises_ends_its_requests_and_the_others_get_their_tokens(
    caplog: pytest.LogCaptureFixture, at_launch: bool
) -> None:
    """Three run, one of them bad; those that wait share its prompt, which no block holds."""
    core = make_failing_core(lambda plan: runs(plan, "bad"), at_launch=at_launch)
    prompts = {"a": [1, 2], "b": [3], "bad": [5] * 40, "c": [5] * 40, "d": [5] * 40}
    requests = [make_submit(name, prompt, seed=3) for name, prompt in prompts.items()]
    outputs = run_all(core, requests)
    ended = {name: its[-1].finish_reason for name, its in outputs.items()}
    assert ended["bad"] is FinishReason.ERROR
    assert "step failed: RuntimeError" in (outputs["bad"][-1].error or "")
    survivors = [name for name, reason in ended.items() if reason is not FinishReason.ERROR]
    assert {"c", "d"} <= set(survivors)
    for name in survivors:
        prompt = prompts[name]
        tokens = [token for output in outputs[name] for token in output.token_ids]
        assert tokens == [fake_token(prompt, 3, len(prompt) + i, VOCAB_SIZE) for i in range(6)]
    assert core.stats().num_prefix_cache_hits <= 2 * 32  # none of what the failed step planned
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "bad (tokens 0 to " in record.getMessage()
    assert "no such block" in str(record.exc_info)


def test_requests_that_came_after_a_step_that_failed_lose_nothing() -> None:
    core = make_failing_core(lambda plan: runs(plan, "bad"), at_launch=False)
    core.submit(make_submit("bad", [5] * 20))
    core.step()
    core.submit(make_submit("good", [5] * 20, seed=9))
    outputs: list[TokenOutput] = []
    while core.has_work:
        outputs += core.step()
    core.check_integrity()
    tokens = [token for o in outputs if o.request_id == "good" for token in o.token_ids]
    assert tokens == [fake_token([5] * 20, 9, 20 + i, VOCAB_SIZE) for i in range(6)]


def test_steps_that_keep_failing_end_the_engine_with_their_reason() -> None:
    core = make_failing_core(lambda _: True, at_launch=False)
    for i in range(MAX_FAILED_STEPS):
        core.submit(make_submit(str(i), [i]))
        if i < MAX_FAILED_STEPS - 1:
            core.step()
            [ended] = core.step()
            assert ended.finish_reason is FinishReason.ERROR
    core.step()
    with pytest.raises(EngineError, match=r"3 steps in a row failed.*no such block"):
        core.step()
    core.check_integrity()
    assert not core.has_work


def test_a_step_that_succeeds_starts_the_count_of_failures_anew() -> None:
    core = make_failing_core(lambda plan: runs(plan, "bad"), at_launch=True)
    for _ in range(2 * MAX_FAILED_STEPS):
        outputs = run_all(core, [make_submit("bad", [5])])
        assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
        assert run_all(core, [make_submit("good", [1])])["good"][-1].error is None
