"""Traffic is drawn from distributions or from a log."""

import json
import random
import statistics
from itertools import pairwise

import pytest
from bitwatt.simulation.traffic import (
    PoissonTraffic,
    TrafficError,
    read_lengths,
    read_log,
)


@pytest.mark.parametrize("written", ["0", "9-3", "-1", "lognormal:10", "lognormal:9:3", "x", ""])
def test_lengths_that_make_no_sense_are_refused_with_how_they_are_written(written):
    with pytest.raises(ValueError, match="lognormal:MEDIAN:P95"):
        read_lengths(written)


def test_lengths_are_drawn_as_they_are_written():
    chance = random.Random(0)
    assert {read_lengths("7").draw(chance) for _ in range(9)} == {7}
    assert {read_lengths("3-5").draw(chance) for _ in range(99)} == {3, 4, 5}
    drawn = sorted(read_lengths("lognormal:100:400").draw(chance) for _ in range(20_000))
    assert drawn[10_000] == pytest.approx(100, rel=0.1)
    assert drawn[19_000] == pytest.approx(400, rel=0.1)


def test_poisson_traffic_comes_at_its_rate_and_is_the_same_for_a_seed():
    traffic = PoissonTraffic(read_lengths("10-20"), read_lengths("5"))
    arrivals = traffic.arrivals(50.0, 20_000, seed=3)
    assert arrivals == traffic.arrivals(50.0, 20_000, seed=3)
    assert arrivals[-1].time_s == pytest.approx(400, rel=0.05)
    gaps = [b.time_s - a.time_s for a, b in pairwise(arrivals)]
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)


def write_log(path, num_requests=400):
    lines = [
        {"time_s": 1000 + i // 10, "prompt_tokens": 1 + i % 50, "completion_tokens": 3, "id": i}
        for i in range(num_requests)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.5])
def test_a_log_is_thinned_or_laid_over_itself_to_the_rate_asked_for(tmp_path, factor):
    traffic = read_log(write_log(tmp_path / "log.jsonl"))
    assert traffic.requests_per_s == pytest.approx(10, rel=0.05)
    arrivals = traffic.arrivals(10 * factor, 4000, seed=0)
    times = [one.time_s for one in arrivals]
    assert times == sorted(times)
    assert times[0] >= 0
    assert 4000 / times[-1] == pytest.approx(10 * factor, rel=0.1)
    assert {one.num_tokens for one in arrivals} == {3}


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "[]",
        "{}",
        '{"time_s": "1", "prompt_tokens": 1, "completion_tokens": 1}',
        '{"time_s": NaN, "prompt_tokens": 1, "completion_tokens": 1}',
        '{"time_s": 1, "prompt_tokens": 0, "completion_tokens": 1}',
        '{"time_s": 1, "prompt_tokens": 1, "completion_tokens": true}',
    ],
)
def test_a_log_with_a_wrong_line_is_refused_by_its_number(tmp_path, line):
    path = write_log(tmp_path / "log.jsonl", 2)
    path.write_text(path.read_text().strip() + f"\n{line}\n")
    with pytest.raises(TrafficError, match="line 3"):
        read_log(path)


def test_a_log_without_a_rate_is_refused(tmp_path):
    with pytest.raises(TrafficError, match="has 1 requests"):
        read_log(write_log(tmp_path / "log.jsonl", 1))
    with pytest.raises(TrafficError, match="two at different times"):
        read_log(write_log(tmp_path / "log.jsonl", 5))
    with pytest.raises(TrafficError, match="can't be read"):
        read_log(tmp_path / "none.jsonl")
