"""A day of many replicas: arrivals, routers, crashes, and the command."""

import json
from dataclasses import replace

import pytest
from bitwatt.cli import main
from bitwatt.simulation.fleet import DayTraffic, Failures, simulate_fleet
from bitwatt.simulation.routers import PrefixAffine, RoundRobin, TwoChoices, new_routers
from bitwatt.simulation.traffic import Arrival, read_lengths

from tests.server.simulation.factories import make_engine, make_step_times

ENGINE = make_engine(prefix_caching=True, max_num_seqs=8, num_blocks=512)


def make_traffic(**changes):
    given = {
        "requests_per_s": 40.0,
        "day_s": 20.0,
        "swing": 0.6,
        "prompt_tokens": read_lengths("16-32"),
        "answer_tokens": read_lengths("4-12"),
        "num_prefixes": 40,
        "prefix_tokens": 256,
    }
    return DayTraffic(**(given | changes))


def run(router, traffic=None, num_replicas=8, **options):
    return simulate_fleet(
        num_replicas, ENGINE, make_step_times(), traffic or make_traffic(), router, **options
    )


def make_arrival(prefix=1):
    return Arrival(0.0, 20, 4, prefix, 16)


def test_a_day_s_requests_come_in_order_at_the_rate_of_each_hour_and_with_zipf_s_beginnings():
    traffic = make_traffic(requests_per_s=200.0, day_s=100.0)
    arrivals = list(traffic.arrivals(3))
    assert arrivals == list(traffic.arrivals(3))
    times = [arrival.time_s for arrival in arrivals]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < 100
    # Counts of a Poisson process: five of its deviations hold for any seed worth the name.
    assert abs(len(arrivals) - 20_000) < 5 * 20_000**0.5
    noon = sum(45 <= time_s < 55 for time_s in times)
    night = sum(time_s < 5 or time_s >= 95 for time_s in times)
    assert 1.55 < noon / 2000 < 1.65 + 5 / 2000**0.5
    assert 0.35 < night / 2000 < 0.45 + 5 / 2000**0.5
    first, tenth = (sum(a.prefix == rank for a in arrivals) for rank in (1, 10))
    assert 8 < first / tenth < 12.5
    assert all(a.num_prefix_tokens == 256 < a.num_prompt_tokens for a in arrivals)


def test_replicas_crash_as_often_as_was_said_and_in_order():
    failures = Failures(mean_time_between_s=100.0)
    found = failures.times(50, 400.0, 1)
    assert found == sorted(found) == failures.times(50, 400.0, 1)
    assert abs(len(found) - 200) < 5 * 200**0.5
    assert {index for _, index in found} <= set(range(50))
    assert Failures().times(50, 400.0, 1) == []


def test_round_robin_takes_turns_and_passes_over_what_is_down():
    router = RoundRobin(4)
    chosen = [router.choose(make_arrival(), lambda i: None if i == 2 else 9) for _ in range(5)]
    assert chosen == [0, 1, 3, 0, 1]


def test_two_choices_never_take_the_most_loaded_where_another_was_drawn():
    router = TwoChoices(3, seed=1)
    chosen = [router.choose(make_arrival(), lambda i: i) for _ in range(300)]
    # The last is taken where both draws fall on it alone: one time in nine.
    assert chosen.count(0) > chosen.count(1) > chosen.count(2) > 0


def test_prefix_affine_routing_sends_a_beginning_home_and_spills_where_home_is_crowded():
    router = PrefixAffine(10, max_open=4, seed=1)
    homes = {p: router.choose(make_arrival(p), lambda _: 0) for p in range(40)}
    assert homes == {p: router.choose(make_arrival(p), lambda _: 3) for p in range(40)}
    assert len(set(homes.values())) > 5
    for prefix, home in homes.items():
        arrival = make_arrival(prefix)
        ring = [(home + i) % 10 for i in range(4)]
        assert router.choose(arrival, lambda i, h=home: 4 if i == h else 0) == ring[1]
        assert router.choose(arrival, lambda i, h=home: None if i == h else 0) == ring[1]
        spilled = {
            router.choose(arrival, lambda i, ring=ring: 4 if i in ring else 0) for _ in range(60)
        }
        assert len(spilled - set(ring)) > 2


@pytest.mark.parametrize("which", range(3))
def test_no_router_finds_a_replica_where_all_are_down(which):
    router = new_routers(5, max_open=2)[which]
    assert router.choose(make_arrival(), lambda _: None) is None


@pytest.mark.parametrize("which", range(3))
def test_every_request_ends_once_answered_or_lost_crash_or_not(which):
    router = new_routers(8, max_open=4)[which]
    traffic = make_traffic(answer_tokens=read_lengths("100-200"))  # many are open at each crash
    count = len(list(traffic.arrivals(0)))
    found = run(router, traffic, failures=Failures(mean_time_between_s=10.0, repair_s=2.0))
    assert found.day.num_requests == sum(hour.num_requests for hour in found.hours) == count
    assert found.day.num_lost == sum(hour.num_lost for hour in found.hours)
    assert 0 < found.day.num_lost < count
    assert found.num_crashes > 0
    assert 0 < found.utilization < 1


def test_without_crashes_nothing_is_lost():
    found = run(RoundRobin(8))
    assert (found.day.num_lost, found.num_crashes, found.num_unrouted) == (0, 0, 0)


def test_where_all_crash_requests_are_lost_and_counted():
    found = run(
        RoundRobin(2),
        num_replicas=2,
        failures=Failures(mean_time_between_s=0.5, repair_s=1000.0),
    )
    assert found.num_crashes == 2
    assert 0 < found.num_unrouted <= found.day.num_lost


def test_requests_that_share_beginnings_find_them_by_prefix_affine_routing():
    """40 beginnings of 16 blocks don't fit each of 8 caches of 512, and 5 of them do."""
    shares = [run(router).day.cached_share for router in new_routers(8, max_open=6)]
    assert shares[2] > 1.3 * max(shares[:2])
    alone = make_traffic(prefix_tokens=0)
    assert all(run(router, alone).day.cached_share == 0 for router in new_routers(8, max_open=6))


def test_a_lone_replica_is_the_same_whoever_routes():
    found = [
        replace(run(router, make_traffic(requests_per_s=4.0), num_replicas=1), router="")
        for router in new_routers(1, max_open=4)
    ]
    assert found[0] == found[1] == found[2]


@pytest.fixture
def steps(tmp_path):
    points = [
        {"num_decodes": n, "prompts": p, "num_keys": 0} | {"seconds": s, "is_whole_request": 0}
        for n, p, s in ((1, [], 0.002), (0, [512], 0.02))
    ]
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"models": [{"name": "tiny", "steps": points}]}))
    return path


def bitwatt(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bitwatt", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


def test_the_command_prints_a_table_and_writes_a_picture_and_json(
    monkeypatch, tmp_path, steps, capsys
):
    pytest.importorskip("matplotlib")
    png, out = tmp_path / "day.png", tmp_path / "day.json"
    flags = ["--replicas=3", "--day=5", "--watts-idle=10", "--watts-busy=50"]
    assert bitwatt(monkeypatch, "fleet", steps, *flags, f"--png={png}", f"--json={out}") in (
        0,
        None,
    )
    table = capsys.readouterr().out
    assert "| | round robin | two choices | prefix affine |" in table
    assert "unknown" not in table
    assert png.read_bytes().startswith(b"\x89PNG")
    runs = json.loads(out.read_text())
    assert [one["router"] for one in runs] == ["round robin", "two choices", "prefix affine"]
    assert all(one["joules_per_token"] > 0 and len(one["hours"]) == 24 for one in runs)


def test_joules_are_unknown_where_nobody_said_what_a_replica_draws(monkeypatch, steps, capsys):
    assert bitwatt(monkeypatch, "fleet", steps, "--replicas=1", "--day=2") in (0, None)
    assert "| joules per token | unknown | unknown | unknown |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=other"], "no model other"),
        (["--prefix-tokens=2k"], "could never run"),
    ],
)
def test_what_cannot_be_simulated_is_told(monkeypatch, steps, capsys, flags, words):
    assert bitwatt(monkeypatch, "fleet", steps, "--day=5", "--replicas=2", *flags) == 1
    assert words in capsys.readouterr().err
