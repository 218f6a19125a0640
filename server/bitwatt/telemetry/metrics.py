"""Every metric this server has, declared here alone.

Names, labels and meanings of `vllm:*` are vLLM's, so that dashboards, routers and load tools made
for it read this server unchanged. What is ours begins with `bitwatt_`.
"""

import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from bitwatt.engine.messages import EngineInfo, EngineStats, TokenOutput

__all__ = ["Metrics", "ModelMetrics", "RequestMetrics", "rss_anon_bytes"]

_MODEL = ("model_name", "engine")

_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_PER_TOKEN_S = (
    0.002, 0.004, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_LATENCY_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_TOKENS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_COUNTED = {
    "num_prompt_tokens": "prompt_tokens",
    "num_generation_tokens": "generation_tokens",
    "num_preemptions": "preemptions",
    "num_prefix_cache_queries": "prefix_cache_queries",
    "num_prefix_cache_hits": "prefix_cache_hits",
    "num_steps": "steps",
    "busy_s": "busy_seconds",
}
"""Fields of EngineStats that count from the engine's start, and the counters they feed."""

_MEMORY_KINDS = {
    "packed_weights": "packed_weights_bytes",
    "embedding": "embedding_bytes",
    "other_weights": "other_weights_bytes",
    "kv_cache": "kv_cache_bytes",
    "workspace": "workspace_bytes",
    "device_total": "device_total_bytes",
}


class Metrics:
    """The registry of one API process. Used from one event loop."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def gauge(name: str, text: str, labels: tuple[str, ...] = _MODEL) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = _MODEL) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, _MODEL, buckets=buckets, registry=registry)

        self.requests_running = gauge(
            "vllm:num_requests_running", "Requests in the engine's batches."
        )
        self.requests_waiting = gauge(
            "vllm:num_requests_waiting", "Requests waiting to be processed."
        )
        self.kv_cache_usage = gauge(
            "vllm:kv_cache_usage_perc", "KV-cache blocks in use; 1 means all of them."
        )
        self.cache_config = gauge(
            "vllm:cache_config_info",
            "How the KV cache is laid out; always 1.",
            (*_MODEL, "block_size", "num_gpu_blocks"),
        )

        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self.request_success = counter(
            "vllm:request_success",
            "Requests that ended, by how.",
            (*_MODEL, "finished_reason"),
        )
        self.preemptions = counter("vllm:num_preemptions", "Requests preempted by the engine.")
        self.prefix_cache_queries = counter(
            "vllm:prefix_cache_queries", "Tokens looked up in the prefix cache."
        )
        self.prefix_cache_hits = counter(
            "vllm:prefix_cache_hits", "Tokens found in the prefix cache."
        )
        self.admission_rejections = counter(
            "vllm:admission_rejections", "Requests turned away, by why.", (*_MODEL, "reason")
        )

        self.time_to_first_token = histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT_S
        )
        self.inter_token_latency = histogram(
            "vllm:inter_token_latency_seconds", "One token to the next.", _PER_TOKEN_S
        )
        self.time_per_output_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "A request's mean time per token after the first.",
            _PER_TOKEN_S,
        )
        self.e2e_latency = histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to last token.", _LATENCY_S
        )
        self.queue_time = histogram(
            "vllm:request_queue_time_seconds", "Time waiting in the engine.", _LATENCY_S
        )
        self.inference_time = histogram(
            "vllm:request_inference_time_seconds", "Time running in the engine.", _LATENCY_S
        )
        self.prefill_time = histogram(
            "vllm:request_prefill_time_seconds", "Time from running to first token.", _LATENCY_S
        )
        self.decode_time = histogram(
            "vllm:request_decode_time_seconds", "Time from first to last token.", _LATENCY_S
        )
        self.request_prompt_tokens = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self.request_generation_tokens = histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request.", _TOKENS
        )
        self.iteration_tokens = histogram(
            "vllm:iteration_tokens_total", "Tokens of one engine step.", _STEP_TOKENS
        )

        self.steps = counter("bitwatt_engine_steps", "Steps the engine ran.")
        self.busy_seconds = counter("bitwatt_engine_busy_seconds", "Seconds spent in steps.")
        self.engine_up = gauge("bitwatt_engine_up", "1 while the engine takes requests.")
        self.memory = gauge(
            "bitwatt_memory_bytes",
            "Memory the engine holds, by kind, and its device's.",
            ("model_name", "kind"),
        )
        self.rss_anon = gauge(
            "bitwatt_rss_anon_bytes",
            "Anonymous memory of a process: `api`, or the engine of a model.",
            ("process",),
        )
        self.rss_anon.labels("api").set_function(rss_anon_bytes)
        self.http_requests = counter(
            "http_requests", "HTTP requests, by route.", ("handler", "method", "status")
        )
        self._models: dict[str, ModelMetrics] = {}

    def model(self, name: str) -> "ModelMetrics":
        """Return one served model's part, the same for the same name."""
        if name not in self._models:
            self._models[name] = ModelMetrics(self, name)
        return self._models[name]

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the exposition in the format the Accept header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class ModelMetrics:
    """One served model's series."""

    def __init__(self, metrics: Metrics, name: str, engine: str = "0") -> None:
        self._metrics = metrics
        self._labels = (name, engine)
        self._last = EngineStats()
        self._counters = {
            field: getattr(metrics, counter).labels(*self._labels)
            for field, counter in _COUNTED.items()
        }
        labels = self._labels
        self._running = metrics.requests_running.labels(*labels)
        self._waiting = metrics.requests_waiting.labels(*labels)
        self._kv_cache_usage = metrics.kv_cache_usage.labels(*labels)
        self._iteration_tokens = metrics.iteration_tokens.labels(*labels)
        self._up = metrics.engine_up.labels(*labels)
        self.time_to_first_token = metrics.time_to_first_token.labels(*labels)
        self.inter_token_latency = metrics.inter_token_latency.labels(*labels)
        self.time_per_output_token = metrics.time_per_output_token.labels(*labels)
        self.e2e_latency = metrics.e2e_latency.labels(*labels)
        self.queue_time = metrics.queue_time.labels(*labels)
        self.inference_time = metrics.inference_time.labels(*labels)
        self.prefill_time = metrics.prefill_time.labels(*labels)
        self.decode_time = metrics.decode_time.labels(*labels)
        self.prompt_tokens = metrics.request_prompt_tokens.labels(*labels)
        self.generation_tokens = metrics.request_generation_tokens.labels(*labels)

    def on_stats(self, stats: EngineStats) -> None:
        """Take in the engine's figures, after every step and heartbeat.

        The engine's counters begin anew when it restarts; the series go on.
        """
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_cache_usage.set(stats.num_blocks_used / max(stats.num_blocks, 1))
        if stats.rss_anon_bytes is not None:
            self._metrics.rss_anon.labels(self._labels[0]).set(stats.rss_anon_bytes)
        if stats.num_steps == self._last.num_steps:
            return
        self._iteration_tokens.observe(stats.step_tokens)
        for field, counter in self._counters.items():
            now, before = getattr(stats, field), getattr(self._last, field)
            counter.inc(now - before if now >= before else now)
        self._last = stats

    def describe(self, info: EngineInfo | None, *, is_up: bool) -> None:
        """Take in what the engine says of itself; called before a scrape."""
        self._up.set(is_up)
        if not is_up:
            self._running.set(0)
            self._waiting.set(0)
            self._kv_cache_usage.set(0)
        if info is None:
            return
        self._metrics.cache_config.labels(*self._labels, info.block_size, info.num_blocks).set(1)
        for kind, field in _MEMORY_KINDS.items():
            num_bytes = getattr(info.memory, field)
            if num_bytes is not None:
                self._metrics.memory.labels(self._labels[0], kind).set(num_bytes)

    def on_rejected(self, reason: str) -> None:
        """Count a request turned away."""
        self._metrics.admission_rejections.labels(*self._labels, reason).inc()

    def on_ended(self, reason: str) -> None:
        """Count a request that ended."""
        self._metrics.request_success.labels(*self._labels, reason).inc()


class RequestMetrics:
    """One request's times, observed as it runs."""

    __slots__ = ("_arrival_s", "_clock", "_last_token_s", "_model", "num_tokens")

    def __init__(
        self, model: ModelMetrics, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._model = model
        self._clock = clock
        self._arrival_s = clock()
        self._last_token_s = 0.0
        self.num_tokens = 0

    def on_output(self, output: TokenOutput) -> None:
        """Observe an output of the engine."""
        num_tokens = len(output.token_ids)
        if not num_tokens:
            return
        now = self._clock()
        if self.num_tokens:
            latency_s = (now - self._last_token_s) / num_tokens
            for _ in range(num_tokens):
                self._model.inter_token_latency.observe(latency_s)
        else:
            self._model.time_to_first_token.observe(now - self._arrival_s)
        self._last_token_s = now
        self.num_tokens += num_tokens

    def on_end(self, reason: str, num_prompt_tokens: int, last: TokenOutput | None) -> None:
        """Observe the request's end; last is the engine's last output, if it came so far."""
        model = self._model
        model.on_ended(reason)
        model.prompt_tokens.observe(num_prompt_tokens)
        model.generation_tokens.observe(self.num_tokens)
        model.e2e_latency.observe(self._clock() - self._arrival_s)
        if last is None or last.decode_s is None:
            return
        prefill_s = last.prefill_s or 0.0
        model.queue_time.observe(last.queue_s or 0.0)
        model.prefill_time.observe(prefill_s)
        model.decode_time.observe(last.decode_s)
        model.inference_time.observe(prefill_s + last.decode_s)
        if self.num_tokens > 1:
            model.time_per_output_token.observe(last.decode_s / (self.num_tokens - 1))


def rss_anon_bytes() -> float:
    """Return this process's anonymous resident memory; NaN where the system doesn't tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return float("nan")
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return float(line.split()[1]) * 1024
    return float("nan")
