"""A served model's steps, measured from outside."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
from bitwatt import sizing
from bitwatt.simulation.measure import _in_turns, _Step, measure_server
from bitwatt.simulation.pace import Paces
from bitwatt.simulation.step_times import StepWork
from bitwatt.sizing import PlanSettings, _plan
from bitwatt_client.errors import ClientError
from bitwatt_client.server import Server, new_http_client

from tests.fakes import FakeEngine, make_app, run_server

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("chunk_size", [1, 1000])
async def test_a_decode_whose_answers_came_in_one_piece_is_left_out_and_said(chunk_size):
    """A server that was held up brings them so; it ended the plan in a traceback."""
    told = []
    engine = FakeEngine(chunk_size=chunk_size, delay_s=0.001)
    async with run_server(make_app(engine)) as url, new_http_client(max_connections=8) as http:
        server = Server(http, url, "tiny")
        measured = await measure_server(
            http,
            server,
            max_num_seqs=2,
            max_num_batched_tokens=64,
            lengths=[(8, 8)],
            seconds=2.0,
            report=told.append,
        )
    decodes = [line for line in told if line.startswith("decode ")]
    assert len(decodes) >= 3  # of one and two requests, at a short and a long prompt
    at_once = [line for line in decodes if line.endswith("every answer came at once")]
    assert len(at_once) == (0 if chunk_size == 1 else len(decodes))
    assert measured.name == "tiny"


@pytest.mark.parametrize(("seconds", "num_turns"), [(0.0, 2), (60.0, 12)])
async def test_steps_and_loops_take_turns_until_the_time_is_over(seconds, num_turns, monkeypatch):
    """Measured one after the other, each was of another moment, and of another speed."""
    monkeypatch.setattr("bitwatt.simulation.measure._LEAST_S", 0.0)
    order = []

    async def run(name, run_s):
        order.append(name)
        return run_s

    async def take_loop(number, loop_s):
        assert 0 <= loop_s <= seconds / 2
        return SimpleNamespace(seconds=await run(number, loop_s))

    steps = [
        _Step(name, StepWork.decode(1, 8), partial(run, name, run_s))
        for name, run_s in (("decode", 0.25), ("none", None))
    ]
    loops = await _in_turns(steps, take_loop, [2, 4], seconds)
    assert order == ["decode", "none", 2, 4] * num_turns
    assert len(loops) == 2 * num_turns
    told = []
    decode, none = (step.point(told.append) for step in steps)
    assert (decode.seconds, decode.spread, none) == (0.25, 0.0, None)
    assert told == ["decode: 250.00 ms ±0%", "none: every answer came at once"]


async def test_a_turn_is_the_mean_of_its_runs_and_a_point_the_median_of_its_turns(monkeypatch):
    """A short run is of one moment; a hiccup spoils one turn alone."""
    now_s = 0.0
    runs_s = iter([0.0625, 0.0625, 0.25, 0.125, 0.125, 8.0])

    async def run():
        nonlocal now_s
        now_s += (run_s := next(runs_s))
        return run_s

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    step = _Step("prefill 16", StepWork.prefill(16), run, is_whole_request=True)
    for _ in range(3):
        await step.measure(0.2)
    point = step.point(lambda _line: None)
    assert next(runs_s, None) is None
    assert point.is_whole_request
    assert point.seconds == 0.125
    assert point.spread == (8 - 0.125) / 3 / 0.125


async def test_a_turn_is_taken_at_the_pace_of_its_seconds(monkeypatch):
    """A turn of a slow moment was a slow step; now it is a step like the others."""
    now_s = 0.0
    runs_s = iter([0.25, 0.5, 0.125])

    async def run():
        nonlocal now_s
        now_s += (run_s := next(runs_s))
        return run_s

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    step = _Step("decode 1", StepWork.decode(1, 8), run)
    for began_s in (0.0, 1.0, 2.0):
        now_s = began_s
        await step.measure(0.0)
    paces = Paces(0.0, tuple([1.0] * 5 + [2.0] * 5 + [0.5] * 5))
    point = step.point(lambda _line: None, paces)
    assert (point.seconds, point.spread) == (0.25, 0.0)


def plan_settings(url, folder):
    return PlanSettings(
        url=url,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        prompt_tokens="4-8",
        answer_tokens="4-8",
        measure_seconds=0.5,
        simulated_requests=100,
        validate_seconds=0.1,
        json=folder / "plan.json",
        save_steps=folder / "steps.json",
    )


async def test_a_plan_stands_where_its_replay_fails(tmp_path, capsys, monkeypatch):
    async def refused(*_):
        raise ExceptionGroup("requests", [ClientError("503: the queue is full")])

    monkeypatch.setattr(sizing, "_compared", refused)
    async with run_server(make_app(FakeEngine(delay_s=0.001))) as url:
        assert await _plan(plan_settings(url, tmp_path)) == 1
    assert json.loads((tmp_path / "steps.json").read_text())["models"]
    assert "validation" not in json.loads((tmp_path / "plan.json").read_text())
    said = capsys.readouterr()
    assert "| " in said.out
    assert said.err.endswith("the replay to tiny failed: 503: the queue is full\n")


async def test_a_plan_replays_to_a_server_and_says_how_far_off_it_was(tmp_path, capsys):
    async with run_server(make_app(FakeEngine(delay_s=0.001))) as url:
        settings = plan_settings(url, tmp_path)
        assert await _plan(settings) in (0, 1)  # a busy machine may miss the service level
    document = json.loads((tmp_path / "plan.json").read_text())
    [one] = document["models"]
    replayed = document["validation"][one["name"]]
    rates = [load["requests_per_s"] for load in replayed]
    assert rates == pytest.approx([rates[0] * share for share in (1, 2, 0.85 / 0.3)])
    assert all(load["num_requests"] >= 20 for load in replayed)
    for load in replayed:
        before = [load["requests_per_s"] / one["requests_per_s"] for one in load["replays"]]
        assert len(before) == 6
        assert min(before) > 0
        for name, error in load["errors"].items():
            assert error == pytest.approx(load["predicted"][name] / load["measured"][name] - 1)
    printed = capsys.readouterr().out
    assert "Planned, predicted at the machine's pace / measured:" in printed
    assert printed.count(f"| {one['name']} |") >= 3
