"""Every metric this server has, declared once: registry, documentation and tests read this table.

To add one: declare it here, and say the fact where it happens, as
`metrics[HTTP_REQUESTS].labels(...).inc()` or, of one model, `model[STEP_TIME].observe(...)`.

Names, labels and meanings of `vllm:*` are vLLM's, so that dashboards, routers and load tools made
for it read this server unchanged. What is ours begins with `bitwatt_`.
"""

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from prometheus_client import Counter, Gauge, Histogram

__all__ = ["DECLARATIONS", "LABELS", "MODEL", "Declaration", "Group", "Instrument"]

Instrument = TypeVar("Instrument", Counter, Gauge, Histogram)
Group = Literal[
    "Requests",
    "Tokens",
    "Latency",
    "Engine",
    "Memory",
    "Energy",
    "Prices",
    "Mirrored requests",
    "HTTP",
    "GPU, under DCGM's names",
]

MODEL = ("model_name", "engine")
_PAIR = ("model_name", "mirror_name")
_GPU = ("gpu", "UUID", "modelName")

LABELS = {
    "model_name": "the served model's name",
    "engine": "`0`: a model has one engine",
    "finished_reason": "`stop`, `length`, `abort` or `error`",
    "reason": (
        "why: a request was turned away (`queue_full`, `unavailable`) or waits (`capacity`; "
        "vLLM's `deferred` is always 0), or nothing measures"
    ),
    "sleep_state": "`awake`; the others are vLLM's, and always 0 here",
    "weights": "what the engine computes with: ternary or dense weights",
    "backend": "the kernels",
    "device": "`cpu` or `cuda:N`",
    "device_name": "the processor or board",
    "dtype": "of activations and of weights that aren't ternary",
    "block_size": "tokens of a KV-cache block",
    "num_gpu_blocks": "KV-cache blocks, on whatever device",
    "cache_dtype": "of keys and values",
    "kind": (
        "of memory: `packed_weights`, `embedding`, `other_weights`, `kv_cache` or `device_total`; "
        "of tokens: `prompt` or `generation`"
    ),
    "process": "`api`, or a model's name for its engine",
    "source": (
        "what measures: `nvml`, `amdsmi`, `rapl` or `none`; of prompt tokens: `local_compute` or "
        "`local_cache_hit`; of cached ones: `device`, whatever it is"
    ),
    "attribution": "`proportional`, or `proportional_shared` where engines share the device",
    "phase": "`prefill`, `decode`, `idle` or `unattributed`",
    "context": "tokens attended to",
    "mirror_name": "the twin that the request was sent to as well",
    "outcome": "`compared`, `preempted`, `dropped`, `failed` or `abandoned`",
    "side": "`original` or `mirror`",
    "handler": "the route, or `unmatched`",
    "method": "of HTTP",
    "status": "the class of `code`, as `2xx`",
    "code": "HTTP's status; 499 where the caller left first",
    "gpu": "the board's index",
    "UUID": "the board's",
    "modelName": "the board's name",
}
"""What each label says."""

# Each has vLLM's bounds, and finer ones below them where a small model's values lie.
_TTFT_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_PER_TOKEN_S = (
    0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
    0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_LATENCY_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2,
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_TOKENS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip
_CHOICES = (1, 2, 5, 10, 20, 50, 100)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
_STEP_S = (
    0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.25, 0.5, 1, 2, 4, 8, 16, 32,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_HTTP_S = (0.001, 0.01, 0.1, 0.5, 1, 10, 60)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Declaration(Generic[Instrument]):
    """One metric. Equal to itself alone, so that looking it up costs no more than an attribute.

    name     without the suffixes that its kind's series have
    buckets  a histogram's upper bounds
    """

    kind: type[Instrument]
    group: Group
    name: str
    help: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its series, as Prometheus has them."""
        if self.kind is Counter:
            return (f"{self.name}_total",)
        if self.kind is Histogram:
            return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))
        return (self.name,)


DECLARATIONS: list[Declaration[Any]] = []


def _declare(
    kind: type[Instrument],
    group: Group,
    name: str,
    text: str,
    labels: tuple[str, ...] = MODEL,
    buckets: tuple[float, ...] = (),
) -> Declaration[Instrument]:
    made = Declaration(kind=kind, group=group, name=name, help=text, labels=labels, buckets=buckets)
    DECLARATIONS.append(made)
    return made


REQUESTS_RUNNING = _declare(
    Gauge, "Requests", "vllm:num_requests_running", "Requests in the engine's batches."
)
REQUESTS_WAITING = _declare(
    Gauge, "Requests", "vllm:num_requests_waiting", "Requests waiting to be processed."
)
REQUESTS_WAITING_BY_REASON = _declare(
    Gauge,
    "Requests",
    "vllm:num_requests_waiting_by_reason",
    "Requests waiting to be processed, by why.",
    (*MODEL, "reason"),
)
REQUESTS_ENDED = _declare(
    Counter,
    "Requests",
    "vllm:request_success",
    "Choices that ended, by how.",
    (*MODEL, "finished_reason"),
)
ADMISSION_REJECTIONS = _declare(
    Counter,
    "Requests",
    "vllm:admission_rejections",
    "Requests turned away, by why.",
    (*MODEL, "reason"),
)
PREEMPTIONS = _declare(
    Counter, "Requests", "vllm:num_preemptions", "Requests preempted by the engine."
)

REQUEST_N = _declare(
    Histogram,
    "Requests",
    "vllm:request_params_n",
    "Choices that a request asks for.",
    buckets=_CHOICES,
)
REQUEST_PREEMPTIONS = _declare(
    Histogram,
    "Requests",
    "vllm:request_num_preemptions",
    "How often a choice was preempted.",
    buckets=_PREEMPTIONS,
)
REQUEST_MAX_TOKENS = _declare(
    Histogram,
    "Requests",
    "vllm:request_params_max_tokens",
    "Most tokens that a choice may have.",
    buckets=_TOKENS,
)

PROMPT_TOKENS = _declare(
    Counter, "Tokens", "vllm:prompt_tokens", "Prompt tokens processed, cached ones included."
)
PROMPT_TOKENS_BY_SOURCE = _declare(
    Counter,
    "Tokens",
    "vllm:prompt_tokens_by_source",
    "Prompt tokens processed, by where their keys and values came from.",
    (*MODEL, "source"),
)
PROMPT_TOKENS_CACHED = _declare(
    Counter, "Tokens", "vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache."
)
PROMPT_TOKENS_CACHED_BY_SOURCE = _declare(
    Counter,
    "Tokens",
    "vllm:prompt_tokens_cached_by_source",
    "Prompt tokens found in the prefix cache, by what held them.",
    (*MODEL, "source"),
)
GENERATION_TOKENS = _declare(Counter, "Tokens", "vllm:generation_tokens", "Tokens generated.")
PREFIX_CACHE_QUERIES = _declare(
    Counter, "Tokens", "vllm:prefix_cache_queries", "Tokens looked up in the prefix cache."
)
PREFIX_CACHE_HITS = _declare(
    Counter, "Tokens", "vllm:prefix_cache_hits", "Tokens found in the prefix cache."
)
DRAFTS = _declare(
    Counter, "Tokens", "vllm:spec_decode_num_drafts", "Times that drafts of a choice were verified."
)
DRAFT_TOKENS = _declare(
    Counter, "Tokens", "vllm:spec_decode_num_draft_tokens", "Tokens drafted, and verified."
)
ACCEPTED_TOKENS = _declare(
    Counter,
    "Tokens",
    "vllm:spec_decode_num_accepted_tokens",
    "Drafted tokens that were drawn as well.",
)
REQUEST_PROMPT_TOKENS = _declare(
    Histogram,
    "Tokens",
    "vllm:request_prompt_tokens",
    "Prompt tokens of a choice.",
    buckets=_TOKENS,
)
REQUEST_GENERATION_TOKENS = _declare(
    Histogram,
    "Tokens",
    "vllm:request_generation_tokens",
    "Generated tokens of a choice.",
    buckets=_TOKENS,
)
REQUEST_LONGEST_CHOICE = _declare(
    Histogram,
    "Tokens",
    "vllm:request_max_num_generation_tokens",
    "Generated tokens of a request's longest choice.",
    buckets=_TOKENS,
)
REQUEST_COMPUTED_TOKENS = _declare(
    Histogram,
    "Tokens",
    "vllm:request_prefill_kv_computed_tokens",
    "Prompt tokens of a choice that were not in the prefix cache.",
    buckets=_TOKENS,
)
ITERATION_TOKENS = _declare(
    Histogram,
    "Tokens",
    "vllm:iteration_tokens_total",
    "Tokens that one engine step drew, and the prompts whose first token was among them.",
    buckets=_STEP_TOKENS,
)

TIME_TO_FIRST_TOKEN = _declare(
    Histogram,
    "Latency",
    "vllm:time_to_first_token_seconds",
    "Arrival of the request's head to first token.",
    buckets=_TTFT_S,
)
INTER_TOKEN_LATENCY = _declare(
    Histogram,
    "Latency",
    "vllm:inter_token_latency_seconds",
    "One token to the next.",
    buckets=_PER_TOKEN_S,
)
TIME_PER_OUTPUT_TOKEN = _declare(
    Histogram,
    "Latency",
    "vllm:request_time_per_output_token_seconds",
    "A request's mean time per token after the first.",
    buckets=_PER_TOKEN_S,
)
E2E_LATENCY = _declare(
    Histogram,
    "Latency",
    "vllm:e2e_request_latency_seconds",
    "Arrival of the request's head to its end.",
    buckets=_LATENCY_S,
)
QUEUE_TIME = _declare(
    Histogram,
    "Latency",
    "vllm:request_queue_time_seconds",
    "Time waiting in the engine.",
    buckets=_LATENCY_S,
)
INFERENCE_TIME = _declare(
    Histogram,
    "Latency",
    "vllm:request_inference_time_seconds",
    "Time running in the engine.",
    buckets=_LATENCY_S,
)
PREFILL_TIME = _declare(
    Histogram,
    "Latency",
    "vllm:request_prefill_time_seconds",
    "Time from running to first token.",
    buckets=_LATENCY_S,
)
DECODE_TIME = _declare(
    Histogram,
    "Latency",
    "vllm:request_decode_time_seconds",
    "Time from first to last token.",
    buckets=_LATENCY_S,
)

ENGINE_UP = _declare(Gauge, "Engine", "bitwatt_engine_up", "1 while the engine takes requests.")
ENGINE_LOADING = _declare(
    Gauge, "Engine", "bitwatt_engine_loading", "1 while the engine loads for the first time."
)
ENGINE_RESTARTS = _declare(
    Counter, "Engine", "bitwatt_engine_restarts", "Times the engine was started again."
)
SLEEP_STATE = _declare(
    Gauge,
    "Engine",
    "vllm:engine_sleep_state",
    "1 for the state that the engine is in; no series where it takes no requests.",
    (*MODEL, "sleep_state"),
)
STEPS = _declare(Counter, "Engine", "bitwatt_engine_steps", "Steps the engine ran.")
BUSY_SECONDS = _declare(Counter, "Engine", "bitwatt_engine_busy_seconds", "Seconds spent in steps.")
STEP_TIME = _declare(
    Histogram, "Engine", "bitwatt_engine_step_seconds", "Time of one step.", buckets=_STEP_S
)
MODEL_INFO = _declare(
    Gauge,
    "Engine",
    "bitwatt_model_info",
    "What serves a model; always 1.",
    (*MODEL, "weights", "backend", "device", "device_name", "dtype"),
)
FALLBACK = _declare(
    Gauge,
    "Engine",
    "bitwatt_backend_fallback",
    "1 where a slower backend runs than could, as where kernels are not built; 0 where none does.",
)
PARAMETERS = _declare(Gauge, "Engine", "bitwatt_model_parameters", "Parameters of the model.")

KV_CACHE_USAGE = _declare(
    Gauge, "Memory", "vllm:kv_cache_usage_perc", "KV-cache blocks in use; 1 means all of them."
)
CACHE_CONFIG = _declare(
    Gauge,
    "Memory",
    "vllm:cache_config_info",
    "How the KV cache is laid out; always 1.",
    (*MODEL, "block_size", "num_gpu_blocks", "cache_dtype"),
)
KV_CACHE_USED = _declare(
    Gauge, "Memory", "bitwatt_kv_cache_used_bytes", "Memory of the KV-cache blocks in use."
)
MEMORY = _declare(
    Gauge,
    "Memory",
    "bitwatt_memory_bytes",
    "Memory the engine holds, by kind, and its device's.",
    ("model_name", "kind"),
)
RSS_ANON = _declare(
    Gauge,
    "Memory",
    "bitwatt_rss_anon_bytes",
    "Anonymous memory of a process: `api`, or the engine of a model.",
    ("process",),
)

ENERGY_AVAILABLE = _declare(
    Gauge,
    "Energy",
    "bitwatt_energy_available",
    "1 where the device's energy is measured, else 0 and the reason.",
    (*MODEL, "source", "reason"),
)
ENERGY = _declare(
    Counter,
    "Energy",
    "bitwatt_energy_joules",
    "Measured energy of the model's device, idle included, by what it went into.",
    (*MODEL, "source", "attribution", "phase"),
)
IDLE_POWER = _declare(
    Gauge,
    "Energy",
    "bitwatt_idle_power_watts",
    "Power of the model's device while it is loaded and nothing runs.",
    (*MODEL, "source"),
)
ARITHMETIC = _declare(
    Gauge,
    "Energy",
    "bitwatt_estimated_arithmetic_joules_per_token",
    "Estimate of the BitNet papers for the multiply-adds alone; not measured energy.",
    (*MODEL, "context"),
)

USD_PER_HOUR = _declare(
    Gauge, "Prices", "bitwatt_price_usd_per_hour", "Rent of what the engine runs on, as set."
)
USD_PER_KWH = _declare(
    Gauge, "Prices", "bitwatt_price_usd_per_kwh", "Price of electricity, as set."
)
PUE = _declare(Gauge, "Prices", "bitwatt_pue", "Power usage effectiveness, as set.")
GCO2_PER_KWH = _declare(
    Gauge, "Prices", "bitwatt_grid_gco2_per_kwh", "Carbon intensity of the grid in grams, as set."
)

SHADOW_REQUESTS = _declare(
    Counter,
    "Mirrored requests",
    "bitwatt_shadow_requests",
    "Requests to a model that were to be mirrored to the other, by what came of it.",
    (*_PAIR, "outcome"),
)
SHADOW_WAITING = _declare(
    Gauge,
    "Mirrored requests",
    "bitwatt_shadow_waiting",
    "Mirrors that wait until no caller's request is open on the twin's device.",
    _PAIR,
)
SHADOW_LATENCY = _declare(
    Histogram,
    "Mirrored requests",
    "bitwatt_shadow_latency_seconds",
    "Start to last token of a mirrored pair, by side: original or mirror.",
    (*_PAIR, "side"),
    buckets=_LATENCY_S,
)
SHADOW_TIME_TO_FIRST_TOKEN = _declare(
    Histogram,
    "Mirrored requests",
    "bitwatt_shadow_time_to_first_token_seconds",
    "Start to first text of a mirrored pair, by side: original or mirror.",
    (*_PAIR, "side"),
    buckets=_TTFT_S,
)
SHADOW_TOKENS = _declare(
    Counter,
    "Mirrored requests",
    "bitwatt_shadow_tokens",
    "Tokens of mirrored pairs. Those of the mirror are in its engine's counters too, and "
    "in no caller's usage.",
    (*_PAIR, "side", "kind"),
)
SHADOW_ENERGY = _declare(
    Counter,
    "Mirrored requests",
    "bitwatt_shadow_energy_joules",
    "Measured energy of mirrored pairs' requests, by side; no series where none is.",
    (*_PAIR, "side"),
)
SHADOW_AGREEMENT = _declare(
    Histogram,
    "Mirrored requests",
    "bitwatt_shadow_text_agreement",
    "Share of a greedy pair's longer text before the two part; 1 where they are equal.",
    _PAIR,
    buckets=_SHARES,
)

HTTP_REQUESTS = _declare(
    Counter,
    "HTTP",
    "http_requests",
    "Callers' requests, by route.",
    ("handler", "method", "status", "code"),
)
HTTP_DURATION = _declare(
    Histogram,
    "HTTP",
    "http_request_duration_seconds",
    "Head of a caller's request to the end of its answer, by route.",
    ("handler", "method"),
    buckets=_HTTP_S,
)
PROBE_REQUESTS = _declare(
    Counter,
    "HTTP",
    "bitwatt_probe_requests",
    "Requests that only watch the server, by route: probes, scrapes, the page and its polling.",
    ("handler", "code"),
)

IGNORED_FIELDS = _declare(
    Counter,
    "HTTP",
    "bitwatt_ignored_fields",
    "Fields of requests that no API known here defines, and that were passed over.",
    ("handler",),
)

GPU_POWER = _declare(
    Gauge,
    "GPU, under DCGM's names",
    "DCGM_FI_DEV_POWER_USAGE",
    "Power draw of the GPU (in W).",
    _GPU,
)
GPU_ENERGY = _declare(
    Gauge,
    "GPU, under DCGM's names",
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",
    "Energy of the GPU since its driver was loaded (in mJ).",
    _GPU,
)
GPU_MEMORY_USED = _declare(
    Gauge,
    "GPU, under DCGM's names",
    "DCGM_FI_DEV_FB_USED",
    "Memory of the GPU in use (in MiB).",
    _GPU,
)
