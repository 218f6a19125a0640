"""A served model's steps, measured from outside."""

import json

import pytest
from bitwatt import sizing
from bitwatt.simulation.measure import measure_server
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
        for name, error in load["errors"].items():
            assert error == pytest.approx(load["predicted"][name] / load["measured"][name] - 1)
    printed = capsys.readouterr().out
    assert "Planned, predicted at the machine's pace / measured:" in printed
    assert printed.count(f"| {one['name']} |") >= 3
