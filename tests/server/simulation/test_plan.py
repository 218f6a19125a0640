"""Machines, dollars, joules and break-even follow from what one machine bears."""

import json
import math

import pytest
from bitwatt.simulation.capacity import Load, ServiceLevel, capacity, percentile, simulate
from bitwatt.simulation.fleet_cost import Machine, Need, break_even, cost_of
from bitwatt.simulation.plan import PlanError, PlannedModel, make_plan, plan_as_markdown
from bitwatt.simulation.step_times import MeasuredModel
from bitwatt.simulation.traffic import PoissonTraffic, read_lengths

from tests.server.simulation.factories import make_engine, make_step_times
from tests.server.test_command import run

LEVEL = ServiceLevel(ttft_s=0.5, tpot_s=0.02)
TRAFFIC = PoissonTraffic(read_lengths("16-128"), read_lengths("8-24"))


def make_load(rate, **changes):
    given = {"ttft_s": 0.1, "tpot_s": 0.01, "tokens_per_s": 10 * rate, "utilization": 0.5}
    return Load(requests_per_s=rate, **(given | changes))


def make_need(rate_each, num_machines, rate):
    return Need(
        at_capacity=make_load(rate_each),
        num_machines=num_machines,
        load=make_load(rate / num_machines),
    )


def planned(factor=1.0, name="ternary", **prices):
    return PlannedModel(
        measured=MeasuredModel(name, make_step_times(factor), watts_reason="no counter"),
        engine=make_engine(),
        machine=Machine(**prices),
    )


def test_a_percentile_is_the_nearest_rank():
    assert percentile([4, 1, 3, 2], 50) == 2
    assert percentile([4, 1, 3, 2], 99) == 4
    assert percentile([], 95) is None


@pytest.mark.parametrize("limit", [0.003, 7.0, 900.0])
def test_capacity_is_the_highest_rate_that_meets_the_level_within_a_hundredth(limit):
    found = capacity(LEVEL, lambda rate: make_load(rate, ttft_s=0.5 * rate / limit))
    assert found is not None
    assert 0.99 * limit <= found.requests_per_s <= limit


def test_there_is_no_capacity_where_a_lone_request_misses_the_level():
    assert capacity(LEVEL, lambda rate: make_load(rate, tpot_s=0.03)) is None


def test_a_queue_that_grows_without_end_is_no_capacity_even_without_a_promise():
    promised_nothing = ServiceLevel(ttft_s=None, tpot_s=None)
    engine, times = make_engine(), make_step_times()
    assert not simulate(engine, times, TRAFFIC, 5000.0).meets(promised_nothing)
    assert simulate(engine, times, TRAFFIC, 5.0).meets(promised_nothing)


def test_costs_are_rent_and_power_over_tokens_and_unknown_without_their_prices():
    need = make_need(10.0, 3, 24.0)
    machine = Machine(
        usd_per_hour=2.0, watts_idle=100, watts_busy=300, usd_per_kwh=0.2, pue=1.5, gco2_per_kwh=400
    )
    cost = cost_of(need, machine)
    assert cost.usd_per_hour == 6.0
    assert cost.usd_per_million_tokens == pytest.approx(6.0 / (240 * 3600) * 1e6)
    assert cost.watts == 600  # each half the time at either
    assert cost.joules_per_token == pytest.approx(2.5)
    assert cost.usd_of_electricity_per_hour == pytest.approx(0.6 * 1.5 * 0.2)
    assert cost.kg_co2_per_hour == pytest.approx(0.6 * 1.5 * 0.4)
    unknown = cost_of(need, Machine(watts_idle=1.0))
    assert {getattr(unknown, name) for name in unknown.__slots__} == {None}


def test_break_even_is_where_the_twin_first_needs_a_machine_more():
    ternary, twin = make_need(30.0, 4, 100.0), make_need(10.0, 10, 100.0)
    even = break_even(ternary, twin, 2.0, 2.0)
    assert even.usd_per_hour == 5.0
    assert even.requests_per_s == 10.0
    assert break_even(ternary, twin, None, None).usd_per_hour is None
    # At half the rent it is cheaper from the first request on; at five times it never is.
    assert break_even(ternary, twin, 1.0, 2.0).requests_per_s == 0.0
    assert break_even(ternary, twin, 10.0, 2.0).requests_per_s is None


def test_a_plan_has_as_many_machines_as_the_rate_takes_and_shows_what_is_saved():
    plan = make_plan(
        [planned(usd_per_hour=1.0), planned(3.0, "twin", usd_per_hour=1.0)],
        TRAFFIC,
        600.0,
        LEVEL,
        num_requests=300,
    )
    ours, theirs = plan.models
    assert ours.need.num_machines == math.ceil(600 / ours.need.at_capacity.requests_per_s)
    assert theirs.need.num_machines > ours.need.num_machines
    told = plan_as_markdown(plan)
    share = 1 - ours.need.num_machines / theirs.need.num_machines
    assert f"Ternary saves {share:.0%} of the twin's dollars." in told
    assert "Joules of twin are unknown: no counter" in told
    json.dumps(plan.as_json())


def test_a_negative_saving_is_shown_as_such():
    prices = {"watts_idle": 50.0, "watts_busy": 100.0, "usd_per_kwh": 0.2, "pue": 1.0}
    prices |= {"usd_per_hour": 1.0, "gco2_per_kwh": 300.0}
    plan = make_plan(
        [planned(3.0, **prices), planned(1.0, "twin", **prices)],
        TRAFFIC,
        600.0,
        LEVEL,
        num_requests=300,
    )
    told = plan_as_markdown(plan)
    ours, theirs = (model.need.num_machines for model in plan.models)
    assert plan.saved["machines"] == plan.saved["usd_per_hour"] == 1 - ours / theirs < 0
    assert f"Ternary takes {ours / theirs - 1:.0%} more dollars than the twin." in told
    for figure, name in (("watts", "joules"), ("kg_co2_per_hour", "CO2e")):
        assert plan.saved[figure] < 0
        assert f"Ternary takes {-plan.saved[figure]:.0%} more {name} than the twin." in told
    assert "Ternary saves" not in told
    assert json.loads(json.dumps(plan.as_json()))["saved"]["usd_per_hour"] < 0


def test_a_level_that_nobody_meets_is_said_with_what_a_lone_request_takes():
    plan = make_plan(
        [planned()], TRAFFIC, 1.0, ServiceLevel(ttft_s=1e-6, tpot_s=None), num_requests=100
    )
    assert plan.models[0].need is None
    assert "No number of machines meets the service level with ternary" in plan_as_markdown(plan)


def test_traffic_that_could_never_run_is_refused():
    long = PoissonTraffic(read_lengths("2000"), read_lengths("8"))
    with pytest.raises(PlanError, match="could never run"):
        make_plan([planned()], long, 1.0, LEVEL, num_requests=100)


def test_the_command_plans_from_a_file_and_writes_json(capsys, tmp_path):
    models = [planned().measured.as_json(), planned(2.0, "twin").measured.as_json()]
    (tmp_path / "steps.json").write_text(json.dumps({"models": models}))
    status, out, err = run(
        capsys,
        *("plan", "--steps", str(tmp_path / "steps.json"), "--requests-per-second", "200"),
        *("--simulated-requests", "300", "--json", str(tmp_path / "plan.json")),
    )
    assert status in (0, None), err
    assert "| machines |" in out
    document = json.loads((tmp_path / "plan.json").read_text())
    assert [model["name"] for model in document["models"]] == ["ternary", "twin"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--steps", "none.json"], "none.json: No such file"),
        (["--answer-tokens", "0"], "lognormal:MEDIAN:P95"),
        (["--steps", "a", "--url", "http://127.0.0.1:1"], "in place of a server"),
        (["--url", "http://127.0.0.1:1"], "bitwatt plan: "),
        (["--max-num-seqs", "600"], "every running request"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_line(capsys, args, told):
    status, _, err = run(capsys, "plan", *args)
    assert status in (1, 2)
    assert told in err
