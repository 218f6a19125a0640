"""What the scheduler itself costs: host time of a decode step, by running requests."""

import gc
import time
from dataclasses import asdict
from typing import Any

from bitwatt.bench.measure import spread_of
from bitwatt.model.fake_runner import FakeRunner
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import Request, ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler

__all__ = ["bench_scheduler"]

_NUM_STEPS = 500
_PROMPT_TOKENS = 100


def bench_scheduler(num_running: int) -> dict[str, Any]:
    """Return microseconds of plan + commit a decode step with num_running requests."""
    scheduler = Scheduler(
        BlockAllocator(num_running * 64, 16),
        max_num_seqs=num_running,
        max_num_batched_tokens=max(2048, num_running),
        max_model_len=1024,
    )
    runner = FakeRunner(32000)
    for i in range(num_running):
        scheduler.add(
            Request(
                request_id=str(i),
                prompt_token_ids=[i] * _PROMPT_TOKENS,
                sampling=ResolvedSampling(max_tokens=900),
            )
        )
    while scheduler.num_running < num_running or scheduler.num_waiting:
        plan = scheduler.plan()
        scheduler.commit(plan, runner.launch(plan).wait().tokens)
    gc.collect()
    gc.freeze()  # as the engine process does
    microseconds = []
    for _ in range(_NUM_STEPS):
        started = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        tokens = runner.launch(plan).wait().tokens
        resumed = time.perf_counter()
        scheduler.commit(plan, tokens)
        ended = time.perf_counter()
        microseconds.append(1e6 * (planned - started + ended - resumed))
    return {"num_running": num_running, "us_per_step": asdict(spread_of(microseconds))}
