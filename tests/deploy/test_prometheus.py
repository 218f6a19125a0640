"""A real Prometheus on the real server: every query of the repository, idle and under load.

And those of vLLM's own dashboards; and the twins' ratio beside what the page makes of the same
requests.
"""

import asyncio
import math
import os
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
from bitwatt.application import models_to_serve
from bitwatt.engine.client import EngineClient
from bitwatt.engine.messages import EngineStats
from bitwatt.serving.models import ServedModel
from bitwatt.telemetry.energy.counter import DeviceState, Unavailable
from bitwatt.telemetry.metering import EnergyMeters, EngineObserver
from bitwatt.telemetry.metrics import Metrics
from bitwatt.text.processor import TextProcessor

from deploy.grafana.comparison import COMPARISON
from deploy.grafana.generate import DASHBOARDS
from tests.deploy.queries import PROMETHEUS, panel_queries, rules
from tests.extent import TEST_ALL
from tests.fakes import FakeEngine, make_info, make_model, make_settings, run_server
from tests.server.api.node import evaluate

pytestmark = [
    pytest.mark.needs_program("prometheus"),
    pytest.mark.needs_program("promtool"),
    pytest.mark.slow(50),
]

SCRAPE_S = 0.5
VARIABLES = {
    "$__rate_interval": "4s",
    "$__range": "30s",
    "$job": "bitwatt",
    "$model_name": ".*",
    "$instance": ".*",
    "$ternary": "builtin",
    "$baseline": "builtin-twin",
}
PRICES = {"usd_per_hour": 2.0, "usd_per_kwh": 0.2, "pue": 1.2, "gco2_per_kwh": 300}
QUERIES = panel_queries()
RULES = [*rules("rules.yml"), *rules("alerts.yml")]
# What must have a value when nothing runs, and under load.
IDLE = {query.expr for query in QUERIES if query.idle == "data"}
LOADED = {query.expr for query in QUERIES if query.idle != "absent"}
LOADED |= {rule["expr"] for rule in rules("rules.yml")}
HOME = COMPARISON.rows[0]
SPEED = next(query.expr for query in QUERIES if query.legend == "times")
NUM_TURNS = 4 if TEST_ALL else 2
NUM_TOKENS = 384
NUM_REQUESTS = {"builtin": 3, "builtin-twin": 1}  # in a turn: uneven traffic

# What vLLM's dashboards ask for, by the labels they choose by: overview, service status,
# instances, KV cache, query and performance statistics, and the one beside its Prometheus.
_MODEL = 'job="bitwatt",instance!="",model_name="builtin",engine="0"'
_TARGET = 'job="bitwatt",instance!=""'
VLLM = [
    *(
        f"{name}{{{_MODEL}}}"
        for name in (
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "vllm:num_preemptions_total",
            "vllm:prompt_tokens_total",
            "vllm:prompt_tokens_cached_total",
            "vllm:generation_tokens_total",
            "vllm:prefix_cache_hits_total",
            "vllm:prefix_cache_queries_total",
            "vllm:request_success_total",
            "vllm:cache_config_info",
            *(
                f"vllm:{histogram}_{series}"
                for histogram in (
                    "time_to_first_token_seconds",
                    "inter_token_latency_seconds",
                    "request_time_per_output_token_seconds",
                    "e2e_request_latency_seconds",
                    "request_queue_time_seconds",
                    "request_prefill_time_seconds",
                    "request_decode_time_seconds",
                    "iteration_tokens_total",
                    "request_prompt_tokens",
                    "request_generation_tokens",
                    "request_prefill_kv_computed_tokens",
                    "request_max_num_generation_tokens",
                )
                for series in ("bucket", "sum", "count")
            ),
        )
    ),
    *(
        f'vllm:request_success_total{{{_MODEL},finished_reason="{reason}"}}'
        for reason in ("stop", "length", "abort", "error")
    ),
    *(
        f'vllm:num_requests_waiting_by_reason{{{_MODEL},reason="{reason}"}}'
        for reason in ("capacity", "deferred")
    ),
    *(
        f'vllm:prompt_tokens_by_source_total{{{_MODEL},source="{source}"}}'
        for source in ("local_compute", "local_cache_hit")
    ),
    f'vllm:prompt_tokens_cached_by_source_total{{{_MODEL},source="device"}}',
    f'vllm:engine_sleep_state{{{_MODEL},sleep_state="awake"}} == 1',
    f'vllm:engine_sleep_state{{{_MODEL},sleep_state="discard_all"}} == 0',
    *(
        f'vllm:{histogram}_seconds_bucket{{{_MODEL},le="{bound}"}}'  # what may be chosen there
        for histogram, bounds in {
            "time_to_first_token": ("0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0"),
            "request_time_per_output_token": ("0.01", "0.025", "0.05", "0.1", "0.2"),
        }.items()
        for bound in bounds
    ),
    *(
        f'http_requests_total{{{_TARGET},handler="/v1/completions",status="{status}"}}'
        for status in ("2xx", "5xx")
    ),
    f'http_request_duration_seconds_sum{{{_TARGET},handler="/v1/completions"}}',
    f'http_request_duration_seconds_count{{{_TARGET},handler="/v1/completions"}}',
    *(
        f"process_{name}{{{_TARGET}}}"
        for name in (
            "cpu_seconds_total",
            "resident_memory_bytes",
            "open_fds",
            "max_fds",
            "start_time_seconds",
        )
    ),
]


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
    vllm: dict[str, int]
    home: dict[str, int]
    rates: dict[str, float]
    speed: float


def fill(expr, **changes):
    for name, value in (VARIABLES | {f"${name}": value for name, value in changes.items()}).items():
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
    # Go's runtime: one core of those that other tests use too, and memory rather than collections.
    frugal = {"GOMAXPROCS": "1", "GOGC": "400"}
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=log, stderr=log, env=os.environ | frugal
        )
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


async def query(client, expr, **variables):
    body = {"query": fill(expr, **variables)}
    answer = (await client.post("/api/v1/query", data=body)).json()
    assert answer["status"] == "success", (expr, answer)
    return answer["data"]["result"]


async def values_of(client, expr):
    """Return what the expression has values of, without NaN."""
    found = [float(sample["value"][1]) for sample in await query(client, expr)]
    return [value for value in found if not math.isnan(value)]


async def query_until_found(client, *groups):
    """Return every query's values, each once it has some, or as they are after 30 s.

    groups  of expressions that must have values; one is asked when the one before has them
    """
    deadline = time.monotonic() + 30
    values = {}
    for group in groups:
        missing = sorted(group)
        while True:
            values |= {expr: await values_of(client, expr) for expr in missing}
            missing = [expr for expr in missing if not values[expr]]
            if not missing or time.monotonic() > deadline:
                break
            await asyncio.sleep(SCRAPE_S)
    others = {query.expr for query in QUERIES} | {rule["expr"] for rule in RULES}
    return values | {expr: await values_of(client, expr) for expr in others - values.keys()}


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
    for name, path, weights, *_ in models_to_serve(settings):
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
                on_restart=observer.on_restart,
            ),
            text=TextProcessor.from_folder(path),
            metrics=model_metrics,
            energy=energy,
        )
    return served


async def call(client, model, index):
    body = {"model": model, "prompt": f"{index % 3} def add(a, b):", "max_tokens": 8}
    await client.post("/v1/completions", json=body | {"ignore_eos": True})


async def repeat(client, model):
    """Ask for an answer that says its prompt again: what is drafted there."""
    body = {"model": model, "prompt": [300, 400, 500] * 8, "max_tokens": 8, "temperature": 0}
    await client.post("/v1/completions", json=body | {"logit_bias": {300: 100}})


async def load(url):
    """Call both models again and again, more at once than they take."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        index = 0
        while True:
            index += 1
            models = ("builtin", "builtin-twin")
            calls = [ask for m in models for ask in (call(client, m, index), repeat(client, m))]
            await asyncio.gather(*calls, *(call(client, "builtin", index) for _ in range(8)))
            await asyncio.sleep(SCRAPE_S)


async def run_window(url):
    """Run a window of the page's for each model, one request at a time; return tokens a second.

    The models take turns, so that what else the machine does slows both.
    """
    took_s = dict.fromkeys(NUM_REQUESTS, 0.0)
    body = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for turn in range(NUM_TURNS):
            for model, num_requests in NUM_REQUESTS.items():
                asked = body | {"model": model, "prompt": f"{turn} def add(a, b):"}
                began_s = time.perf_counter()
                for _ in range(num_requests):
                    (await client.post("/v1/completions", json=asked)).raise_for_status()
                took_s[model] += time.perf_counter() - began_s
    return {
        model: NUM_TURNS * num_requests * NUM_TOKENS / took_s[model]
        for model, num_requests in NUM_REQUESTS.items()
    }


async def settle(client):
    """Wait until Prometheus has every counter as it is while nothing runs."""
    idle = "max_over_time(sum(vllm:num_requests_running)[3s:500ms]) == 0"
    async with asyncio.timeout(60):
        while True:
            if await query(client, idle):
                return
            await asyncio.sleep(SCRAPE_S)


def move(metrics, num_steps):
    """Have a model's engine say that it ran so many steps, of a token and a millisecond each."""
    metrics.on_stats(
        EngineStats(num_steps=num_steps, busy_s=num_steps / 1000, num_generation_tokens=num_steps)
    )


def choices_of(result, label):
    return sorted({sample["metric"][label] for sample in result})


async def observe(folder):
    settings = make_settings(
        max_num_seqs=4, max_queue=2, num_threads=1, speculate="ngram", **PRICES
    )
    metrics, other_metrics = Metrics(), Metrics()
    served = make_served(metrics, settings)
    others = {
        name: make_model(FakeEngine(info=info), name=name, metrics=other_metrics)
        for name, info in {
            "unmeasured": make_info(),
            "unmeasured-twin": make_info(weights="dense"),
        }.items()
    }
    nothing = EnergyMeters(open_counter=lambda *_: Unavailable("no_powercap", "none here"))
    for name, other in others.items():
        nothing.model(name, other.metrics).bind(other.engine.info)
        move(other.metrics, 1)
    other_settings = make_settings()
    async with (
        run_server(create_app(served, settings, metrics)) as url,
        run_server(create_app(others, other_settings, other_metrics)) as other_url,
    ):
        async with asyncio.timeout(120):
            for model in served.values():
                await model.engine.wait_ready()
        targets = [address.removeprefix("http://") for address in (url, other_url)]
        async with run_prometheus(folder, targets) as client:
            idle = await query_until_found(client, IDLE)
            for other in others.values():
                move(other.metrics, 1001)
            calls = asyncio.create_task(load(url))
            loaded = await query_until_found(client, LOADED - IDLE, IDLE)
            calls.cancel()
            vllm = {expr: len(await query(client, expr)) for expr in VLLM}
            without_counter = {"ternary": "unmeasured", "baseline": "unmeasured-twin"}
            home = {
                panel.title: sum(
                    [len(await query(client, q.expr, **without_counter)) for q in panel.queries]
                )
                for panel in HOME.panels
            }
            await settle(client)
            began_s = time.monotonic()
            rates = await run_window(url)
            await settle(client)
            lasted = f"{math.ceil(time.monotonic() - began_s)}s"
            [speed] = await query(client, SPEED, __range=lasted)
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
        vllm=vllm,
        home=home,
        rates=rates,
        speed=float(speed["value"][1]),
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
    assert dense == [["builtin-twin", "unmeasured-twin"]]


@pytest.mark.parametrize("expr", VLLM)
def test_what_vllms_dashboards_ask_for_is_there(found, expr):
    assert found.vllm[expr], expr


@pytest.mark.parametrize("panel", HOME.panels, ids=lambda panel: panel.title)
def test_the_first_row_of_the_home_dashboard_has_data_without_counter_and_price(found, panel):
    assert found.home[panel.title]


@pytest.mark.needs_program("node")
def test_the_dashboards_speed_up_is_the_pages_whatever_the_traffic(found):
    # It divided traffic once: 9.9 times, where tokens a busy second gave 6.4.
    a, b = ([found.rates[model]] for model in NUM_REQUESTS)
    [compared] = evaluate([f's.compare({a}, {b}, "higher")'], s="statistics.js")
    assert found.speed == pytest.approx(compared["gain"], rel=0.1)


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
