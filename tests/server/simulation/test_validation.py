"""Replays are compared by what all of their callers saw, those that others disturbed made again."""

import itertools
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pytest
from bitwatt.simulation import other_programs, validation
from bitwatt.simulation.closed_loop import simulate_loop
from bitwatt.simulation.pace import STEADY, Paces
from bitwatt.simulation.traffic import PoissonTraffic, read_lengths
from bitwatt_client.server import Server

from tests.server.simulation.factories import make_engine, make_step_times

pytestmark = pytest.mark.anyio
_STEADY_METER = SimpleNamespace(paces=lambda: STEADY)
TRAFFIC = PoissonTraffic(read_lengths("16-128"), read_lengths("8-24"))


@pytest.fixture
def compare(monkeypatch):
    """Return what compares one rate with a server that does what is simulated, in slower times.

    shares  what other programs take of the processors, a replay at a time
    slower  how much slower the server is, by the same
    paces   and in the closed loops around the replays
    meter   tells how slow the server is besides, at the times when it is asked
    """

    async def run(shares, *, slower=(1.0,), paces=(1.0,), meter=_STEADY_METER):
        coming, slow, pace = iter(shares), itertools.cycle(slower), itertools.cycle(paces)
        replayed = []

        class Others:
            def share(self):
                return 0.0 if is_loop else next(coming)

        is_loop = False
        clock = itertools.count(1000.0, 10.0)
        now = meter.paces() if meter else STEADY

        async def replay(_callers, arrivals):
            nonlocal is_loop
            is_loop = False
            replayed.append([arrival.time_s for arrival in arrivals])
            times, now_s = make_step_times(next(slow)), next(clock)
            pace = now.since(now_s)
            seen = validation._predict(make_engine(), times, arrivals, pace)
            seen.started_s = now_s
            return seen

        async def measure_loop(_callers, num_callers, lengths, *, seconds):
            nonlocal is_loop
            is_loop = True
            assert (num_callers, seconds) == (8, 0.5)
            times, now_s = make_step_times(next(pace)), next(clock)
            loop = simulate_loop(make_engine(), times, num_callers, lengths[:40], now.since(now_s))
            return replace(loop, started_s=now_s)

        monkeypatch.setattr(other_programs, "OtherPrograms", Others)
        monkeypatch.setattr(validation, "_replay", replay)
        monkeypatch.setattr(validation, "measure_loop", measure_loop)
        [one] = await validation.compare_with_server(
            SimpleNamespace(headers={}),
            Server(None, "http://127.0.0.1:1", "tiny"),
            make_engine(),
            make_step_times(),
            TRAFFIC,
            [20.0],
            seconds=12.0,
            meter=meter,
            probe_s=1.0,
        )
        return one, replayed

    return run


async def test_a_server_that_does_what_is_simulated_is_predicted_to_the_letter(compare):
    one, replayed = await compare([0.0, 0.01, 0.05] * 2)
    assert set(one.errors.values()) == {0.0}
    assert one.num_requests == 240
    assert [len(times) for times in replayed] == [40] * 6
    assert len(set(map(tuple, replayed))) == 6, "one turn's chance tells little"
    slower, _ = await compare([0.0] * 6, slower=[2.0])
    assert slower.errors["ttft_p95_s"] < -0.4
    assert all(replay.errors["ttft_p95_s"] < -0.4 for replay in slower.replays)


async def test_a_replay_is_predicted_at_the_pace_of_the_loops_beside_it(compare):
    paces = [2.75, 1.5, 2.0, 2.25, 1.75, 1.25, 1.75, 1.25, 1.75, 0.75]
    one, replayed = await compare([], slower=[2.0, *[1.5] * 4, 1.25], paces=paces, meter=None)
    assert [replay.pace for replay in one.replays] == pytest.approx([2.0, *[1.5] * 4, 1.25])
    assert list(one.errors.values()) == pytest.approx([0.0] * 4, abs=1e-9)
    rates = [20 / fmean(paces[turn : turn + 4]) for turn in range(6)]
    assert [replay.requests_per_s for replay in one.replays] == pytest.approx(rates)
    assert [len(times) for times in replayed] == [max(20, round(2 * rate)) for rate in rates]
    planned = one.as_json()["planned_errors"]
    assert planned["ttft_p95_s"] < -0.3, "what was measured before knows of no slower machine"
    row = validation.comparisons_as_markdown({"tiny": [one]}).splitlines()[-1]
    assert "| 1.25 to 2.00 |" in row
    assert f"| {1e3 * one.planned.ttft_p95_s:.1f}, {1e3 * one.predicted.ttft_p95_s:.1f} / " in row


async def test_what_the_machine_does_within_a_replay_is_predicted(compare):
    """Between the loops a slow second made requests queue that nothing had predicted."""
    values = [1.0, 1.0, 3.0, 1.5] * 250
    meter = SimpleNamespace(paces=lambda: Paces(1000.0, tuple(values)))
    one, _ = await compare([0.0] * 18, meter=meter)
    assert list(one.errors.values()) == pytest.approx([0.0] * 4, abs=1e-9)
    assert all(1.3 < replay.pace < 2.0 for replay in one.replays)
    assert validation._errors(one.planned, one.measured)["ttft_p95_s"] < -0.2
    # What the meter doesn't tell the loops do.
    meter = SimpleNamespace(paces=lambda: Paces(1000.0, (1.5,)))
    one, _ = await compare([0.0] * 6, slower=[2.0], paces=[2.0], meter=meter)
    assert [replay.pace for replay in one.replays] == pytest.approx([3.0] * 6)
    assert list(one.errors.values()) == pytest.approx([0.0] * 4, abs=1e-9)


async def test_a_replay_that_other_programs_disturb_is_made_again_twice_at_most(compare):
    one, replayed = await compare([0.2, 0.0, 0.3, 0.1, 0.2, 0.04, 0.0, 0.0, 0.0])
    assert [replay.others for replay in one.replays] == [0.0, 0.1, 0.04, 0.0, 0.0, 0.0]
    assert [replayed[0], replayed[2], replayed[3]] == [replayed[1], replayed[3], replayed[4]]
    assert len(set(map(tuple, replayed))) == 6
    assert one.as_json()["replays"][1]["others"] == 0.1


async def test_a_replay_at_another_pace_than_its_rate_s_is_made_again_twice_at_most(compare):
    """Near what a server bears one that is a tenth slower is full, whatever the rate says."""
    # The loops': replays are at 1.25, 1.5 and 1.5 of rates made for 1, 1.125 and 1.25, the next at
    # 1.5 of one made for 1.375.
    paces, slower = [*[1.0] * 4, *[1.5] * 9], [1.25, *[1.5] * 8]
    one, replayed = await compare([0.0] * 9, slower=slower, paces=paces)
    assert [replay.pace for replay in one.replays] == pytest.approx([1.5] * 6)
    rates = [20 / pace for pace in [1.25, *[1.5] * 5]]
    assert [replay.requests_per_s for replay in one.replays] == pytest.approx(rates)
    assert len(replayed) == 9
    assert list(one.errors.values()) == pytest.approx([0.0] * 4, abs=1e-9)


async def test_what_others_take_is_unknown_of_a_server_that_is_no_child(compare):
    one, replayed = await compare([], meter=None)
    assert [replay.others for replay in one.replays] == [None] * 6
    assert len(replayed) == 6


async def test_one_replay_that_is_far_off_shows_beside_the_median_of_all(compare):
    one, _ = await compare([0.0] * 6, slower=[1.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    assert one.median_errors == dict.fromkeys(one.errors, 0.0) == one.as_json()["median_errors"]
    assert one.errors["ttft_p95_s"] < -0.1
    row = validation.comparisons_as_markdown({"tiny": [one]}).splitlines()[-1]
    worst = f"{one.replays[1].errors['ttft_p95_s']:+.0%}"
    assert f"({one.errors['ttft_p95_s']:+.0%}; +0%, {worst} to +0%)" in row
