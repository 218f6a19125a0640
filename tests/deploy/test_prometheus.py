"""A real Prometheus on the real server: every query of the repository, idle and under load."""

import asyncio
import math
import re
import shutil
import socket
import subprocess
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
import yaml
from bitwatt.api.app import create_app
from bitwatt.cli import models_to_serve
from bitwatt.engine.client import EngineClient
from bitwatt.serving.models import ServedModel
from bitwatt.telemetry.energy.counter import DeviceState, Unavailable
from bitwatt.telemetry.metering import EnergyMeters, EngineObserver
from bitwatt.telemetry.metrics import Metrics
from bitwatt.text.processor import TextProcessor

from deploy.grafana.generate import DASHBOARDS
from tests.deploy.queries import PROMETHEUS, panel_queries, rules
from tests.fakes import FakeEngine, make_info, make_model, make_settings, run_server

pytestmark = [
    pytest.mark.needs_program("prometheus"),
    pytest.mark.needs_program("promtool"),
    pytest.mark.slow,
]

SCRAPE_S = 0.5
VARIABLES = {
    "$__rate_interval": "4s",
    "$job": "bitwatt",
    "$model_name": ".*",
    "$instance": ".*",
    "$ternary": "builtin",
    "$baseline": "builtin-fp16",
}
PRICES = {"usd_per_hour": 2.0, "usd_per_kwh": 0.2, "pue": 1.2, "gco2_per_kwh": 300}
QUERIES = panel_queries()
RULES = [*rules("rules.yml"), *rules("alerts.yml")]
# What must have a value when nothing runs, and under load.
IDLE = {query.expr for query in QUERIES if query.idle == "data"}
LOADED = {query.expr for query in QUERIES if query.idle != "absent"}
LOADED |= {rule["expr"] for rule in rules("rules.yml")}


class Counter:
    """A device that takes 50 W; the counter every machine of the test has."""

    source = "nvml"
    device = "GPU-0"
    poll_s = 0.02

    def read_joules(self):
        return 50.0 * time.monotonic()

    def state(self):
        return DeviceState(
            index=0,
            uuid="GPU-0",
            name="test",
            power_w=50.0,
            energy_mj=int(50_000 * time.monotonic()),
            memory_used_bytes=1 << 30,
        )

    def close(self):
        pass


@dataclass
class Found:
    """What Prometheus answered: values by expression, and its own view of the rules."""

    idle: dict[str, list[float]]
    loaded: dict[str, list[float]]
    unmeasured: list[dict]
    rules: list[dict]
    choices: dict[str, list[str]]


def fill(expr):
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


@asynccontextmanager
async def run_prometheus(folder, targets):
    for file in ("rules.yml", "alerts.yml"):
        shutil.copy(PROMETHEUS / file, folder)
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S * 1000:.0f}ms", "evaluation_interval": "500ms"},
        "rule_files": ["rules.yml", "alerts.yml"],
        "scrape_configs": [{"job_name": "bitwatt", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            async with asyncio.timeout(30):
                while not await has_scraped(client, len(targets)):
                    assert process.returncode is None, (folder / "log").read_text()
                    await asyncio.sleep(0.1)
            yield client
    finally:
        process.terminate()
        await process.wait()


async def has_scraped(client, num_targets):
    try:
        is_ready = (await client.get("/-/ready")).status_code == 200
    except httpx.TransportError:
        return False
    return is_ready and len(await query(client, "up == 1")) == num_targets


async def query(client, expr):
    answer = (await client.post("/api/v1/query", data={"query": fill(expr)})).json()
    assert answer["status"] == "success", (expr, answer)
    return answer["data"]["result"]


async def query_all(client):
    exprs = {query.expr for query in QUERIES} | {rule["expr"] for rule in RULES}
    return {
        expr: [
            value
            for sample in await query(client, expr)
            if not math.isnan(value := float(sample["value"][1]))
        ]
        for expr in exprs
    }


async def query_until_found(client, exprs):
    """Return every query's values once all of exprs have some, or as they are after 30 s."""
    deadline = time.monotonic() + 30
    while True:
        values = await query_all(client)
        if all(values[expr] for expr in exprs) or time.monotonic() > deadline:
            return values
        await asyncio.sleep(SCRAPE_S)


async def rules_when_evaluated(client):
    async with asyncio.timeout(30):
        while True:
            groups = (await client.get("/api/v1/rules")).json()["data"]["groups"]
            found = [rule for group in groups for rule in group["rules"]]
            if all(rule["health"] != "unknown" for rule in found):
                return found
            await asyncio.sleep(SCRAPE_S)


def make_served(metrics, settings):
    meters = EnergyMeters(metrics=metrics, open_counter=lambda *_: Counter())
    served = {}
    for name, path, weights in models_to_serve(settings):
        model_metrics = metrics.model(name)
        model_metrics.set_prices(settings.prices)
        energy = meters.model(name, model_metrics)
        observer = EngineObserver(model_metrics, energy)
        served[name] = ServedModel(
            name=name,
            engine=EngineClient(
                settings.engine_config(path, weights),
                max_queue=settings.max_queue,
                on_ready=observer.on_ready,
                on_step=observer.on_step,
                on_down=observer.on_down,
            ),
            text=TextProcessor.from_folder(path),
            metrics=model_metrics,
            energy=energy,
        )
    return served


async def call(client, model, index):
    body = {"model": model, "prompt": f"{index % 3} def add(a, b):", "max_tokens": 8}
    await client.post("/v1/completions", json=body | {"ignore_eos": True})


async def load(url):
    """Call both models without pause, more at once than they take."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        index = 0
        while True:
            index += 1
            calls = [call(client, model, index) for model in ("builtin", "builtin-fp16")]
            await asyncio.gather(*calls, *(call(client, "builtin", index) for _ in range(8)))
            await asyncio.sleep(0.02)


def choices_of(result, label):
    return sorted({sample["metric"][label] for sample in result})


async def observe(folder):
    settings = make_settings(max_num_seqs=4, max_queue=2, num_threads=1, **PRICES)
    metrics, other_metrics = Metrics(), Metrics()
    served = make_served(metrics, settings)
    other = make_model(FakeEngine(), name="unmeasured", metrics=other_metrics)
    nothing = EnergyMeters(open_counter=lambda *_: Unavailable("no_powercap", "none here"))
    nothing.model("unmeasured", other.metrics).bind(make_info())
    async with (
        run_server(create_app(served, settings, metrics)) as url,
        run_server(create_app({"unmeasured": other}, settings, other_metrics)) as other_url,
    ):
        async with asyncio.timeout(120):
            for model in served.values():
                await model.engine.wait_ready()
        targets = [address.removeprefix("http://") for address in (url, other_url)]
        async with run_prometheus(folder, targets) as client:
            idle = await query_until_found(client, IDLE)
            calls = asyncio.create_task(load(url))
            loaded = await query_until_found(client, LOADED)
            calls.cancel()
            unmeasured = await query(client, '{model_name="unmeasured",__name__=~"bitwatt.*"}')
            evaluated = await rules_when_evaluated(client)
            choices = {
                variable.query: choices_of(await query(client, selector), label)
                for dashboard in DASHBOARDS
                for variable in dashboard.variables
                for selector, label in [
                    re.fullmatch(r"label_values\((.*), (\w+)\)", variable.query).groups()
                ]
            }
    return Found(
        idle=idle,
        loaded=loaded,
        unmeasured=unmeasured,
        rules=evaluated,
        choices=choices,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return asyncio.run(observe(tmp_path_factory.mktemp("prometheus")))


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.id)
def test_a_panel_has_data_under_load_and_says_what_it_has_when_idle(found, query):
    if query.idle == "absent":
        assert found.loaded[query.expr] == [], query.expr
        return
    assert found.loaded[query.expr], query.expr
    if query.idle == "data":
        assert found.idle[query.expr], query.expr
    else:
        assert found.idle[query.expr] == [], query.expr


@pytest.mark.parametrize("rule", rules("rules.yml"), ids=lambda rule: rule["record"])
def test_a_recorded_figure_has_a_value_under_load(found, rule):
    assert found.loaded[rule["expr"]]


def test_prometheus_finds_every_rule_in_good_health(found):
    assert len(found.rules) == len(RULES)
    assert {rule["health"] for rule in found.rules} == {"ok"}
    assert [rule.get("lastError") for rule in found.rules if rule.get("lastError")] == []


def test_variables_offer_what_is_served(found):
    by_label = {query.rsplit(", ")[-1]: names for query, names in found.choices.items()}
    assert by_label["job)"] == ["bitwatt"]
    ternary = [names for query, names in found.choices.items() if 'weights="ternary"' in query]
    dense = [names for query, names in found.choices.items() if 'weights="dense"' in query]
    assert "builtin" in ternary[0]
    assert dense == [["builtin-fp16"]]


def test_a_server_that_cannot_measure_has_no_joules(found):
    values = {
        sample["metric"]["__name__"]: float(sample["value"][1]) for sample in found.unmeasured
    }
    assert values["bitwatt_energy_available"] == 0
    assert not [name for name in values if "joules" in name and "estimated" not in name]


def promtool(*args):
    return subprocess.run(
        [shutil.which("promtool"), *args],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        check=False,
    )


def test_promtool_accepts_the_configuration_and_the_rules():
    for args in (("config", "prometheus.yml"), ("rules", "rules.yml", "alerts.yml")):
        result = promtool("check", *args)
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_rules_and_alerts_pass_their_own_tests():
    result = promtool("test", "rules", "rules_test.yml")
    assert result.returncode == 0, result.stdout + result.stderr
