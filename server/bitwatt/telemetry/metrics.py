"""The registry of the declared metrics, and what one served model's engine adds to it."""

import math
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from bitwatt.engine.messages import EngineInfo, EngineStats, MemoryUse
from bitwatt.engine.process_memory import rss_anon_bytes
from bitwatt.telemetry import declarations as declared
from bitwatt.telemetry.declarations import DECLARATIONS, MODEL, Declaration, Instrument
from bitwatt.telemetry.energy.arithmetic import estimate_of
from bitwatt.telemetry.energy.attribution import Phase
from bitwatt.telemetry.energy.counter import DeviceState
from bitwatt.telemetry.exposition import Exposition
from bitwatt.telemetry.prices import Prices

__all__ = ["Metrics", "ModelMetrics"]

_ARITHMETIC_CONTEXTS = (512, 4096)
_ENDED = ("stop", "length", "abort", "error")
_REJECTED = ("queue_full", "unavailable")
_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")

# They would be a tenth of all series, and nobody reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The registry of one API process. Used from one event loop.

    A scrape reads it and changes nothing: every series is set when its fact happens.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._instruments: dict[Declaration[Any], Any] = {
            declaration: _make(declaration, self.registry) for declaration in DECLARATIONS
        }
        ProcessCollector(registry=self.registry)
        self._exposition = Exposition(self.registry)
        self._models: dict[str, ModelMetrics] = {}
        api = self[declared.RSS_ANON].labels("api")
        api.set_function(lambda: rss_anon_bytes() or math.nan)

    def __getitem__(self, declaration: Declaration[Instrument]) -> Instrument:
        """Return the metric that was declared so."""
        instrument: Instrument = self._instruments[declaration]
        return instrument

    def model(self, name: str) -> "ModelMetrics":
        """Return one served model's part, the same for the same name."""
        if name not in self._models:
            self._models[name] = ModelMetrics(self, name)
        return self._models[name]

    def on_device(self, state: DeviceState) -> None:
        """Take in a GPU's state."""
        labels = str(state.index), state.uuid, state.name
        if state.power_w is not None:
            self[declared.GPU_POWER].labels(*labels).set(state.power_w)
        self[declared.GPU_ENERGY].labels(*labels).set(state.energy_mj)
        self[declared.GPU_MEMORY_USED].labels(*labels).set(state.memory_used_bytes / 2**20)

    def render(self) -> tuple[bytes, str]:
        """Return the exposition in Prometheus's text format, and its content type.

        Never in OpenMetrics, which prometheus-client writes with `vllm:` turned to `vllm_`.
        """
        return self._exposition.write(), CONTENT_TYPE_PLAIN_0_0_4


class ModelMetrics:
    """One served model's series.

    Counters and histograms begin at zero, or their first event would be no increase. A gauge has
    no series before it is set.
    """

    def __init__(self, metrics: Metrics, name: str, engine: str = "0") -> None:
        self.name = name
        self.stats = EngineStats()
        self.prices = Prices()
        self._metrics = metrics
        self._labels = (name, engine)
        self._bound: dict[Declaration[Any], Any] = {}  # a step looks no labels up
        self._rss_anon: Gauge | None = None
        self._last = EngineStats()
        self._kv_cache_bytes = 0
        self._described: dict[Declaration[Gauge], tuple[str, ...]] = {}
        for declaration in DECLARATIONS:
            if declaration.labels == MODEL and declaration.kind is not Gauge:
                self[declaration]
        for reason in _ENDED:
            self._of(declared.REQUESTS_ENDED, reason)
        for reason in _REJECTED:
            self._of(declared.ADMISSION_REJECTIONS, reason)
        by_source = declared.PROMPT_TOKENS_BY_SOURCE
        self._computed_prompt_tokens = self._of(by_source, "local_compute")
        self._cached_prompt_tokens = self._of(by_source, "local_cache_hit")
        self._cached_on_device = self._of(declared.PROMPT_TOKENS_CACHED_BY_SOURCE, "device")
        self._waiting_for_capacity = self._of(declared.REQUESTS_WAITING_BY_REASON, "capacity")
        self._of(declared.REQUESTS_WAITING_BY_REASON, "deferred").set(0)
        self.on_down()
        self[declared.ENGINE_LOADING].set(1)

    def __getitem__(self, declaration: Declaration[Instrument]) -> Instrument:
        """Return this model's series of a metric whose labels are MODEL."""
        bound: Instrument | None = self._bound.get(declaration)
        if bound is None:
            bound = self._bound[declaration] = self._of(declaration)
        return bound

    def on_ready(self, info: EngineInfo) -> None:
        """Take in that the engine takes requests, and what it says of itself."""
        self._last = EngineStats()  # a restarted engine counts from 0
        self._set_up(True)
        self[declared.PARAMETERS].set(info.num_parameters)
        self[declared.FALLBACK].set(info.fallback is not None)
        self._describe(
            declared.CACHE_CONFIG, str(info.block_size), str(info.num_blocks), info.kv_cache_dtype
        )
        self._describe(
            declared.MODEL_INFO,
            info.weights,
            info.backend,
            info.device,
            info.device_name,
            info.dtype,
        )
        self._kv_cache_bytes = info.memory.kv_cache_bytes
        for field in MemoryUse.__struct_fields__:
            num_bytes = getattr(info.memory, field)
            if num_bytes is not None:
                kind = field.removesuffix("_bytes")
                self._metrics[declared.MEMORY].labels(self.name, kind).set(num_bytes)
        for context in _ARITHMETIC_CONTEXTS:
            joules = estimate_of(info, context)
            if joules is not None:
                self._of(declared.ARITHMETIC, str(context)).set(joules)

    def on_restart(self) -> None:
        """Take in that the engine is started again."""
        self[declared.ENGINE_RESTARTS].inc()

    def on_down(self) -> None:
        """Take in that the engine is gone, or not there yet: nothing runs, no block is in use."""
        self._set_up(False)
        self[declared.REQUESTS_RUNNING].set(0)
        self[declared.REQUESTS_WAITING].set(0)
        self._waiting_for_capacity.set(0)
        self[declared.KV_CACHE_USAGE].set(0)
        self[declared.KV_CACHE_USED].set(0)
        if self._rss_anon is not None:
            self._rss_anon.set(0)

    def on_stats(self, stats: EngineStats) -> None:
        """Take in the engine's figures, after every step and heartbeat.

        The engine's counters begin anew when it restarts; the series go on.
        """
        self.stats = stats
        self[declared.REQUESTS_RUNNING].set(stats.num_running)
        self[declared.REQUESTS_WAITING].set(stats.num_waiting)
        self._waiting_for_capacity.set(stats.num_waiting)
        usage = stats.num_blocks_used / max(stats.num_blocks, 1)
        self[declared.KV_CACHE_USAGE].set(usage)
        self[declared.KV_CACHE_USED].set(usage * self._kv_cache_bytes)
        if stats.rss_anon_bytes is not None:
            if self._rss_anon is None:
                self._rss_anon = self._metrics[declared.RSS_ANON].labels(self.name)
            self._rss_anon.set(stats.rss_anon_bytes)
        last = self._last
        if stats.num_steps == last.num_steps:
            return
        self._last = stats
        self[declared.STEP_TIME].observe(stats.step_s)
        for declaration, now, before in (
            (declared.PREEMPTIONS, stats.num_preemptions, last.num_preemptions),
            (
                declared.PREFIX_CACHE_QUERIES,
                stats.num_prefix_cache_queries,
                last.num_prefix_cache_queries,
            ),
            (declared.PREFIX_CACHE_HITS, stats.num_prefix_cache_hits, last.num_prefix_cache_hits),
            (declared.DRAFTS, stats.num_drafts, last.num_drafts),
            (declared.DRAFT_TOKENS, stats.num_draft_tokens, last.num_draft_tokens),
            (declared.ACCEPTED_TOKENS, stats.num_accepted_tokens, last.num_accepted_tokens),
            (declared.STEPS, stats.num_steps, last.num_steps),
            (declared.BUSY_SECONDS, stats.busy_s, last.busy_s),
        ):
            if now != before:
                self[declaration].inc(_increase(now, before))
        num_prompt = _increase(stats.num_prompt_tokens, last.num_prompt_tokens)
        num_drawn = _increase(stats.num_generation_tokens, last.num_generation_tokens)
        if num_drawn:  # vLLM knows nothing of a step that draws nothing
            self[declared.ITERATION_TOKENS].observe(num_prompt + num_drawn)
            self[declared.GENERATION_TOKENS].inc(num_drawn)
        if num_prompt:
            num_cached = _increase(stats.num_cached_prompt_tokens, last.num_cached_prompt_tokens)
            self[declared.PROMPT_TOKENS].inc(num_prompt)
            self[declared.PROMPT_TOKENS_CACHED].inc(num_cached)
            self._computed_prompt_tokens.inc(num_prompt - num_cached)
            self._cached_prompt_tokens.inc(num_cached)
            self._cached_on_device.inc(num_cached)

    def describe_energy(self, source: str | None, reason: str) -> None:
        """Show what measures this model's energy, or why nothing does; called once."""
        is_measured = source is not None
        self._of(declared.ENERGY_AVAILABLE, source or "none", reason).set(is_measured)

    def add_energy(self, source: str, attribution: str, shares: dict[Phase, float]) -> None:
        """Count measured joules, by what they went into."""
        for phase, joules in shares.items():
            self._of(declared.ENERGY, source, attribution, phase).inc(joules)

    def set_idle_power(self, source: str, watts: float) -> None:
        """Show the device's power while nothing runs."""
        self._of(declared.IDLE_POWER, source).set(watts)

    def set_prices(self, prices: Prices) -> None:
        """Show the prices that are set; one that isn't has no series."""
        self.prices = prices
        for declaration, price in (
            (declared.USD_PER_HOUR, prices.usd_per_hour),
            (declared.USD_PER_KWH, prices.usd_per_kwh),
            (declared.PUE, prices.pue),
            (declared.GCO2_PER_KWH, prices.gco2_per_kwh),
        ):
            if price is not None:
                self[declaration].set(price)

    def on_rejected(self, reason: str) -> None:
        """Count a request turned away."""
        self._of(declared.ADMISSION_REJECTIONS, reason).inc()

    def on_ended(self, reason: str) -> None:
        """Count a request that ended."""
        self._of(declared.REQUESTS_ENDED, reason).inc()

    def _set_up(self, is_up: bool) -> None:
        self[declared.ENGINE_UP].set(is_up)
        self[declared.ENGINE_LOADING].set(0)
        for state in _SLEEP_STATES:
            if is_up:
                self._of(declared.SLEEP_STATE, state).set(state == "awake")
            else:  # vLLM's dashboards take what isn't awake for asleep, what has no series for down
                self._metrics[declared.SLEEP_STATE].remove(*self._labels, state)

    def _of(self, declaration: Declaration[Instrument], *labels: str) -> Instrument:
        return self._metrics[declaration].labels(*self._labels, *labels)

    def _describe(self, declaration: Declaration[Gauge], *labels: str) -> None:
        """Set the one series that says these labels; what an engine before this one said goes."""
        before = self._described.get(declaration)
        if before is not None and before != labels:
            self._metrics[declaration].remove(*self._labels, *before)
        self._described[declaration] = labels
        self._of(declaration, *labels).set(1)


def _increase(now: float, before: float) -> float:
    """Return by how much a counter grew that begins anew when its engine does."""
    return now - before if now >= before else now


def _make(declaration: Declaration[Any], registry: CollectorRegistry) -> Any:
    buckets = {"buckets": declaration.buckets} if declaration.buckets else {}
    return declaration.kind(
        declaration.name, declaration.help, declaration.labels, registry=registry, **buckets
    )
