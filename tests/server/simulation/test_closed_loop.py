"""What requests cost each other is found from closed loops, and measured until it is known."""

import random
from dataclasses import replace

import pytest
from bitwatt.simulation import closed_loop
from bitwatt.simulation.callers import Stream
from bitwatt.simulation.closed_loop import (
    ClosedLoop,
    measure_loop,
    pace_of,
    saturation,
    simulate_loop,
    with_loads,
)
from bitwatt.simulation.pace import Paces
from bitwatt.simulation.replica import Replica
from bitwatt.simulation.traffic import Arrival

from tests.server.simulation.factories import make_engine, make_step_times

ENGINE = make_engine(max_num_seqs=16)


def make_lengths(number=80):
    chance = random.Random(3)
    return [(chance.randint(16, 200), chance.randint(4, 40)) for _ in range(number)]


def test_callers_take_turns_and_every_request_is_answered():
    lengths = make_lengths()
    alone = simulate_loop(ENGINE, make_step_times(), 1, lengths)
    together = simulate_loop(ENGINE, make_step_times(), 16, lengths)
    assert alone.lengths == together.lengths == tuple(lengths)
    assert together.requests_per_s > 2 * alone.requests_per_s
    one = simulate_loop(ENGINE, make_step_times(overhead_s=0.01), 1, lengths)
    assert one.seconds - alone.seconds == pytest.approx(80 * 0.01, rel=0.05)


@pytest.mark.anyio
async def test_measured_and_simulated_callers_make_the_same_pauses(monkeypatch):
    """Without any each request would come at the end of a step, and wait for a whole one."""
    lengths = make_lengths()
    alone, pausing = (
        simulate_loop(ENGINE, make_step_times(), 1, lengths, longest_pause_s=pause_s)
        for pause_s in (0.0, 0.03)
    )
    paused_s = pausing.seconds - alone.seconds
    assert paused_s == pytest.approx(79 * 0.015, rel=0.02), "evenly from nothing to the longest"

    pauses, now_s = [], 0.0

    class Answers:
        async def stream(self, _ids, _max_tokens, _salt):
            nonlocal now_s
            now_s += 1.0
            return Stream(now_s - 1.0, (now_s,), 1)

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    monkeypatch.setattr(closed_loop.asyncio, "sleep", sleep)
    loop = await measure_loop(Answers(), 1, lengths, seconds=80.0, longest_pause_s=0.03)
    assert len(loop.lengths) == 80
    assert sum(pauses) == pytest.approx(paused_s)
    assert loop.longest_pause_s == pausing.longest_pause_s == 0.03


@pytest.mark.parametrize(
    ("wait_s", "work_s"), [(0.0, 0.0), (3e-3, 0.0), (11e-3, 2e-3), (0.0, 1e-3)]
)
def test_the_wait_and_the_work_under_load_are_found_from_what_callers_saw(wait_s, work_s):
    times = make_step_times(overhead_s=0.002)
    loops = [
        simulate_loop(ENGINE, times.at_load(wait_s, work_s), callers, make_lengths())
        for callers in (2, 8, 16)
    ]
    found = with_loads(ENGINE, times, loops)
    assert found.busy_wait_s == pytest.approx(wait_s, rel=0.05, abs=3e-4)
    assert found.busy_work_s == pytest.approx(work_s, rel=0.05, abs=1e-4)


def test_the_wait_and_the_work_are_found_on_a_machine_whose_speed_changes():
    times = make_step_times(overhead_s=0.002)
    paces = Paces(50.0, tuple(random.Random(5).choices([0.7, 1.0, 1.8], k=200)))
    loops = []
    for started_s, callers in ((50.0, 2), (58.0, 8), (61.0, 16), (70.0, 4)):
        pace = paces.since(started_s)
        loop = simulate_loop(ENGINE, times.at_load(4e-3, 2e-3), callers, make_lengths(), pace)
        loops.append(replace(loop, started_s=started_s))
    found = with_loads(ENGINE, times, loops, paces)
    assert found.busy_wait_s == pytest.approx(4e-3, rel=0.05)
    assert found.busy_work_s == pytest.approx(2e-3, rel=0.05)
    assert pace_of(ENGINE, found, loops[1], paces) == pytest.approx(1.0, rel=0.01)


def test_loops_that_were_faster_than_their_steps_cost_nothing_more():
    times = make_step_times()
    fast = ClosedLoop(num_callers=4, lengths=tuple(make_lengths(8)), seconds=1e-3, ttft_p50_s=1e-4)
    found = with_loads(ENGINE, times, [fast])
    assert (found.busy_wait_s, found.busy_work_s) == (0.0, 0.0)
    assert with_loads(ENGINE, times, []) is times


def test_a_server_beyond_saturation_has_a_queue_that_grows_and_below_it_has_none():
    times, lengths = make_step_times(overhead_s=0.002).at_load(1e-3, 1e-3), make_lengths()
    most = saturation(ENGINE, times, lengths)
    chance = random.Random(1)
    waiting = []
    for share in (0.7, 1.3):
        replica = Replica(ENGINE, times)
        time_s = 0.0
        for number in range(1500):
            time_s += chance.expovariate(share * most)
            replica.run_until(time_s)
            replica.submit(Arrival(time_s, *lengths[number % len(lengths)]))
        waiting.append(replica.num_waiting)
    assert waiting[0] < 30 < 100 < waiting[1]


def test_a_request_waits_and_holds_a_step_up_while_one_runs_and_a_lone_one_does_not():
    def run(wait_s, work_s):
        replica = Replica(make_engine(), make_step_times().at_load(wait_s, work_s))
        alone = replica.submit(Arrival(0.0, 64, 200))
        replica.run_until(0.05)
        later = replica.submit(Arrival(0.05, 64, 1))
        replica.run_to_end()
        return alone.first_token_s, later.first_token_s, alone.ended_s, replica.busy_s

    # Beside one other it waits a quarter of what it does among many.
    free, waiting, working = run(0.0, 0.0), run(0.08, 0.0), run(0.0, 0.02)
    assert free[0] == waiting[0] == working[0]
    longest_step_s = 0.003  # of a prompt of 64 tokens
    assert waiting[1] - free[1] == pytest.approx(0.02, abs=2 * longest_step_s)
    assert waiting[2:] == pytest.approx(free[2:], rel=0.01)  # nobody else waits
    assert [w - f for w, f in zip(working[1:], free[1:], strict=True)] == pytest.approx([0.02] * 3)
