"""The exposition: names and labels that other tools rely on, and figures that add up."""

import asyncio
from asyncio.subprocess import PIPE
from unittest.mock import Mock

import pytest
from bitwatt.api.app import create_app
from bitwatt.engine.messages import EngineStats
from bitwatt.telemetry.metrics import Metrics
from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import (
    FakeEngine,
    make_app,
    make_client,
    make_info,
    make_model,
    make_settings,
    run_server,
)

MODEL = {"model_name": "tiny", "engine": "0"}

VLLM = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:num_requests_waiting_by_reason": "gauge",
    "vllm:engine_sleep_state": "gauge",
    "vllm:request_params_n": "histogram",
    "vllm:request_params_max_tokens": "histogram",
    "vllm:request_num_preemptions": "histogram",
    "vllm:request_max_num_generation_tokens": "histogram",
    "vllm:request_prefill_kv_computed_tokens": "histogram",
    "vllm:prompt_tokens_by_source": "counter",
    "vllm:prompt_tokens_cached": "counter",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:spec_decode_num_drafts": "counter",
    "vllm:spec_decode_num_draft_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens": "counter",
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
    assert info.labels["cache_dtype"] == "bfloat16"


@pytest.mark.anyio
async def test_http_requests_are_counted_by_route_and_never_by_path():
    found = families(await scrape_after_requests())["http_requests"]
    counts = {
        (s.labels["handler"], s.labels["method"], s.labels["code"]): s.value
        for s in found.samples
        if s.name == "http_requests_total"
    }
    assert counts == {
        ("/v1/completions", "POST", "200"): 2,
        ("/v1/completions", "POST", "400"): 1,
        ("unmatched", "GET", "404"): 1,
        ("unmatched", "other", "404"): 1,
    }
    # vLLM's dashboards ask for the class, as prometheus-fastapi-instrumentator gives it.
    assert all(s.labels["status"] == s.labels["code"][0] + "xx" for s in found.samples)


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
async def test_a_choice_that_a_stop_string_ends_is_in_every_histogram_too():
    # The engine hadn't ended it, so its times in the engine were told nowhere.
    metrics = Metrics()
    app = create_app({"tiny": make_model(FakeEngine(), metrics=metrics)}, make_settings(), metrics)
    async with make_client(app) as client:
        body = {"model": "tiny", "prompt": "a", "stop": "quick"}
        answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    for name in ("queue", "prefill", "decode", "inference"):
        assert value(metrics, f"vllm:request_{name}_time_seconds_count") == 1, name
    assert value(metrics, "vllm:request_queue_time_seconds_sum") == 0.01
    assert value(metrics, "vllm:request_prefill_time_seconds_sum") == 0.02
    assert value(metrics, "vllm:request_time_per_output_token_seconds_count") == 1


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
        model.on_stats(EngineStats(num_steps=num_steps, num_generation_tokens=num_tokens))
    assert value(metrics, "vllm:generation_tokens_total") == 38
    assert value(metrics, "vllm:iteration_tokens_total_count") == 4
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 38


def test_a_restart_is_no_observation():
    metrics = Metrics()
    model = metrics.model("tiny")
    for num_steps in (0, 1, 2):
        model.on_stats(EngineStats(num_steps=num_steps, num_generation_tokens=3 * num_steps))
    model.on_ready(make_info())
    for num_steps in (0, 0, 1, 2):
        model.on_stats(EngineStats(num_steps=num_steps, num_generation_tokens=3 * num_steps))
    assert value(metrics, "vllm:iteration_tokens_total_count") == 4
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 12


def test_a_steps_tokens_are_those_drawn_and_the_prompts_that_came_to_their_first():
    # vLLM's rule: of a prompt of 9 in two pieces and 3 tokens, steps of 10, 1 and 1.
    metrics = Metrics()
    model = metrics.model("tiny")
    for num_steps, (num_prompt, num_drawn) in enumerate([(0, 0), (9, 1), (9, 2), (9, 3)], 1):
        model.on_stats(
            EngineStats(
                num_steps=num_steps, num_prompt_tokens=num_prompt, num_generation_tokens=num_drawn
            )
        )
    steps = "vllm:iteration_tokens_total"
    assert value(metrics, f"{steps}_count") == 3
    assert value(metrics, f"{steps}_sum") == 12
    assert [value(metrics, f"{steps}_bucket", le=bound) for bound in ("1.0", "8.0", "16.0")] == [
        2,
        2,
        3,
    ]
    assert value(metrics, "bitwatt_engine_steps_total") == 4


def test_prompt_tokens_are_told_by_where_they_came_from():
    metrics = Metrics()
    model = metrics.model("tiny")
    for num_steps, (num_prompt, num_cached) in enumerate([(10, 0), (30, 16)], 1):
        model.on_stats(
            EngineStats(
                num_steps=num_steps,
                num_prompt_tokens=num_prompt,
                num_cached_prompt_tokens=num_cached,
            )
        )
    by_source = "vllm:prompt_tokens_by_source_total"
    assert value(metrics, "vllm:prompt_tokens_total") == 30
    assert value(metrics, by_source, source="local_compute") == 14
    assert value(metrics, by_source, source="local_cache_hit") == 16
    assert value(metrics, "vllm:prompt_tokens_cached_total") == 16
    assert value(metrics, "vllm:prompt_tokens_cached_by_source_total", source="device") == 16


def test_what_waits_waits_for_capacity():
    metrics = Metrics()
    metrics.model("tiny").on_stats(EngineStats(num_waiting=3))
    by_reason = "vllm:num_requests_waiting_by_reason"
    assert value(metrics, by_reason, reason="capacity") == 3
    assert value(metrics, by_reason, reason="deferred") == 0


def test_an_engine_loads_until_it_is_first_ready_or_gone_and_its_restarts_are_counted():
    metrics = Metrics()
    model = metrics.model("tiny")
    found = []
    for change in (
        lambda: None,
        lambda: model.on_ready(make_info()),
        model.on_down,
        model.on_restart,
        model.on_down,
        model.on_restart,
        lambda: model.on_ready(make_info()),
    ):
        change()
        names = ("bitwatt_engine_loading", "bitwatt_engine_restarts_total")
        is_awake = value(metrics, "vllm:engine_sleep_state", sleep_state="awake")
        found.append((*(value(metrics, name) for name in names), is_awake))
    # Not awake would be asleep, to vLLM's dashboards; what has no series is down.
    assert found == [
        *((1, 0, None), (0, 0, 1), (0, 0, None)),
        *((0, 1, None), (0, 1, None), (0, 2, None), (0, 2, 1)),
    ]


@pytest.mark.anyio
async def test_latencies_of_a_fast_model_lie_inside_buckets():
    # A 99th percentile of 13 ms read 297 ms where the first bound was 0.3 s.
    for name, family in families(await scrape_after_requests()).items():
        if family.type == "histogram" and name.endswith("_seconds"):
            bounds = [float(s.labels["le"]) for s in family.samples if "le" in s.labels]
            assert min(bounds, default=0) <= 0.001, name  # one with further labels has none yet


@pytest.mark.anyio
async def test_a_request_is_timed_from_when_its_head_came():
    # The clock began once the body was read, checked and in tokens.
    metrics = Metrics()
    body = b'{"model": "tiny", "prompt": "a"}'
    app = create_app({"tiny": make_model(FakeEngine(), metrics=metrics)}, make_settings(), metrics)
    async with run_server(app) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += "Expect: 100-continue\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode())
        assert b" 100 " in await reader.readline()  # the head came
        assert await reader.readline() == b"\r\n"
        await asyncio.sleep(0.3)
        writer.write(body)
        assert b" 200 " in await reader.readline()
        await reader.read()
        writer.close()
    assert value(metrics, "vllm:time_to_first_token_seconds_sum") > 0.29
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") > 0.29


@pytest.mark.anyio
async def test_what_only_watches_the_server_is_counted_apart_from_callers_requests():
    # A probe's 503s, of a model that loads, were a third of all answers and fired an alert.
    engine = FakeEngine(is_ready=False, info=None)
    async with make_client(make_app(engine)) as client:
        for path in ("/ready", "/health", "/version", "/", "/bitwatt/v1/comparison", "/metrics"):
            await client.get(path)
        found = families((await client.get("/metrics")).text)
    assert found["http_requests"].samples == []
    assert found["http_request_duration_seconds"].samples == []
    probes = {
        (s.labels["handler"], s.labels["code"]): s.value
        for s in found["bitwatt_probe_requests"].samples
    }
    assert probes[("/ready", "503")] == 1
    assert probes[("/metrics", "200")] == 1
    assert len(probes) == 6


@pytest.mark.anyio
async def test_choices_of_a_prompt_are_one_request_with_its_longest_as_vllm_counts():
    metrics = Metrics()
    engine = FakeEngine(replies=["the", "the quick brown fox jumps"])
    app = create_app({"tiny": make_model(engine, metrics=metrics)}, make_settings(), metrics)
    async with make_client(app) as client:
        body = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "seed": 0, "max_tokens": 30}
        answer = (await client.post("/v1/completions", json=body)).json()
    assert len(answer["choices"]) == 4
    assert value(metrics, "vllm:request_params_n_count") == 2
    assert value(metrics, "vllm:request_params_n_sum") == 4
    assert value(metrics, "vllm:request_params_max_tokens_sum") == 4 * 30
    longest = "vllm:request_max_num_generation_tokens"
    assert value(metrics, f"{longest}_count") == 2
    all_tokens = value(metrics, "vllm:request_generation_tokens_sum")
    assert all_tokens / 2 < value(metrics, f"{longest}_sum") < all_tokens


@pytest.mark.anyio
@pytest.mark.parametrize("chunk_size", [1, 10])
async def test_tokens_behind_a_stop_string_are_no_tokens_of_the_answer(chunk_size):
    # Where one output brought them too, the server counted what no caller got.
    metrics = Metrics()
    engine = FakeEngine(reply="the quick brown fox jumps", chunk_size=chunk_size)
    app = create_app({"tiny": make_model(engine, metrics=metrics)}, make_settings(), metrics)
    async with make_client(app) as client:
        body = {"model": "tiny", "prompt": "a", "stop": "k bro", "max_tokens": 30}
        answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"] == "the quic"
    assert answer["usage"]["completion_tokens"] == 3
    assert value(metrics, "vllm:request_generation_tokens_sum") == 3
    assert value(metrics, "vllm:request_max_num_generation_tokens_sum") == 3


def test_what_is_written_is_what_prometheus_client_writes(monkeypatch):
    monkeypatch.setattr("bitwatt.telemetry.metrics.rss_anon_bytes", lambda: 5)
    process = [*ProcessCollector(registry=None).collect()]  # its times stand still
    monkeypatch.setattr(
        "bitwatt.telemetry.metrics.ProcessCollector",
        lambda registry: registry.register(Mock(spec=["collect"], collect=lambda: process)),
    )
    metrics = Metrics()
    for name in ("tiny", 'a "quoted" \\ name\nof two lines'):
        model = metrics.model(name)
        for num_blocks in (64, 32):  # a series that goes
            model.on_ready(make_info(num_blocks=num_blocks))
            model.on_stats(EngineStats(num_steps=1, busy_s=1 / 3, num_generation_tokens=12345678))
            assert metrics.render()[0] == generate_latest(metrics.registry)


@pytest.mark.anyio
async def test_no_series_tells_when_another_was_created():
    assert "_created" not in await scrape_after_requests()


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
                num_generation_tokens=1,
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


def test_a_slower_backend_than_could_run_is_told():
    metrics = Metrics()
    model = metrics.model("tiny")
    for fallback, told in (("the backend torch runs", 1), (None, 0)):
        model.on_ready(make_info(fallback=fallback))
        assert value(metrics, "bitwatt_backend_fallback") == told


def test_a_gauge_that_was_never_set_has_no_series():
    metrics = Metrics()
    metrics.model("tiny")
    for name in ("bitwatt_model_parameters", "bitwatt_price_usd_per_hour", "bitwatt_pue"):
        assert value(metrics, name) is None


@pytest.mark.anyio
async def test_a_scrape_changes_nothing():
    # A scrape used to set the gauges: whoever did not ask saw an engine that was not there yet.
    def settled(text):
        """Leave out what the scrapes themselves count, and the process's time and memory."""
        own = ('handler="/metrics"', 'process="api"', "process_")
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
