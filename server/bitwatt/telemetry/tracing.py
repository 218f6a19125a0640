"""Traces of requests by OpenTelemetry, with its names for generative AI; off without an endpoint.

A request is a span, a child of the caller's where a `traceparent` header names one; every choice
it generates is a span under it, with its tokens and times. No prompt and no answer is in either.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["RequestSpan", "Tracing", "TracingUnavailableError", "trace_generation"]

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


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
        provider = TracerProvider(resource=Resource.create({"service.name": "bitwatt"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
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
        """Send what waits, and stop."""
        self.provider.shutdown()


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
        """Say what the request was and how it went."""
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{method} {route}")
        self._span.set_attribute("http.request.method", method)
        self._span.set_attribute("http.route", route)
        self._span.set_attribute("http.response.status_code", status)
        if request_id is not None:
            self._span.set_attribute("bitwatt.request_id", request_id)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)

    def add_generation(
        self, model: str, duration_s: float, attributes: Mapping[str, str | int | float | list[str]]
    ) -> None:
        """Make the span of a choice that ended now."""
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
        span.end(end_ns)

    def end(self) -> None:
        """End the span now."""
        self._span.end()


_current: ContextVar[RequestSpan | None] = ContextVar("_current", default=None)


def trace_generation(
    model: str,
    *,
    duration_s: float,
    time_to_first_token_s: float | None,
    queue_s: float | None,
    finish_reason: str,
    num_prompt_tokens: int,
    num_tokens: int,
) -> None:
    """Make the span of a choice that ended now, if the running request is traced."""
    request = _current.get()
    if request is None:
        return
    times = {
        "bitwatt.time_to_first_token_s": time_to_first_token_s,
        "bitwatt.queue_s": queue_s,
    }
    request.add_generation(
        model,
        duration_s,
        {
            "gen_ai.response.finish_reasons": [finish_reason],
            "gen_ai.usage.input_tokens": num_prompt_tokens,
            "gen_ai.usage.output_tokens": num_tokens,
            **{name: seconds for name, seconds in times.items() if seconds is not None},
        },
    )
