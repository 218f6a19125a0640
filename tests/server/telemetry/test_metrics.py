"""The exposition: names and labels that other tools rely on, and figures that add up."""

import asyncio
from asyncio.subprocess import PIPE

import pytest
from bitwatt.api.app import create_app
from bitwatt.engine.messages import EngineStats
from bitwatt.telemetry.metrics import Metrics
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import FakeEngine, make_app, make_client, make_info, make_model, make_settings

MODEL = {"model_name": "tiny", "engine": "0"}

VLLM = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:admission_rejections": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:iteration_tokens_total": "histogram",
    "http_requests": "counter",
}


def families(text):
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, MODEL | labels)


async def scrape_after_requests():
    body = {"model": "tiny", "prompt": "a"}
    async with make_client(make_app(FakeEngine())) as client:
        await client.post("/v1/completions", json=body)
        await client.post("/v1/completions", json=body | {"stream": True})
        await client.post("/v1/completions", json={})
        await client.get("/nowhere/" + "x" * 100)
        await client.request("BREW", "/coffee")
        return (await client.get("/metrics")).text


@pytest.mark.anyio
async def test_names_kinds_and_labels_are_those_dashboards_read():
    found = families(await scrape_after_requests())
    assert {name: found[name].type for name in VLLM} == VLLM
    for name in VLLM:
        if name.startswith("vllm:"):
            for sample in found[name].samples:
                assert sample.labels["model_name"] == "tiny"
                assert sample.labels["engine"] == "0"
    [info] = found["vllm:cache_config_info"].samples
    assert (info.labels["block_size"], info.labels["num_gpu_blocks"], info.value) == ("16", "64", 1)


@pytest.mark.anyio
async def test_http_requests_are_counted_by_route_and_never_by_path():
    found = families(await scrape_after_requests())["http_requests"]
    counts = {
        (s.labels["handler"], s.labels["method"], s.labels["status"]): s.value
        for s in found.samples
        if s.name == "http_requests_total"
    }
    assert counts == {
        ("/v1/completions", "POST", "200"): 2,
        ("/v1/completions", "POST", "400"): 1,
        ("unmatched", "GET", "404"): 1,
        ("unmatched", "other", "404"): 1,
    }


@pytest.mark.anyio
async def test_a_request_feeds_every_histogram_once():
    found = families(await scrape_after_requests())
    for name, kind in VLLM.items():
        if kind != "histogram" or name == "vllm:iteration_tokens_total":
            continue
        counts = {s.name: s.value for s in found[name].samples if s.name.endswith("_count")}
        expected = 8 if "inter_token" in name else 2
        assert counts == {f"{name}_count": expected}, name


@pytest.mark.anyio
async def test_memory_is_shown_by_kind():
    found = families(await scrape_after_requests())
    memory = {s.labels["kind"]: s.value for s in found["bitwatt_memory_bytes"].samples}
    assert memory == {
        "packed_weights": 100,
        "embedding": 200,
        "other_weights": 10,
        "kv_cache": 1000,
    }
    [api] = found["bitwatt_rss_anon_bytes"].samples
    assert api.labels == {"process": "api"}
    assert api.value > 2**20


@pytest.mark.anyio
@pytest.mark.needs_program("promtool")
async def test_promtool_finds_nothing_wrong_but_vllms_own_names():
    process = await asyncio.create_subprocess_exec(
        "promtool", "check", "metrics", stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    _, errors = await process.communicate((await scrape_after_requests()).encode())
    complaints = [line for line in errors.decode().splitlines() if line.strip()]
    assert [line for line in complaints if not line.startswith("vllm:")] == []


def test_the_engines_counters_go_on_across_its_restarts():
    metrics = Metrics()
    model = metrics.model("tiny")
    for num_steps, num_tokens in ((1, 10), (2, 30), (1, 7), (2, 8)):
        model.on_stats(
            EngineStats(num_steps=num_steps, num_generation_tokens=num_tokens, step_tokens=3)
        )
    assert value(metrics, "vllm:generation_tokens_total") == 38
    assert value(metrics, "vllm:iteration_tokens_total_count") == 4
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 12


def test_a_restart_is_no_observation():
    metrics = Metrics()
    model = metrics.model("tiny")
    for num_steps in (0, 1, 2):
        model.on_stats(EngineStats(num_steps=num_steps, step_tokens=3))
    model.on_ready(make_info())
    for num_steps in (0, 0, 1, 2):
        model.on_stats(EngineStats(num_steps=num_steps, step_tokens=3 if num_steps else 0))
    assert value(metrics, "vllm:iteration_tokens_total_count") == 4
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 12


def test_heartbeats_move_gauges_and_count_nothing():
    metrics = Metrics()
    model = metrics.model("tiny")
    for num_running in (3, 1):
        model.on_stats(
            EngineStats(
                num_running=num_running,
                num_waiting=2,
                num_blocks=10,
                num_blocks_used=4,
                rss_anon_bytes=5,
                num_steps=1,
                num_prompt_tokens=9,
            )
        )
    assert value(metrics, "vllm:num_requests_running") == 1
    assert value(metrics, "vllm:num_requests_waiting") == 2
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.4
    assert value(metrics, "vllm:prompt_tokens_total") == 9
    assert value(metrics, "vllm:iteration_tokens_total_count") == 1
    assert metrics.registry.get_sample_value("bitwatt_rss_anon_bytes", {"process": "tiny"}) == 5


def test_an_engine_is_up_from_when_it_is_ready_until_it_is_gone_and_then_runs_nothing():
    metrics = Metrics()
    model = metrics.model("tiny")
    busy = EngineStats(
        num_running=3, num_waiting=1, num_blocks=2, num_blocks_used=1, rss_anon_bytes=5
    )
    gauges = [
        "bitwatt_engine_up",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "bitwatt_kv_cache_used_bytes",
    ]
    found = []
    for change in (
        lambda: None,
        lambda: model.on_ready(make_info()),
        lambda: model.on_stats(busy),
        model.on_down,
        lambda: model.on_ready(make_info()),
    ):
        change()
        found.append([value(metrics, name) for name in gauges])
    nothing, idle = [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]
    assert found == [nothing, idle, [1, 3, 1, 0.5, 500], nothing, idle]
    assert metrics.registry.get_sample_value("bitwatt_rss_anon_bytes", {"process": "tiny"}) == 0


def test_a_restarted_engine_is_described_by_what_it_says_now():
    metrics = Metrics()
    model = metrics.model("tiny")
    for num_blocks in (64, 32):
        model.on_ready(make_info(num_blocks=num_blocks))
    [cache] = families(metrics.render()[0].decode())["vllm:cache_config_info"].samples
    assert cache.labels["num_gpu_blocks"] == "32"


def test_a_gauge_that_was_never_set_has_no_series():
    metrics = Metrics()
    metrics.model("tiny")
    for name in ("bitwatt_model_parameters", "bitwatt_price_usd_per_hour", "bitwatt_pue"):
        assert value(metrics, name) is None


@pytest.mark.anyio
async def test_a_scrape_changes_nothing():
    # A scrape used to set the gauges: whoever did not ask saw an engine that was not there yet.
    def settled(text):
        """Leave out what the scrapes themselves count, and the process's memory."""
        own = ('handler="/metrics"', 'process="api"')
        return [line for line in text.splitlines() if not any(word in line for word in own)]

    metrics = Metrics()
    model = make_model(FakeEngine(), metrics=metrics)
    async with make_client(create_app({"tiny": model}, make_settings(), metrics)) as client:
        await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        unasked = metrics.render()[0].decode()
        scrapes = [(await client.get("/metrics")).text for _ in range(2)]
    assert value(metrics, "bitwatt_engine_up") == 1
    assert [settled(text) for text in scrapes] == [settled(unasked)] * 2


@pytest.mark.anyio
@pytest.mark.parametrize("accept", ["*/*", "application/openmetrics-text;version=1.0.0,*/*;q=0.1"])
async def test_whatever_a_scraper_accepts_it_reads_vllms_names(accept):
    # prometheus-client's OpenMetrics encoder wrote vllm_num_requests_running to real Prometheus.
    async with make_client(make_app(FakeEngine())) as client:
        answer = await client.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "\nvllm:num_requests_running{" in answer.text
    assert "vllm_" not in answer.text
