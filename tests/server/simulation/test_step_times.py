"""Step times are fitted to what was measured, and read from files."""

import json
import math
from dataclasses import replace

import pytest
from bitwatt.simulation.step_times import (
    MeasuredModel,
    StepPoint,
    StepTimes,
    StepTimesError,
    StepWork,
    read_measured,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.server.simulation.factories import make_step_times, step_seconds

WORKS = st.builds(
    StepWork,
    st.integers(1, 512),
    st.lists(st.integers(2, 512), max_size=4).map(tuple),
    st.integers(0, 100_000),
)


TIMES = make_step_times()


@given(work=WORKS)
def test_steps_between_those_measured_take_what_their_cost_says(work):
    assert TIMES.seconds(work) == pytest.approx(step_seconds(work), rel=0.01)


def test_prompts_of_one_step_take_what_each_takes_by_itself():
    """A prompt attends to its own tokens: three of 160 take less than one of 480."""
    squares = [(n, 1e-3 + 1e-5 * n + 1e-7 * n * n) for n in (16, 64, 128, 256, 512)]
    points = [StepPoint(StepWork.prefill(n), seconds, True) for n, seconds in squares]
    times = StepTimes.fit([StepPoint(StepWork.decode(1, 64), 1e-3), *points])
    alone, none = times.seconds(StepWork(1, (160,), 64)), times.seconds(StepWork(1, (), 64))
    three = times.seconds(StepWork(1, (160, 160, 160), 64))
    assert three - none == pytest.approx(3 * (alone - none))
    assert three < 0.8 * times.seconds(StepWork(1, (480,), 64))


def test_what_a_request_costs_outside_the_engine_is_told_apart_from_its_step():
    assert make_step_times(overhead_s=0.002).overhead_s == pytest.approx(0.002, rel=0.02)


@given(
    points=st.lists(
        st.builds(StepPoint, WORKS, st.floats(1e-6, 10), st.booleans()), min_size=1, max_size=8
    ),
    work=WORKS,
    more=st.integers(0, 1000),
    prompt=st.integers(1, 1000),
)
def test_more_tokens_never_take_less_time_whatever_was_measured(points, work, more, prompt):
    times = StepTimes.fit(points)
    larger = replace(
        work, num_decodes=work.num_decodes + more, prompts=(*work.prompts, prompt, 1 + more)
    )
    assert 0 <= times.seconds(work) <= times.seconds(larger) + 1e-12
    assert times.overhead_s >= 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_step_of_no_time_is_refused(seconds):
    with pytest.raises(StepTimesError, match="a step of"):
        StepTimes.fit([StepPoint(StepWork(1, (), 1), seconds)])
    with pytest.raises(StepTimesError, match="no step"):
        StepTimes.fit([])


def test_a_written_model_is_read_as_it_was(tmp_path):
    times = make_step_times(overhead_s=0.001).at_load(0.002, 0.003)
    model = MeasuredModel("tiny", times, 1024, 99, None, "no counter")
    (tmp_path / "steps.json").write_text(json.dumps({"models": [model.as_json()]}))
    [read] = read_measured(tmp_path / "steps.json")
    assert read.as_json() == model.as_json()
    assert (read.step_times.busy_wait_s, read.step_times.busy_work_s) == (0.002, 0.003)
    work = StepWork(3, (33, 200), 999)
    assert read.step_times.seconds(work) == model.step_times.seconds(work)


def test_what_make_bench_prints_gives_both_models(tmp_path):
    def figures(factor):
        def ms(work):
            return {"ms": {"median": 1e3 * step_seconds(work, factor)}}

        return {
            "decode_1": ms(StepWork.decode(1, 128)),
            "decode_8": ms(StepWork.decode(8, 128)),
            "prefill": ms(StepWork.prefill(512)),
        }

    models = {"ternary": figures(1.0), "16-bit": figures(3.0)}
    (tmp_path / "bench.json").write_text(json.dumps({"cpu": {"models": models}}))
    ternary, twin = read_measured(tmp_path / "bench.json")
    assert (ternary.name, twin.name) == ("ternary", "16-bit")
    for model, factor in ((ternary, 1.0), (twin, 3.0)):
        work = StepWork.decode(8, 128)
        assert model.step_times.seconds(work) == pytest.approx(step_seconds(work, factor), rel=1e-3)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"models": [{"name": "x"}]}', '{"models": 3}'])
def test_a_file_of_something_else_is_refused_by_its_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(StepTimesError, match=r"other\.json has no step times"):
        read_measured(path)
    with pytest.raises(StepTimesError, match="No such file"):
        read_measured(tmp_path / "none.json")
