"""Joules are conserved, and shared out close to a truth the test knows."""

import random
from bisect import bisect_right
from collections import defaultdict
from statistics import median

import pytest
from bitwatt.telemetry.energy.attribution import Attributor, Interval, StepWork
from bitwatt.telemetry.energy.token_weights import TokenWeights
from hypothesis import given, settings
from hypothesis import strategies as st

CADENCE_S = 0.1
IDLE_W = 70.0
JOULES_PER_STEP = 2.0
JOULES_PER_PREFILL = 0.010
JOULES_PER_DECODE = 0.060
BUSY_W = 400.0


class Replay:
    """An engine's steps whose energy is known, request by request, and the counter above them."""

    def __init__(self, seed=0, num_requests=60):
        chance = random.Random(seed)
        self.steps = []
        self.true = defaultdict(float)
        self.now_s = 2.0
        open_requests = {}
        arrivals = [
            (chance.randrange(40, 800), chance.randrange(20, 200)) for _ in range(num_requests)
        ]
        while arrivals or open_requests:
            if not open_requests and chance.random() < 0.3:
                self.now_s += chance.random()
            prefill, decode, budget = {}, [], 256
            for name, (prompt, output) in list(open_requests.items()):
                if prompt:
                    prefill[name] = min(prompt, budget)
                    budget -= prefill[name]
                else:
                    decode.append(name)
                    output -= 1
                prompt -= prefill.get(name, 0)
                open_requests[name] = (prompt, output)
                if not output:
                    del open_requests[name]
            prefill = {name: count for name, count in prefill.items() if count}
            if arrivals and len(open_requests) < 24 and chance.random() < 0.2:
                open_requests[f"r{len(arrivals)}"] = arrivals.pop()
            if prefill or decode:
                self._run(prefill, decode)
        self.now_s += 2.0

    def _run(self, prefill, decode):
        num_prefill = sum(prefill.values())
        own = {name: JOULES_PER_PREFILL * count for name, count in prefill.items()}
        own |= dict.fromkeys(decode, JOULES_PER_DECODE)
        joules = (
            JOULES_PER_STEP + JOULES_PER_PREFILL * num_prefill + JOULES_PER_DECODE * len(decode)
        )
        for name in own:
            self.true[name] += own[name] + JOULES_PER_STEP / len(own)
        start_s, self.now_s = self.now_s, self.now_s + joules / BUSY_W
        self.steps.append(
            StepWork(model="m", start_s=start_s, end_s=self.now_s, prefill=prefill, decode=decode)
        )
        self.now_s += 0.0005

    def joules_until(self, moment_s):
        busy_s = sum(max(0.0, min(step.end_s, moment_s) - step.start_s) for step in self.steps)
        return busy_s * BUSY_W + (moment_s - busy_s) * IDLE_W

    def intervals(self):
        """Return what a counter of 100 ms cadence, whose beat is not the steps', gives."""
        num_edges = int(self.now_s / CADENCE_S)
        edges = [0.033 + CADENCE_S * i for i in range(num_edges)]
        values = [self.joules_until(edge) for edge in edges]
        return [
            Interval(edges[i], edges[i + 1], values[i + 1] - values[i])
            for i in range(num_edges - 1)
        ]


def split_all(replay):
    attributor = Attributor()
    ends = [step.end_s for step in replay.steps]
    splits, given = [], 0
    for interval in replay.intervals():
        known = min(bisect_right(ends, interval.end_s) + 1, len(ends))
        for step in replay.steps[given:known]:
            attributor.add_step(step)
        given = known
        splits.append((interval, attributor.split(interval)))
    return splits


def test_every_intervals_joules_are_all_accounted_for():
    for interval, split in split_all(Replay()):
        assert split.total == pytest.approx(interval.joules, rel=1e-12)
        models = sum(split.prefill.values()) + sum(split.decode.values())
        assert sum(split.by_request.values()) == pytest.approx(models, rel=1e-12)
        assert min([split.idle, split.unattributed, *split.by_request.values()]) >= 0


def test_a_replay_gives_each_request_nearly_what_it_took(capsys):
    replay = Replay()
    got = defaultdict(float)
    idle = 0.0
    for _, split in split_all(replay):
        idle += split.idle
        for name, joules in split.by_request.items():
            got[name] += joules
    errors = sorted(abs(got[name] - true) / true for name, true in replay.true.items())
    total = sum(got.values()) / sum(replay.true.values()) - 1
    true_idle = replay.joules_until(replay.now_s) - sum(replay.true.values())
    with capsys.disabled():
        print(
            f"\nattribution over {len(errors)} requests, {len(replay.steps)} steps: "
            f"relative error median {median(errors):.1%}, "
            f"95th percentile {errors[int(0.95 * len(errors))]:.1%}, largest {errors[-1]:.1%}; "
            f"all requests {total:+.2%}, idle {idle / true_idle - 1:+.2%}"
        )
    assert abs(total) < 0.02
    assert median(errors) < 0.10
    assert errors[-1] < 0.30


def test_tokens_of_requests_that_ended_meanwhile_are_unattributed():
    attributor = Attributor()
    attributor.add_step(
        StepWork(model="m", start_s=0, end_s=1, prefill={}, decode=["a", "b", "c"], num_lost=1)
    )
    split = attributor.split(Interval(0, 1, 8.0))
    assert split.by_request == {"a": 2, "b": 2, "c": 2}
    assert split.unattributed == 2
    assert split.idle == 0


def test_an_idle_device_spends_for_nobody():
    attributor = Attributor()
    split = attributor.split(Interval(0, 1, 70.0))
    assert (split.idle, split.unattributed) == (70, 0)
    assert attributor.idle_watts == 70


def test_a_device_whose_engine_is_down_is_not_called_idle():
    attributor = Attributor()
    split = attributor.split(Interval(0, 1, 200.0), is_up=False)
    assert (split.idle, split.unattributed) == (0, 200)
    assert attributor.idle_watts is None


def test_the_idle_share_of_a_mixed_interval_is_taken_at_the_idle_power_seen_before():
    attributor = Attributor()
    attributor.split(Interval(0, 1, 50.0))
    attributor.add_step(StepWork(model="m", start_s=1, end_s=1.5, prefill={}, decode=["a"]))
    split = attributor.split(Interval(1, 2, 225.0))
    assert split.idle == 25
    assert split.by_request == {"a": 200}


def test_two_engines_on_a_device_share_by_the_time_their_steps_took():
    attributor = Attributor()
    attributor.add_step(StepWork(model="m", start_s=0, end_s=3, prefill={}, decode=["a"]))
    attributor.add_step(StepWork(model="n", start_s=2, end_s=3, prefill={"b": 5}, decode=[]))
    split = attributor.split(Interval(0, 4, 40.0))
    assert split.idle == 10
    assert split.by_request == {"a": 22.5, "b": 7.5}
    assert (split.decode["m"], split.prefill["n"]) == (22.5, 7.5)


def test_steps_not_measured_yet_are_estimated_at_the_last_busy_power():
    attributor = Attributor()
    attributor.add_step(StepWork(model="m", start_s=0, end_s=1, prefill={}, decode=["a"]))
    assert attributor.unsettled_joules("a") is None
    attributor.split(Interval(0, 1, 100.0))
    assert attributor.unsettled_joules("a") == 0
    attributor.add_step(StepWork(model="m", start_s=1, end_s=1.5, prefill={}, decode=["a", "b"]))
    assert attributor.unsettled_joules("a") == 25
    assert attributor.unsettled_joules("b") == 25
    assert attributor.unsettled_joules("c") == 0


def test_a_counter_that_fell_silent_is_not_extrapolated_and_collects_no_steps():
    attributor = Attributor()
    attributor.add_step(StepWork(model="m", start_s=0, end_s=1, prefill={}, decode=["a"]))
    attributor.split(Interval(0, 1, 100.0))
    for second in range(1, 1000):
        attributor.add_step(
            StepWork(model="m", start_s=second, end_s=second + 1, prefill={}, decode=["a"])
        )
        assert (attributor.unsettled_joules("a") is None) == (second > 5)
    assert len(attributor._steps) <= 121


steps = st.builds(
    lambda model, start, length, prefill, decode, lost: StepWork(
        model=model,
        start_s=start,
        end_s=start + length,
        prefill=prefill,
        decode=decode,
        num_lost=lost,
    ),
    st.sampled_from(["m", "n"]),
    st.floats(0, 5),
    st.floats(0.001, 3),
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 500), max_size=3),
    st.lists(st.sampled_from("efgh"), unique=True),
    st.integers(0, 3),
)


def test_steps_whose_sum_rounds_up_leave_no_time_below_nothing():
    # 0.12 and 0.84 s are more than 0.3 to 1.26 s by an ulp, and idle got -1e-16 joules.
    attributor = Attributor()
    for start_s, end_s in ((0, 0.42), (0.42, 3)):
        attributor.add_step(
            StepWork(model="m", start_s=start_s, end_s=end_s, prefill={}, decode=["a"])
        )
    split = attributor.split(Interval(0.3, 0.3 + 0.96, 1.0))
    assert split.idle == 0
    assert split.by_request["a"] == pytest.approx(1.0)


@settings(deadline=None)
@given(
    st.lists(steps, max_size=8),
    st.lists(st.tuples(st.floats(0.05, 1), st.floats(0, 500), st.booleans()), max_size=8),
)
def test_joules_are_conserved_whatever_the_steps_and_the_counter(all_steps, intervals):
    attributor = Attributor()
    for step in all_steps:
        attributor.add_step(step)
    now = 0.0
    for length, joules, is_up in intervals:
        split = attributor.split(Interval(now, now + length, joules), is_up=is_up)
        now += length
        assert split.total == pytest.approx(joules, rel=1e-9, abs=1e-9)
        assert min([split.idle, split.unattributed, *split.by_request.values()]) >= 0


def test_weights_are_the_seconds_of_each_kind_of_token():
    weights = TokenWeights()
    chance = random.Random(1)
    for _ in range(200):
        num_prefill, num_decode = chance.randrange(200), chance.randrange(32)
        weights.observe(num_prefill, num_decode, 0.001 * num_prefill + 0.004 * num_decode)
    assert weights.prefill == pytest.approx(0.001)
    assert weights.decode == pytest.approx(0.004)


def test_until_both_kinds_are_seen_apart_a_token_weighs_as_much_as_another():
    weights = TokenWeights()
    for _ in range(10):
        weights.observe(0, 8, 0.02)
        weights.observe(0, 0, 0.02)
    assert weights.prefill == weights.decode


def test_no_weight_is_negative():
    weights = TokenWeights()
    for num_prefill, num_decode, seconds in [(10, 1, 0.1), (1, 10, 10.0), (100, 10, 5.0)] * 5:
        weights.observe(num_prefill, num_decode, seconds)
        assert min(weights.prefill, weights.decode) >= 0
        assert max(weights.prefill, weights.decode) > 0
