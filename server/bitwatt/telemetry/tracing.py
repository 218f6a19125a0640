"""Traces of requests by OpenTelemetry, with its names for generative AI; off without an endpoint.

A request is a span, a child of the caller's where a `traceparent` header names one; every choice
it generates is a span under it, with what was asked, its tokens, times, joules and their price. A
prompt's tokens are in the span of its first choice alone, so that sums over spans are true. No
prompt, stop string or answer is in either. Probes and scrapes make no span.

A request's joules have the name that a draft for OpenTelemetry gives a device's, a metric there, in
J (aitra-ai/aitra-meter, docs/proposals/otel-semconv-energy.md). For what a request costs in all,
which electricity is a part of, there is a draft alone: electricity has a name of ours.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from bitwatt.engine.messages import Submit

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["RequestSpan", "Tracing", "TracingUnavailableError", "trace_generation"]

_CLOSING_S = 2.0  # a collector that is down would be tried for 10 s
_OTLP_PATH = "/v1/traces"
_SERVICE = "service.name"
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


class TracingUnavailableError(Exception):
    """Traces were asked for and can't be made; the message says what would help."""


class Tracing:
    """Makes spans and sends them on, in a thread of its own."""

    def __init__(self, provider: "TracerProvider") -> None:
        self.provider = provider
        self.tracer = provider.get_tracer("bitwatt")

    @classmethod
    def to_endpoint(cls, endpoint: str) -> "Tracing":
        """Return tracing that sends to this OTLP/HTTP address, as http://host:4318/v1/traces.

        An address without a path gets that one. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
        say what the service is called and more of it, as wherever OpenTelemetry is.

        Raises  TracingUnavailableError
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise TracingUnavailableError(
                f"--otlp-endpoint needs OpenTelemetry: {error}; pip install 'bitwatt[otel]'"
            ) from error
        resource = Resource.create()
        if str(resource.attributes[_SERVICE]).startswith("unknown_service"):
            resource = resource.merge(Resource({_SERVICE: "bitwatt"}))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=_with_path(endpoint))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    @contextmanager
    def request(self, path: str, headers: Mapping[str, str]) -> Iterator["RequestSpan"]:
        """Make the span of a request; what the block generates is under it."""
        span = RequestSpan(self, _OPERATIONS.get(path, "generate_content"), headers)
        token = _current.set(span)
        try:
            yield span
        finally:
            _current.reset(token)
            span.end()

    def close(self) -> None:
        """Send what waits, and stop; what a collector doesn't take within 2 s is lost."""
        closing = threading.Thread(target=self.provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(_CLOSING_S)


class RequestSpan:
    """The span of a request that runs."""

    def __init__(self, tracing: Tracing, operation: str, headers: Mapping[str, str]) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracing.tracer
        self._operation = operation
        callers = TraceContextTextMapPropagator().extract(headers)
        self._span = self._tracer.start_span("HTTP", context=callers, kind=SpanKind.SERVER)
        self._context = set_span_in_context(self._span)

    def set_outcome(self, *, method: str, route: str, status: int, request_id: str | None) -> None:
        """Say what the request was and how it went; a server's error is one by its status."""
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{method} {route}")
        self._span.set_attribute("http.request.method", method)
        self._span.set_attribute("http.route", route)
        self._span.set_attribute("http.response.status_code", status)
        if request_id is not None:
            self._span.set_attribute("bitwatt.request_id", request_id)
        if status >= 500:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(StatusCode.ERROR)

    def add_generation(
        self,
        model: str,
        duration_s: float,
        attributes: Mapping[str, str | int | float | list[str]],
        *,
        error: str | None,
    ) -> None:
        """Make the span of a choice that ended now.

        error  the type of error that ended it, if one did
        """
        from opentelemetry.trace import StatusCode

        end_ns = time.time_ns()
        span = self._tracer.start_span(
            f"{self._operation} {model}",
            context=self._context,
            start_time=end_ns - round(duration_s * 1e9),
            attributes={
                "gen_ai.operation.name": self._operation,
                "gen_ai.provider.name": "bitwatt",
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
                **attributes,
            },
        )
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(StatusCode.ERROR)
        span.end(end_ns)

    def end(self) -> None:
        """End the span now."""
        self._span.end()


_current: ContextVar[RequestSpan | None] = ContextVar("_current", default=None)


def trace_generation(
    model: str,
    submit: Submit,
    *,
    energy_joules: float | None,
    usd_of_electricity: float | None,
    num_choices: int,
    duration_s: float,
    time_to_first_token_s: float | None,
    queue_s: float | None,
    finish_reason: str,
    num_tokens: int,
    num_cached_tokens: int,
    counts_prompt: bool,
) -> None:
    """Make the span of a choice that ended now, if the running request is traced.

    num_choices    of the prompt
    counts_prompt  whether the prompt's tokens are told: by one choice of a prompt
    """
    request = _current.get()
    if request is None:
        return
    sampling = submit.sampling
    asked: dict[str, int | float | None] = {
        "gen_ai.request.choice.count": num_choices if num_choices > 1 else None,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
        "gen_ai.request.seed": sampling.seed,
    }
    known: dict[str, int | float | None] = {
        **({} if sampling.embeds else asked),
        "gen_ai.usage.input_tokens": len(submit.prompt_token_ids) if counts_prompt else None,
        "gen_ai.usage.cache_read.input_tokens": num_cached_tokens if counts_prompt else None,
        "gen_ai.usage.output_tokens": num_tokens,
        "bitwatt.time_to_first_token_s": time_to_first_token_s,
        "bitwatt.queue_s": queue_s,
        "gen_ai.infrastructure.energy": energy_joules,
        "bitwatt.electricity_usd": usd_of_electricity,
    }
    response_id = submit.request_id.rpartition("-")[0] or submit.request_id
    request.add_generation(
        model,
        duration_s,
        {
            "gen_ai.response.id": response_id,
            "gen_ai.response.finish_reasons": [finish_reason],
            **{name: value for name, value in known.items() if value is not None},
        },
        error=finish_reason if finish_reason == "error" else None,
    )


def _with_path(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return endpoint if parts.path not in ("", "/") else urlunsplit(parts._replace(path=_OTLP_PATH))
