"""Dashboards, rules and alerts: generated from this tree, about metrics that exist."""

import json
import re
from pathlib import Path

import pytest
import yaml
from bitwatt.telemetry.declarations import DECLARATIONS

from deploy.grafana import generate
from deploy.grafana.comparison import COMPARISON
from deploy.grafana.generate import DASHBOARDS
from deploy.grafana.panels import Dashboard
from tests.deploy.queries import (
    DEPLOY,
    PROCESS_SERIES,
    names_in,
    panel_queries,
    rules,
    series_names,
)

QUERIES = panel_queries()
# Grafana's ids of units; a rate of tokens has none of its own.
UNITS = {
    *("none", "short", "percentunit", "bool_yes_no", "s", "reqps", "cps", "ops"),
    *("bytes", "mbytes", "joule", "watt", "massg", "currencyUSD"),
}


def test_the_files_are_what_the_generator_writes():
    assert generate.outdated() == []
    assert generate.main(["--check"]) == 0


def test_an_outdated_file_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(generate, "_FOLDER", tmp_path)
    assert generate.main([]) == 0
    (tmp_path / "bitwatt-capacity.json").write_text("{}")
    (tmp_path / "stray.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        generate.main(["--check"])
    assert ended.value.code == 1
    assert "bitwatt-capacity.json, stray.json" in capsys.readouterr().err


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.id)
def test_a_panel_names_metrics_that_exist(query):
    recorded = {rule["record"] for rule in rules("rules.yml")}
    names = names_in(query.expr)
    assert names
    assert names <= series_names().keys() | recorded | PROCESS_SERIES | {"up"}


@pytest.mark.parametrize("rule", [*rules("rules.yml"), *rules("alerts.yml")], ids=str)
def test_a_rule_names_metrics_that_exist(rule):
    recorded = {other["record"] for other in rules("rules.yml")}
    names = names_in(rule["expr"])
    assert names
    assert names <= series_names().keys() | recorded | {"up"}


def test_a_quantile_is_compared_with_a_bound_of_its_histogram():
    # Between two bounds it is a guess: 1.1 s were more than 2.
    bounds = {metric.name: metric.buckets for metric in DECLARATIONS}
    recorded = {rule["record"]: rule["expr"] for rule in rules("rules.yml")}
    compared = [
        (histogram, float(threshold))
        for rule in rules("alerts.yml")
        for record, threshold in re.findall(r"([\w:]+:p\d+_5m) > ([\d.]+)", rule["expr"])
        for histogram in re.findall(r"([\w:]+)_bucket", recorded[record])
    ]
    assert compared
    assert [found for found in compared if found[1] not in bounds[found[0]]] == []


NOT_SHOWN: dict[str, str] = {
    "vllm:num_requests_waiting_by_reason": "vllm:num_requests_waiting is, and the reason is one",
    "bitwatt_backend_fallback": "bitwatt_model_info has the backend, and an alert tells",
    "vllm:engine_sleep_state": "bitwatt_engine_up is",
    "vllm:prompt_tokens_by_source": "vllm:prefix_cache_hits and vllm:prompt_tokens are",
    "vllm:prompt_tokens_cached": "vllm:prefix_cache_hits is",
    "vllm:prompt_tokens_cached_by_source": "vllm:prefix_cache_hits is",
    "vllm:request_num_preemptions": "vllm:num_preemptions is",
    "vllm:request_prefill_kv_computed_tokens": "vllm:prefix_cache_hits is",
    "vllm:request_max_num_generation_tokens": "vllm:request_generation_tokens is",
}
"""Metrics that no dashboard shows, each with the reason."""


def test_every_metric_is_on_a_dashboard_or_has_a_reason_not_to_be():
    recorded = {rule["record"]: rule["expr"] for rule in rules("rules.yml")}
    by_series = series_names()
    shown = set()
    waiting = [query.expr for query in QUERIES]
    while waiting:
        for name in names_in(waiting.pop()):
            if name in by_series:
                shown.add(by_series[name])
            elif name in recorded:
                waiting.append(recorded[name])
    assert set(by_series.values()) - shown == NOT_SHOWN.keys(), (
        "put it in a panel of deploy/grafana, or in NOT_SHOWN with the reason"
    )


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_panels_say_their_unit_and_use_the_variables(dashboard: Dashboard):
    given = {variable.name for variable in dashboard.variables}
    given |= {"datasource", "__rate_interval", "__range"}
    for panel in dashboard.panels:
        assert panel.unit in UNITS, panel.title
        assert panel.description, panel.title
        for query in panel.queries:
            used = set(re.findall(r"\$(\w+)", query.expr))
            assert used <= given, (panel.title, used)
            if "rate(" in query.expr:
                assert "[$__rate_interval]" in query.expr, panel.title
            if "increase(" in query.expr:
                assert "[$__ra" in query.expr, panel.title
            divisors = [divisor[0] for divisor in query.expr.split(" / ")[1:]]
            assert divisors.count("(") == query.expr.count(" > 0)"), panel.title
            assert all(first == "(" or first.isdigit() for first in divisors), panel.title


def test_savings_may_be_negative():
    savings = [p for d in DASHBOARDS for p in d.panels if "saved" in p.title.lower()]
    assert sum(len(panel.queries) for panel in savings) == 4
    for panel in savings:
        drawn = panel.as_json(1, 0, 0)["fieldConfig"]["defaults"]
        assert "min" not in drawn
        assert drawn["thresholds"]["steps"][0] == {"color": "red", "value": None}
        assert all(
            "clamp" not in query.expr and "abs(" not in query.expr for query in panel.queries
        )


def test_estimated_joules_are_never_mixed_with_measured_ones_or_prices():
    exprs = [query.expr for query in QUERIES] + [rule["expr"] for rule in rules("rules.yml")]
    for expr in exprs:
        names = names_in(expr)
        if any("estimated_arithmetic" in name for name in names):
            assert len(names) == 1
    assert any("estimated_arithmetic" in expr for expr in exprs)


def assert_apart(panels):
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_ids_are_unique_and_panels_do_not_overlap():
    for dashboard in DASHBOARDS:
        panels = dashboard.as_json()["panels"]
        under = [hidden for panel in panels for hidden in panel.get("panels", [])]
        ids = {panel["id"] for panel in [*panels, *under]}
        assert len(ids) == len(panels) + len(under) == len(dashboard.panels) + len(dashboard.rows)
        assert_apart(panels)
        for panel in panels:
            assert panel.get("collapsed", False) is bool(panel.get("panels"))
            assert_apart([panel, *panel.get("panels", [])])


MAY_BE_ABSENT = re.compile(r"joules|watts|price|usd|gco2|pue|shadow|DCGM")
"""In names of metrics without a series where no counter is read, no price set, nothing mirrored."""


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_what_may_not_be_measured_takes_no_room_until_it_is_asked_for(dashboard: Dashboard):
    # On a CPU 14 of 26 panels once said "no data", the home dashboard's first among them.
    for row in dashboard.rows:
        for panel in row.panels:
            if all(MAY_BE_ABSENT.search(query.expr) for query in panel.queries):
                assert row.is_collapsed, panel.title
        if row.is_collapsed:
            assert "where" in row.title or "--" in row.title


def test_a_ratio_of_the_twins_says_of_which_work_it_is():
    ratios = [
        (panel, query)
        for panel in COMPARISON.panels
        for query in panel.queries
        if "$ternary" in query.expr and "$baseline" in query.expr and " / " in query.expr
    ]
    assert len(ratios) == 5 + len(MIRRORED_RATIOS)
    for panel, query in ratios:
        said = panel.title + panel.description
        if panel.title in MIRRORED_RATIOS:
            assert "ame requests" in said or "before the two part" in said
        elif "memory" not in query.legend:
            assert "steps" in said, panel.title
            assert "busy_seconds" in query.expr or 'phase=~"prefill|decode"' in query.expr


MIRRORED_RATIOS = {"Agreement of greedy answers", "Energy a token of mirrored pairs"}


def test_no_datasource_is_hard_coded():
    for file in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        text = json.loads(file.read_text())
        under = [hidden for panel in text["panels"] for hidden in panel.get("panels", [])]
        for panel in [*text["panels"], *under]:
            if panel["type"] != "row":
                assert panel["datasource"]["uid"] == "${datasource}"


def test_grafana_is_provisioned_with_what_the_files_hold():
    folder = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scrape["scrape_interval"]
    [provider] = yaml.safe_load((folder / "dashboards" / "bitwatt.yaml").read_text())["providers"]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    targets = [mount.split(":")[1] for mount in compose["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in targets
    assert Path("/etc/grafana/provisioning").as_posix() in targets
