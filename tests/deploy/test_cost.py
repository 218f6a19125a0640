"""The cost of a token: one table of cases for every place that works it out.

Recorded series are worked out by Prometheus, windows by the client and by the page, a request by
the server; the figures are by hand. So are those of the comparison's ratios, whatever traffic each
model has.
"""

import json
import shutil
import subprocess
from dataclasses import dataclass

import pytest
from bitwatt.telemetry.prices import Prices
from bitwatt_client.cost import usd_of_rent_per_million_tokens

from tests.deploy.queries import PROMETHEUS, panel_queries
from tests.server.api.node import evaluate


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rates and prices, and what a million output tokens come to; None has no value."""

    tokens_per_s: float
    watts: float | None = None
    usd_per_hour: float | None = None
    usd_per_kwh: float | None = None
    pue: float | None = None
    gco2_per_kwh: float | None = None
    rent: float | None = None
    electricity: float | None = None
    gco2: float | None = None


CASES = {
    # 1000 tokens a second are 3.6 million an hour. 3.6 J a token are 1 kWh a million.
    "round figures": Case(
        tokens_per_s=1000,
        watts=3600,
        usd_per_hour=3.60,
        usd_per_kwh=0.20,
        pue=1.0,
        gco2_per_kwh=400,
        rent=1.0,
        electricity=0.20,
        gco2=400,
    ),
    # 20,000 s for a million are 5.5556 h. 0.455 J a token are 0.12639 kWh, and 30% on top.
    "a small server": Case(
        tokens_per_s=50,
        watts=22.75,
        usd_per_hour=2.50,
        usd_per_kwh=0.15,
        pue=1.3,
        gco2_per_kwh=250,
        rent=13.888888889,
        electricity=0.0246458333,
        gco2=41.0763888889,
    ),
    "a price of zero is a price": Case(
        tokens_per_s=10,
        watts=10,
        usd_per_hour=0,
        usd_per_kwh=0,
        pue=1.0,
        gco2_per_kwh=0,
        rent=0,
        electricity=0,
        gco2=0,
    ),
    "no tokens have no price": Case(
        tokens_per_s=0, watts=50, usd_per_hour=2, usd_per_kwh=0.2, pue=1.2, gco2_per_kwh=300
    ),
    "a price that is not set gives nothing": Case(tokens_per_s=10, watts=10, pue=1.2),
    "energy that is not measured costs nothing that is known": Case(
        tokens_per_s=100,
        usd_per_hour=0.36,
        usd_per_kwh=0.2,
        pue=1.2,
        gco2_per_kwh=300,
        rent=1.0,
    ),
    "without the building's overhead, energy has no price": Case(
        tokens_per_s=100, watts=10, usd_per_kwh=0.2, gco2_per_kwh=300
    ),
}


def test_the_client_works_out_the_rent():
    for name, case in CASES.items():
        rent = usd_of_rent_per_million_tokens(case.usd_per_hour, case.tokens_per_s)
        assert rent == (None if case.rent is None else pytest.approx(case.rent)), name


def test_the_server_works_out_the_electricity_of_a_request():
    for name, case in CASES.items():
        joules = None  # of a million tokens
        if case.watts is not None and case.tokens_per_s:
            joules = case.watts / case.tokens_per_s * 1e6
        usd = Prices(usd_per_kwh=case.usd_per_kwh, pue=case.pue).usd_of_electricity(joules)
        assert usd == (None if case.electricity is None else pytest.approx(case.electricity)), name


@pytest.mark.needs_program("node")
def test_the_page_works_out_the_rent():
    cases = list(CASES.values())
    calls = [
        f"c.usdOfRentPerMillionTokens({json.dumps(case.usd_per_hour)}, {case.tokens_per_s})"
        for case in cases
    ]
    rents = evaluate(calls, c="cost.js")
    assert rents == [None if case.rent is None else pytest.approx(case.rent) for case in cases]


@pytest.mark.needs_program("node")
def test_the_page_works_out_the_electricity():
    cases = list(CASES.values())
    calls = []
    for case in cases:
        prices = {"usd_per_kwh": case.usd_per_kwh, "pue": case.pue}
        is_known = case.watts is not None and case.tokens_per_s
        joules_per_token = case.watts / case.tokens_per_s if is_known else None
        calls.append(
            f"c.usdOfElectricityPerMillionTokens({json.dumps(prices)}, "
            f"{json.dumps(joules_per_token)})"
        )
    costs = evaluate(calls, c="cost.js")
    assert costs == [
        None if case.electricity is None else pytest.approx(case.electricity) for case in cases
    ]


@pytest.mark.needs_program("promtool")
def test_the_recorded_rules_work_out_rent_electricity_and_carbon(tmp_path):
    shutil.copy(PROMETHEUS / "rules.yml", tmp_path)
    tests = [promtool_test(name, case) for name, case in CASES.items()]
    file = tmp_path / "cost_test.json"  # JSON is YAML
    file.write_text(json.dumps({"rule_files": ["rules.yml"], "tests": tests}))
    result = subprocess.run(
        [shutil.which("promtool"), "test", "rules", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.needs_program("promtool")
def test_a_ratio_of_models_is_not_that_of_their_traffic(tmp_path):
    # Ten times the traffic in twice the time is five times as fast, at a fifth of the rent.
    series = {}
    for model, tokens_per_s, busy, watts in (("t", 100, 0.5, 30), ("b", 10, 0.25, 15)):
        labels = f'job="j",instance="i",model_name="{model}",engine="0"'
        series |= {
            f"vllm:generation_tokens_total{{{labels}}}": f"0+{60 * tokens_per_s}x20",
            f"bitwatt_engine_busy_seconds_total{{{labels}}}": f"0+{60 * busy}x20",
            f"bitwatt_price_usd_per_hour{{{labels}}}": "2x20",
            f'bitwatt_energy_joules_total{{{labels},phase="decode"}}': f"0+{60 * watts}x20",
            f'bitwatt_energy_joules_total{{{labels},phase="idle"}}': "0+6000x20",
        }
    expected = {"times": 5, "rent of a token": 0.8, "energy of a token, measured": 0.8}
    expected |= {"saved": 0.8}
    variables = {"$__rate_interval": "5m", "$__range": "10m", "$job": "j", "$instance": "i"}
    checks = []
    for query in panel_queries():
        if query.legend in expected:
            expr = query.expr
            for name, value in (variables | {"$ternary": "t", "$baseline": "b"}).items():
                expr = expr.replace(name, value)
            found = {"labels": "{}", "value": expected.pop(query.legend)}
            checks.append(
                {"expr": f"round({expr}, 1e-6)", "eval_time": "15m", "exp_samples": [found]}
            )
    assert not expected
    test = {
        "interval": "1m",
        "input_series": [{"series": key, "values": value} for key, value in series.items()],
        "promql_expr_test": checks,
    }
    file = tmp_path / "ratios_test.json"
    file.write_text(json.dumps({"rule_files": [], "tests": [test]}))
    result = subprocess.run(
        [shutil.which("promtool"), "test", "rules", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def promtool_test(name, case):
    """Return a test of twenty minutes at the case's rates."""
    labels = 'job="bitwatt",instance="a",model_name="m",engine="0"'
    series = {f"vllm:generation_tokens_total{{{labels}}}": f"0+{60 * case.tokens_per_s}x20"}
    if case.watts is not None:
        energy = f'bitwatt_energy_joules_total{{{labels},source="nvml",phase="decode"}}'
        series[energy] = f"0+{60 * case.watts}x20"
    for metric, price in {
        "bitwatt_price_usd_per_hour": case.usd_per_hour,
        "bitwatt_price_usd_per_kwh": case.usd_per_kwh,
        "bitwatt_pue": case.pue,
        "bitwatt_grid_gco2_per_kwh": case.gco2_per_kwh,
    }.items():
        if price is not None:
            series[f"{metric}{{{labels}}}"] = f"{price}x20"
    expected = {
        "bitwatt:usd_of_rent_per_million_output_tokens:rate5m": case.rent,
        "bitwatt:usd_of_electricity_per_million_output_tokens:rate5m": case.electricity,
        "bitwatt:gco2_per_million_output_tokens:rate5m": case.gco2,
    }
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": key, "values": value} for key, value in series.items()],
        "promql_expr_test": [as_check(record, value) for record, value in expected.items()],
    }


def as_check(record, value):
    """Return an expectation; promtool knows no nearly equal, so the expression says it."""
    if value is None:
        return {"expr": record, "eval_time": "15m", "exp_samples": []}
    found = {"labels": '{job="bitwatt",instance="a",model_name="m"}', "value": 1}
    expr = f"abs({record} - {value}) <= bool {1e-6 * value}"
    return {"expr": expr, "eval_time": "15m", "exp_samples": [found]}
