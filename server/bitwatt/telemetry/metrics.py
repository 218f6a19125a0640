"""Every metric this server has, declared here alone.

Names, labels and meanings of `vllm:*` are vLLM's, so that dashboards, routers and load tools made
for it read this server unchanged. What is ours begins with `bitwatt_`.
"""

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from bitwatt.engine.messages import EngineInfo, EngineStats
from bitwatt.engine.process_memory import rss_anon_bytes
from bitwatt.telemetry.cost import Prices
from bitwatt.telemetry.energy.arithmetic import ModelShape, arithmetic_joules_per_token
from bitwatt.telemetry.energy.counter import DeviceState

__all__ = ["Metrics", "ModelMetrics"]

_MODEL = ("model_name", "engine")
_DEVICE = ("gpu", "UUID", "modelName")

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
_STEP_S = (
    0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.25, 0.5, 1, 2, 4, 8, 16, 32,
)  # fmt: skip
_ARITHMETIC_CONTEXTS = (512, 4096)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999, 1.0)
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

_ENDED = ("stop", "length", "abort", "error")
_REJECTED = ("queue_full", "unavailable")

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
        self.step_time = histogram("bitwatt_engine_step_seconds", "Time of one step.", _STEP_S)
        self.engine_up = gauge("bitwatt_engine_up", "1 while the engine takes requests.")
        self.memory = gauge(
            "bitwatt_memory_bytes",
            "Memory the engine holds, by kind, and its device's.",
            ("model_name", "kind"),
        )
        self.kv_cache_used = gauge(
            "bitwatt_kv_cache_used_bytes", "Memory of the KV-cache blocks in use."
        )
        self.model_info = gauge(
            "bitwatt_model_info",
            "What serves a model; always 1.",
            (*_MODEL, "weights", "backend", "device", "device_name", "dtype"),
        )
        self.parameters = gauge("bitwatt_model_parameters", "Parameters of the model.")
        self.rss_anon = gauge(
            "bitwatt_rss_anon_bytes",
            "Anonymous memory of a process: `api`, or the engine of a model.",
            ("process",),
        )
        self.rss_anon.labels("api").set_function(lambda: rss_anon_bytes() or math.nan)
        pair = ("model_name", "mirror_name")
        self.shadow_requests = counter(
            "bitwatt_shadow_requests",
            "Requests to a model that were to be mirrored to the other, by what came of it.",
            (*pair, "outcome"),
        )
        self.shadow_latency = Histogram(
            "bitwatt_shadow_latency_seconds",
            "Arrival to last token of a mirrored pair, by side: original or mirror.",
            (*pair, "side"),
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.shadow_time_to_first_token = Histogram(
            "bitwatt_shadow_time_to_first_token_seconds",
            "Arrival to first text of a mirrored pair, by side: original or mirror.",
            (*pair, "side"),
            buckets=_TTFT_S,
            registry=registry,
        )
        self.shadow_tokens = counter(
            "bitwatt_shadow_tokens",
            "Tokens of mirrored pairs. Those of the mirror are in its engine's counters too, and "
            "in no caller's usage.",
            (*pair, "side", "kind"),
        )
        self.shadow_energy = counter(
            "bitwatt_shadow_energy_joules",
            "Measured energy of mirrored pairs' requests, by side; no series where none is.",
            (*pair, "side"),
        )
        self.shadow_agreement = Histogram(
            "bitwatt_shadow_text_agreement",
            "Share of a greedy pair's longer text before the two part; 1 where they are equal.",
            pair,
            buckets=_SHARES,
            registry=registry,
        )
        self.http_requests = counter(
            "http_requests", "HTTP requests, by route.", ("handler", "method", "status")
        )

        self.energy_available = gauge(
            "bitwatt_energy_available",
            "1 where the device's energy is measured, else 0 and the reason.",
            (*_MODEL, "source", "reason"),
        )
        self.energy = counter(
            "bitwatt_energy_joules",
            "Measured energy of the model's device, idle included, by what it went into.",
            (*_MODEL, "source", "attribution", "phase"),
        )
        self.idle_power = gauge(
            "bitwatt_idle_power_watts",
            "Power of the model's device while it is loaded and nothing runs.",
            (*_MODEL, "source"),
        )
        self.arithmetic = gauge(
            "bitwatt_estimated_arithmetic_joules_per_token",
            "Estimate of the BitNet papers for the multiply-adds alone; not measured energy.",
            (*_MODEL, "context"),
        )
        self.prices = {
            "usd_per_hour": gauge(
                "bitwatt_price_usd_per_hour", "Rent of what the engine runs on, as set."
            ),
            "usd_per_kwh": gauge("bitwatt_price_usd_per_kwh", "Price of electricity, as set."),
            "pue": gauge("bitwatt_pue", "Power usage effectiveness, as set."),
            "gco2_per_kwh": gauge(
                "bitwatt_grid_gco2_per_kwh", "Carbon intensity of the grid in grams, as set."
            ),
        }
        # DCGM's names and units, which dashboards and load tools read.
        self.device_power = gauge(
            "DCGM_FI_DEV_POWER_USAGE", "Power draw of the GPU (in W).", _DEVICE
        )
        self.device_energy = gauge(
            "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",
            "Energy of the GPU since its driver was loaded (in mJ).",
            _DEVICE,
        )
        self.device_memory_used = gauge(
            "DCGM_FI_DEV_FB_USED", "Memory of the GPU in use (in MiB).", _DEVICE
        )
        self._models: dict[str, ModelMetrics] = {}

    def model(self, name: str) -> "ModelMetrics":
        """Return one served model's part, the same for the same name."""
        if name not in self._models:
            self._models[name] = ModelMetrics(self, name)
        return self._models[name]

    def on_device(self, state: DeviceState) -> None:
        """Take in a GPU's state."""
        labels = str(state.index), state.uuid, state.name
        if state.power_w is not None:
            self.device_power.labels(*labels).set(state.power_w)
        self.device_energy.labels(*labels).set(state.energy_mj)
        self.device_memory_used.labels(*labels).set(state.memory_used_bytes / 2**20)

    def render(self) -> tuple[bytes, str]:
        """Return the exposition in Prometheus's text format, and its content type.

        Never in OpenMetrics, which prometheus-client writes with `vllm:` turned to `vllm_`.
        """
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4


class ModelMetrics:
    """One served model's series."""

    def __init__(self, metrics: Metrics, name: str, engine: str = "0") -> None:
        self._metrics = metrics
        self.name = name
        self._labels = (name, engine)
        self._last = EngineStats()
        self.stats = EngineStats()
        self._counters = {
            field: getattr(metrics, counter).labels(*self._labels)
            for field, counter in _COUNTED.items()
        }
        labels = self._labels
        for ended in _ENDED:  # counters begin at zero, or the first event would be no increase
            metrics.request_success.labels(*labels, ended)
        for reason in _REJECTED:
            metrics.admission_rejections.labels(*labels, reason)
        self._running = metrics.requests_running.labels(*labels)
        self._waiting = metrics.requests_waiting.labels(*labels)
        self._kv_cache_usage = metrics.kv_cache_usage.labels(*labels)
        self._iteration_tokens = metrics.iteration_tokens.labels(*labels)
        self._step_time = metrics.step_time.labels(*labels)
        self._kv_cache_bytes = 0
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
        self.stats = stats
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        usage = stats.num_blocks_used / max(stats.num_blocks, 1)
        self._kv_cache_usage.set(usage)
        self._metrics.kv_cache_used.labels(*self._labels).set(usage * self._kv_cache_bytes)
        if stats.rss_anon_bytes is not None:
            self._metrics.rss_anon.labels(self._labels[0]).set(stats.rss_anon_bytes)
        if stats.num_steps == self._last.num_steps:
            return
        self._iteration_tokens.observe(stats.step_tokens)
        self._step_time.observe(stats.step_s)
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
        self._kv_cache_bytes = info.memory.kv_cache_bytes
        self._metrics.model_info.labels(
            *self._labels, info.weights, info.backend, info.device, info.device_name, info.dtype
        ).set(1)
        self._metrics.parameters.labels(*self._labels).set(info.num_parameters)
        self._describe_arithmetic(info)

    def describe_energy(self, source: str | None, reason: str) -> None:
        """Show what measures this model's energy, or why nothing does; called once."""
        self._metrics.energy_available.labels(*self._labels, source or "none", reason).set(
            source is not None
        )

    def add_energy(self, source: str, attribution: str, phase: str, joules: float) -> None:
        """Count measured joules: "prefill", "decode", "idle" or "unattributed"."""
        self._metrics.energy.labels(*self._labels, source, attribution, phase).inc(joules)

    def set_idle_power(self, source: str, watts: float) -> None:
        """Show the device's power while nothing runs."""
        self._metrics.idle_power.labels(*self._labels, source).set(watts)

    def set_prices(self, prices: Prices) -> None:
        """Show the prices that are set; one that isn't has no series."""
        for name, gauge in self._metrics.prices.items():
            price = getattr(prices, name)
            if price is not None:
                gauge.labels(*self._labels).set(price)

    def _describe_arithmetic(self, info: EngineInfo) -> None:
        if not info.num_linear_parameters:
            return
        shape = ModelShape(
            num_linear_parameters=info.num_linear_parameters,
            num_layers=info.num_layers,
            attention_width=info.attention_width,
        )
        for context in _ARITHMETIC_CONTEXTS:
            joules = arithmetic_joules_per_token(shape, info.weights, context)
            self._metrics.arithmetic.labels(*self._labels, str(context)).set(joules)

    def on_rejected(self, reason: str) -> None:
        """Count a request turned away."""
        self._metrics.admission_rejections.labels(*self._labels, reason).inc()

    def on_ended(self, reason: str) -> None:
        """Count a request that ended."""
        self._metrics.request_success.labels(*self._labels, reason).inc()
