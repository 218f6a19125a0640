"""Spans as collectors get them: a request, its choices under it, no words of either."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from bitwatt.api.app import create_app
from bitwatt.engine.messages import Submit
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt.telemetry.energy.ledger import RequestEnergy
from bitwatt.telemetry.metrics import Metrics
from bitwatt.telemetry.prices import Prices
from bitwatt.telemetry.request_metrics import RequestMetrics
from bitwatt.telemetry.tracing import Tracing, TracingUnavailableError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.fakes import FakeEngine, make_client, make_model, make_settings

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLERS = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}


def make_traced_app(tracing, engine=None):
    metrics = Metrics()
    model = make_model(engine or FakeEngine(), metrics=metrics)
    return create_app({"tiny": model}, make_settings(), metrics, tracing=tracing)


async def spans_of(path, body, *, engine=None, headers=()):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with make_client(make_traced_app(Tracing(provider), engine)) as client:
        await client.post(path, json=body, headers=dict(headers))
    provider.shutdown()
    return exporter.get_finished_spans()


@pytest.mark.anyio
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_request_is_a_span_of_the_callers_trace(is_streamed):
    body = {"model": "tiny", "prompt": "a secret", "stream": is_streamed}
    body |= {"seed": 7, "temperature": 0.5}
    headers = CALLERS | {"x-request-id": "call-1"}
    generation, request = await spans_of("/v1/completions", body, headers=headers)
    assert request.name == "POST /v1/completions"
    assert request.kind is SpanKind.SERVER
    assert f"{request.context.trace_id:032x}" == TRACE_ID
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert dict(request.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "bitwatt.request_id": "call-1",
    }
    assert generation.parent.span_id == request.context.span_id
    assert generation.name == "text_completion tiny"
    attributes = dict(generation.attributes)
    assert attributes.pop("bitwatt.time_to_first_token_s") > 0
    assert attributes.pop("gen_ai.response.id").startswith("cmpl-")
    assert attributes == {
        "gen_ai.request.max_tokens": 16,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "bitwatt",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 5,
        "bitwatt.queue_s": 0.01,
    }
    assert request.start_time <= generation.start_time <= generation.end_time <= request.end_time
    assert "secret" not in "".join(span.to_json() for span in (request, generation))


@pytest.mark.anyio
async def test_every_choice_of_a_chat_is_a_span():
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "n": 3}
    *choices, request = await spans_of("/v1/chat/completions", body)
    assert [span.name for span in choices] == ["chat tiny"] * 3
    assert {span.parent.span_id for span in choices} == {request.context.span_id}
    assert request.parent is None
    # A prompt that three choices share was counted three times over.
    prompts = [span.attributes.get("gen_ai.usage.input_tokens") for span in choices]
    assert [count for count in prompts if count is not None] == [5]
    assert {span.attributes["gen_ai.request.choice.count"] for span in choices} == {3}
    ids = {span.attributes["gen_ai.response.id"] for span in choices}
    assert len(ids) == 1
    assert ids.pop().startswith("chatcmpl-")


def test_a_choices_joules_and_their_price_are_in_its_span():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    model = Metrics().model("tiny")
    submit = Submit(
        request_id="cmpl-1-0", prompt_token_ids=[1, 2], sampling=ResolvedSampling(max_tokens=4)
    )
    measured = RequestEnergy(energy_joules=7200.0, energy_source="nvml")
    tracing = Tracing(provider)
    for prices in (Prices(), Prices(usd_per_kwh=0.5, pue=1.25)):
        model.set_prices(prices)
        with tracing.request("/v1/completions", {}):
            RequestMetrics(model).on_end("stop", submit, None, num_tokens=0, energy=measured)
    provider.shutdown()
    unpriced, priced = (
        span.attributes
        for span in exporter.get_finished_spans()
        if span.name == "text_completion tiny"
    )
    assert unpriced["gen_ai.infrastructure.energy"] == 7200
    assert "bitwatt.electricity_usd" not in unpriced
    assert priced["bitwatt.electricity_usd"] == pytest.approx(0.002 * 0.5 * 1.25)


@pytest.mark.anyio
async def test_a_failed_request_is_marked():
    body = {"model": "tiny", "prompt": "a"}
    generation, request = await spans_of("/v1/completions", body, engine=FakeEngine(dies_after=0))
    assert request.status.status_code is StatusCode.ERROR
    assert generation.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert generation.attributes["error.type"] == "error"
    assert generation.status.status_code is StatusCode.ERROR
    assert request.attributes["error.type"] == str(request.attributes["http.response.status_code"])


@pytest.mark.anyio
async def test_what_only_watches_the_server_is_no_span():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with make_client(make_traced_app(Tracing(provider))) as client:
        for path in ("/health", "/ready", "/metrics", "/bitwatt/v1/comparison", "/page/main.js"):
            assert (await client.get(path)).status_code == 200
        await client.get("/v1/models")
    assert [span.name for span in exporter.get_finished_spans()] == ["GET /v1/models"]


@pytest.mark.anyio
async def test_spans_reach_a_collector_over_http():
    bodies = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        tracing = Tracing.to_endpoint(f"http://127.0.0.1:{server.server_port}/v1/traces")
        async with make_client(make_traced_app(tracing)) as client:
            await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        tracing.close()
        server.shutdown()
        thread.join()
    [body] = bodies
    [resource] = ExportTraceServiceRequest.FromString(body).resource_spans
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == [
        "text_completion tiny",
        "POST /v1/completions",
    ]


@pytest.mark.parametrize(
    ("given", "posted"),
    [
        ("http://h:4318", "http://h:4318/v1/traces"),
        ("http://h:4318/", "http://h:4318/v1/traces"),
        ("https://h/otlp/v1/traces?a=b", "https://h/otlp/v1/traces?a=b"),
    ],
)
def test_an_endpoint_without_a_path_gets_the_one_of_traces(given, posted):
    tracing = Tracing.to_endpoint(given)
    [processor] = tracing.provider._active_span_processor._span_processors
    assert processor.span_exporter._endpoint == posted
    tracing.close()


@pytest.mark.parametrize(("named", "service"), [(None, "bitwatt"), ("mine", "mine")])
def test_the_service_is_called_as_the_environment_says(monkeypatch, named, service):
    if named is not None:
        monkeypatch.setenv("OTEL_SERVICE_NAME", named)
    tracing = Tracing.to_endpoint("http://127.0.0.1:1")
    assert tracing.provider.resource.attributes["service.name"] == service
    tracing.close()


def test_a_collector_that_is_down_holds_up_no_shutdown(monkeypatch):
    released = threading.Event()
    tracing = Tracing.to_endpoint("http://127.0.0.1:1")
    monkeypatch.setattr(tracing.provider, "shutdown", released.wait)  # for ever
    monkeypatch.setattr("bitwatt.telemetry.tracing._CLOSING_S", 0.01)
    tracing.close()
    assert not released.is_set()
    released.set()


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracingUnavailableError, match=r"bitwatt\[otel\]"):
        Tracing.to_endpoint("http://127.0.0.1:1/v1/traces")
