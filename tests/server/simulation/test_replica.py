"""A simulated server does what the engine's own loop does, at the same moments."""

import random
from dataclasses import dataclass, field

import pytest
from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import Submit
from bitwatt.model.runner_protocol import StepResult
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler
from bitwatt.simulation.pace import steady
from bitwatt.simulation.replica import Replica
from bitwatt.simulation.step_times import StepWork
from bitwatt.simulation.traffic import Arrival

from tests.server.simulation.factories import make_engine, make_step_times


@dataclass
class Clock:
    now_s: float = 0.0


@dataclass
class TimedRunner:
    """Runs each step in as long as it takes, of a clock that stands still otherwise."""

    clock: Clock
    vocab_size: int = 10
    free_s: float = 0.0
    step_times: object = field(default_factory=make_step_times)

    def launch(self, plan):
        seconds = self.step_times.seconds(StepWork.of(plan))
        self.free_s = max(self.clock.now_s, self.free_s) + seconds
        ends_s, clock = self.free_s, self.clock

        class Handle:
            def wait(self):
                clock.now_s = max(clock.now_s, ends_s)
                num_samples = sum(chunk.samples for chunk in plan.chunks)
                return StepResult([0] * num_samples, [None] * num_samples)

        return Handle()

    def close(self):
        pass


def run_core(engine, arrivals):
    """Return when each request's first and last token came, by the engine's own core."""
    clock = Clock()
    blocks = BlockAllocator(engine.num_blocks, 16, prefix_caching=engine.prefix_caching)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=engine.max_model_len,
    )
    core = EngineCore(scheduler, TimedRunner(clock), clock=lambda: clock.now_s)
    coming = list(enumerate(arrivals))
    times = {}
    while coming or core.has_work:
        if not core.has_work:
            clock.now_s = max(clock.now_s, coming[0][1].time_s)
        while coming and coming[0][1].time_s <= clock.now_s:
            number, one = coming.pop(0)
            core.submit(
                Submit(
                    request_id=str(number),
                    prompt_token_ids=[0] * one.num_prompt_tokens,
                    sampling=ResolvedSampling(max_tokens=one.num_tokens),
                )
            )
        for output in core.step():
            times.setdefault(int(output.request_id), []).append(clock.now_s)
    core.check_integrity()
    core.close()
    return [(times[i][0], times[i][-1], len(times[i])) for i in range(len(arrivals))]


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_num_seqs": 4}, {"max_num_batched_tokens": 64}, {"num_blocks": 60}],
    ids=["room", "few rows", "small steps", "preemption"],
)
def test_every_token_comes_when_the_engines_own_loop_brings_it(changes):
    engine = make_engine(**changes)
    chance = random.Random(1)
    time_s, arrivals = 0.0, []
    for _ in range(120):
        time_s += chance.expovariate(80)
        arrivals.append(Arrival(time_s, chance.randint(1, 300), chance.randint(1, 60)))
    replica = Replica(engine, make_step_times())
    served = []
    for arrival in arrivals:
        replica.run_until(arrival.time_s)
        served.append(replica.submit(arrival))
    replica.run_to_end()
    told = [(one.first_token_s, one.ended_s, one.num_tokens) for one in served]
    assert told == [pytest.approx(one) for one in run_core(engine, arrivals)]
    assert replica.num_open == replica.num_waiting == 0


def test_a_request_that_could_never_run_is_refused_and_costs_nothing():
    replica = Replica(make_engine(max_model_len=100, num_blocks=4), make_step_times())
    assert "more than 100" in (replica.submit(Arrival(0.0, 90, 20)).error or "")
    assert "more than 4" in (replica.submit(Arrival(0.0, 60, 20)).error or "")
    replica.run_to_end()
    assert (replica.busy_s, replica.num_open) == (0.0, 0)


def test_what_it_costs_outside_the_engine_is_added_once():
    free = Replica(make_engine(), make_step_times())
    costly = Replica(make_engine(), make_step_times(overhead_s=0.01))
    ends = []
    for replica in (free, costly):
        served = replica.submit(Arrival(1.0, 64, 8))
        replica.run_to_end()
        ends.append(served.ended_s)
    assert ends[1] - ends[0] == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(("num_others", "waited_s"), [(0, 0.0), (1, 0.25), (3, 0.5), (27, 0.9)])
def test_a_request_waits_longer_the_more_others_are_open(num_others, waited_s):
    replica = Replica(make_engine(), make_step_times(1e-6).at_load(1.0, 0.0))
    for _ in range(num_others):
        replica.submit(Arrival(0.0, 16, 2))
    last = replica.submit(Arrival(0.0, 16, 2))
    replica.run_to_end()
    assert last.ttft_s == pytest.approx(waited_s, abs=1e-4)


def test_a_shared_prefix_is_computed_once_where_the_cache_is_on():
    replica = Replica(make_engine(prefix_caching=True), make_step_times())
    first = replica.submit(Arrival(0.0, 200, 4, prefix=7, num_prefix_tokens=160))
    replica.run_to_end()
    again = replica.submit(Arrival(1.0, 200, 4, prefix=7, num_prefix_tokens=160))
    other = replica.submit(Arrival(1.0, 200, 4, prefix=8, num_prefix_tokens=160))
    replica.run_to_end()
    assert [one.num_cached_tokens for one in (first, again, other)] == [0, 160, 0]


def test_a_crash_loses_what_is_open_and_the_replica_serves_again_later():
    replica = Replica(make_engine(), make_step_times())
    lost = replica.submit(Arrival(0.0, 64, 500))
    replica.run_until(0.1)
    assert replica.lose_all("it died", 5.0) == [lost]
    assert lost.error == "it died"
    assert lost.ended_s is None
    later = replica.submit(Arrival(1.0, 64, 4))
    replica.run_to_end()
    assert later.first_token_s > 5.0


def test_a_step_takes_as_many_times_as_long_as_the_pace_when_it_starts():
    """And so do a request's overhead, wait and work when it comes."""

    def run(times, pace=steady):
        replica = Replica(make_engine(), times, pace)
        first = replica.submit(Arrival(0.0, 64, 200))
        replica.run_until(0.05)
        second = replica.submit(Arrival(0.05, 64, 20))
        replica.run_to_end()
        return [first.first_token_s, second.first_token_s, second.ended_s, first.ended_s]

    def times(factor):
        found = make_step_times(factor, overhead_s=0.002 * factor)
        return found.at_load(0.004 * factor, 0.001 * factor)

    usual, slow = run(times(1.0)), run(times(2.0))
    assert run(times(1.0), lambda _time_s: 2.0) == pytest.approx(slow, rel=1e-9)
    later = run(times(1.0), lambda time_s: 1.0 if time_s < 0.045 else 2.0)
    assert later[0] == usual[0]
    waited = [ttft_s - 0.05 for ttft_s in (usual[1], later[1])]
    assert waited[1] == pytest.approx(2 * waited[0], rel=0.15)  # a step ran at 0.05 s
    assert later[3] - usual[3] == pytest.approx(usual[3] - 0.05, rel=0.03)
