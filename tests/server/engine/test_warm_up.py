"""An engine that was just built is warm, and tells of nothing that made it so."""

import subprocess
import sys

import pytest
from bitwatt import builtin
from bitwatt.engine.build import build_engine
from bitwatt.engine.messages import EngineConfig, EngineStats, Submit
from bitwatt.engine.warm_up import warm_up
from bitwatt.model.fake_runner import FakeRunner
from bitwatt.model.runner import ModelRunner
from bitwatt.model.runner_protocol import StepResultHandle
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.plan import Plan
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler

NOTHING_RAN = EngineStats()
OF_THE_ENGINE = {"num_blocks", "time_s", "rss_anon_bytes"}

FIRST_REQUESTS = """
import sys
from bitwatt import builtin
from bitwatt.engine.build import build_engine
from bitwatt.engine.messages import EngineConfig, Submit
from bitwatt.scheduling.request import ResolvedSampling

config = EngineConfig(model_path=str(builtin.TERNARY), device="cpu", kv_cache_bytes=1 << 24)
core, _ = build_engine(config)
loaded = set(sys.modules)
for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
    sampling = ResolvedSampling(max_tokens=4, temperature=temperature, top_p=0.9, logprobs=1)
    core.submit(Submit(request_id=name, prompt_token_ids=[5] * 20, sampling=sampling))
    while core.has_work:
        core.step()
print(sorted(set(sys.modules) - loaded))
core.close()
"""


def test_the_first_request_of_an_engine_imports_nothing() -> None:
    command = [sys.executable, "-c", FIRST_REQUESTS]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_an_engine_has_run_prompts_and_steps_before_it_is_ready_and_counts_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = ModelRunner.launch
    ran: list[tuple[int, float]] = []

    def noting(runner: ModelRunner, plan: Plan) -> StepResultHandle:
        ran.extend((c.num_tokens, c.request.sampling.temperature) for c in plan.chunks)
        return launch(runner, plan)

    monkeypatch.setattr(ModelRunner, "launch", noting)
    config = EngineConfig(model_path=str(builtin.TERNARY), device="cpu", kv_cache_bytes=1 << 24)
    core, _ = build_engine(config)
    assert {(32, 0.0), (1, 0.0), (1, 1.0)} <= set(ran)
    told = core.stats()
    assert {
        name
        for name in EngineStats.__struct_fields__
        if getattr(told, name) != getattr(NOTHING_RAN, name)
    } <= OF_THE_ENGINE
    core.check_integrity()
    prompt = [i % 4096 for i in range(32)]  # the one that it is warmed up by
    sampling = ResolvedSampling(max_tokens=1, temperature=0.0)
    core.submit(Submit(request_id="first", prompt_token_ids=prompt, sampling=sampling))
    outputs = []
    while core.has_work:
        outputs += core.step()
    assert [output.num_cached_tokens for output in outputs] == [0]
    assert core.stats().num_prefix_cache_hits == 0
    core.close()


@pytest.mark.parametrize(("max_model_len", "num_computed"), [(256, 67), (6, 15), (2, 0)])
def test_a_short_context_is_warmed_up_as_far_as_it_goes(
    max_model_len: int, num_computed: int
) -> None:
    scheduler = Scheduler(
        BlockAllocator(16, 16),
        max_num_seqs=2,
        max_num_batched_tokens=8,
        max_model_len=max_model_len,
    )
    runner = FakeRunner(11)
    warm_up(runner, scheduler)
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert runner.num_computed_tokens == num_computed
