"""What requests cost each other is found from closed loops, and measured until it is known."""

import asyncio
import random

import pytest
from bitwatt.simulation.closed_loop import ClosedLoop, saturation, simulate_loop, with_loads
from bitwatt.simulation.measure import _Clock
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


@pytest.mark.parametrize("prices", [(0.0, 0.0), (3e-3, 0.0), (1e-3, 2e-4)])
def test_prices_of_load_are_found_from_what_callers_saw(prices):
    times = make_step_times(overhead_s=0.002)
    loops = [
        simulate_loop(ENGINE, times.at_load(*prices), callers, make_lengths())
        for callers in (2, 8, 16)
    ]
    found = with_loads(ENGINE, times, loops)
    assert (found.per_request_s, found.per_open_s) == pytest.approx(prices, rel=0.2, abs=2e-5)


def test_loops_that_were_faster_than_their_steps_cost_nothing_more():
    times = make_step_times()
    fast = ClosedLoop(num_callers=4, lengths=tuple(make_lengths(8)), seconds=1e-3, ttft_p50_s=1e-4)
    found = with_loads(ENGINE, times, [fast])
    assert (found.per_request_s, found.per_open_s) == (0.0, 0.0)
    assert with_loads(ENGINE, times, []).per_request_s == 0.0


def test_a_server_beyond_saturation_has_a_queue_that_grows_and_below_it_has_none():
    times, lengths = make_step_times(overhead_s=0.002).at_load(1e-3, 1e-4), make_lengths()
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


def test_a_request_that_comes_delays_the_step_that_runs_and_none_where_none_runs():
    ends = []
    for price in (0.0, 0.005):
        replica = Replica(make_engine(), make_step_times().at_load(price, 0.0))
        first = replica.submit(Arrival(0.0, 64, 30))
        replica.run_until(0.01)
        replica.submit(Arrival(0.01, 64, 1))
        replica.run_to_end()
        ends.append(first.ended_s)
    assert ends[1] - ends[0] == pytest.approx(0.005)


def test_a_measurement_is_repeated_until_its_median_is_known_or_its_time_is_over():
    def settle(values, seconds):
        runs = iter(values)
        taken = []

        async def run():
            taken.append(next(runs))
            return taken[-1]

        median, spread = asyncio.run(_Clock(seconds, 1).settle(run))
        return len(taken), median, spread

    assert settle([2.0] * 20, 60.0) == (3, 2.0, 0.0)
    number, median, spread = settle([1.0, 3.0] * 10, 60.0)
    assert (number, median, spread) == (12, 2.0, 0.5)
    assert settle([1.0, 3.0] * 10, 0.0)[0] == 2
