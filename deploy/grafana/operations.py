"""Is it up, is it slow, does it turn callers away."""

from deploy.grafana.panels import Dashboard, Panel, Query, Row
from deploy.grafana.promql import SCOPE, STANDARD_VARIABLES, TARGET, gauge, quantile, rate, ratio

__all__ = ["OPERATIONS"]


def _latency(title: str, histogram: str, description: str) -> Panel:
    return Panel(
        title=title,
        unit="s",
        queries=[
            Query(quantile(q, histogram), f"{{{{model_name}}}} p{q * 100:g}", "empty")
            for q in (0.5, 0.95, 0.99)
        ],
        description=description,
    )


_STATE = Row(
    "State",
    [
        Panel(
            title="Targets up",
            unit="bool_yes_no",
            kind="stat",
            width=6,
            height=5,
            queries=[Query(f"min by (job) (up{{{TARGET}}})", "{{job}}")],
            description="Whether Prometheus reaches every server.",
        ),
        Panel(
            title="Engines up",
            unit="bool_yes_no",
            kind="stat",
            width=6,
            height=5,
            queries=[
                Query(gauge("bitwatt_engine_up", "min"), "{{model_name}}"),
                Query(gauge("bitwatt_engine_loading", "max"), "{{model_name}} loads"),
            ],
            description="Whether every engine takes requests, or loads for the first time.",
        ),
        Panel(
            title="Energy measured",
            unit="bool_yes_no",
            kind="stat",
            width=6,
            height=5,
            queries=[
                Query(
                    f"max by (model_name, reason) (bitwatt_energy_available{{{SCOPE}}})",
                    "{{model_name}} {{reason}}",
                )
            ],
            description="Whether the devices' counters can be read, and why not.",
        ),
        Panel(
            title="Served",
            unit="none",
            kind="table",
            width=6,
            height=5,
            queries=[
                Query(
                    "max by (model_name, weights, backend, device_name, dtype) "
                    f"(bitwatt_model_info{{{SCOPE}}})",
                    "{{model_name}}",
                )
            ],
            description="What serves each model.",
        ),
    ],
)

_REQUESTS = Row(
    "Requests",
    [
        Panel(
            title="Running and waiting",
            unit="none",
            queries=[
                Query(gauge("vllm:num_requests_running"), "{{model_name}} running"),
                Query(gauge("vllm:num_requests_waiting"), "{{model_name}} waiting"),
            ],
            description="Requests in the engines' batches, and before them.",
        ),
        Panel(
            title="Ended, by how",
            unit="reqps",
            queries=[
                Query(
                    rate("vllm:request_success_total", by="model_name, finished_reason"),
                    "{{model_name}} {{finished_reason}}",
                )
            ],
            description="stop, length, abort or error.",
        ),
        Panel(
            title="Engines started again",
            unit="short",
            queries=[
                Query(
                    "sum by (model_name) "
                    f"(increase(bitwatt_engine_restarts_total{{{SCOPE}}}[$__rate_interval]))",
                    "{{model_name}}",
                )
            ],
            description="After a death or a silence; the server's log says why.",
        ),
        Panel(
            title="Turned away, by why",
            unit="reqps",
            queries=[
                Query(
                    rate("vllm:admission_rejections_total", by="model_name, reason"),
                    "{{model_name}} {{reason}}",
                )
            ],
            description="The queue was full, or the engine was not there.",
        ),
        Panel(
            title="HTTP answers to callers, by status",
            unit="reqps",
            queries=[
                Query(
                    "sum by (handler, code) "
                    f"(rate(http_requests_total{{{TARGET}}}[$__rate_interval]))",
                    "{{handler}} {{code}}",
                    "empty",
                )
            ],
            description="499: the caller left first.",
        ),
        Panel(
            title="HTTP answers to probes and scrapes, by status",
            unit="reqps",
            queries=[
                Query(
                    "sum by (handler, code) "
                    f"(rate(bitwatt_probe_requests_total{{{TARGET}}}[$__rate_interval]))",
                    "{{handler}} {{code}}",
                )
            ],
            description="In no rate of errors: a model that loads is not ready, and no error.",
        ),
        Panel(
            title="Fields passed over",
            unit="ops",
            queries=[
                Query(
                    "sum by (handler) "
                    f"(rate(bitwatt_ignored_fields_total{{{TARGET}}}[$__rate_interval]))",
                    "{{handler}}",
                    "absent",
                )
            ],
            description="Fields of requests that no API known here defines; the answer's header "
            "names them.",
            if_absent="none",
        ),
        Panel(
            title="Mean time of an HTTP answer to callers",
            unit="s",
            queries=[
                Query(
                    ratio(
                        "sum by (handler) (rate(http_request_duration_seconds_sum"
                        f"{{{TARGET}}}[$__rate_interval]))",
                        "sum by (handler) (rate(http_request_duration_seconds_count"
                        f"{{{TARGET}}}[$__rate_interval]))",
                    ),
                    "{{handler}}",
                    "empty",
                )
            ],
            description="To the last byte of its stream.",
        ),
        Panel(
            title="Share of 5xx",
            unit="percentunit",
            queries=[Query("max by (job) (bitwatt:http_5xx:ratio5m)", "{{job}}")],
            description="Of callers' requests over five minutes, of each job's worst server.",
        ),
        Panel(
            title="Preemptions",
            unit="cps",
            queries=[Query(rate("vllm:num_preemptions_total"), "{{model_name}}")],
            description="Requests set back because the KV cache was full.",
        ),
    ],
)

_LATENCY = Row(
    "Latency",
    [
        _latency(
            "Time to first token", "vllm:time_to_first_token_seconds", "Arrival to first token."
        ),
        _latency("Between tokens", "vllm:inter_token_latency_seconds", "One token to the next."),
        _latency(
            "Per output token",
            "vllm:request_time_per_output_token_seconds",
            "A request's mean after its first token.",
        ),
        _latency("Whole request", "vllm:e2e_request_latency_seconds", "Arrival to last token."),
        _latency("Waiting", "vllm:request_queue_time_seconds", "In the engine's queue."),
        _latency("Prefill", "vllm:request_prefill_time_seconds", "From running to first token."),
        _latency("Decode", "vllm:request_decode_time_seconds", "From first to last token."),
        _latency("Running", "vllm:request_inference_time_seconds", "Prefill and decode."),
        _latency("Step", "bitwatt_engine_step_seconds", "One step of an engine."),
    ],
)

_ENGINE = Row(
    "Engines and processes",
    [
        Panel(
            title="Steps a second",
            unit="cps",
            queries=[Query(rate("bitwatt_engine_steps_total"), "{{model_name}}")],
            description="Steps the engines ran.",
        ),
        Panel(
            title="Busy share",
            unit="percentunit",
            queries=[Query(rate("bitwatt_engine_busy_seconds_total"), "{{model_name}}")],
            description="Share of the time in which a step ran.",
        ),
        Panel(
            title="KV cache in use",
            unit="percentunit",
            queries=[Query(gauge("vllm:kv_cache_usage_perc", "max"), "{{model_name}}")],
            description="Share of its blocks.",
        ),
        Panel(
            title="Anonymous memory of processes",
            unit="bytes",
            queries=[
                Query(
                    f"sum by (instance, process) (bitwatt_rss_anon_bytes{{{TARGET}}})",
                    "{{instance}} {{process}}",
                )
            ],
            description="What grows if something leaks.",
        ),
        Panel(
            title="Processors that the API's process keeps busy",
            unit="none",
            queries=[
                Query(
                    "sum by (instance) "
                    f"(rate(process_cpu_seconds_total{{{TARGET}}}[$__rate_interval]))",
                    "{{instance}}",
                )
            ],
            description="HTTP and text. Near 1 its loop is what callers wait for.",
        ),
        Panel(
            title="Open files of the API's process",
            unit="percentunit",
            queries=[
                Query(
                    ratio(
                        f"sum by (instance) (process_open_fds{{{TARGET}}})",
                        f"sum by (instance) (process_max_fds{{{TARGET}}})",
                    ),
                    "{{instance}}",
                )
            ],
            description="Share of those it may open (ulimit -n); a connection is one.",
        ),
        Panel(
            title="Mean time of a step",
            unit="s",
            queries=[
                Query(
                    ratio(
                        rate("bitwatt_engine_step_seconds_sum"),
                        rate("bitwatt_engine_step_seconds_count"),
                    ),
                    "{{model_name}}",
                    "empty",
                )
            ],
            description="Seconds in steps over steps.",
        ),
    ],
)

OPERATIONS = Dashboard(
    uid="bitwatt-operations",
    title="bitwatt: operations",
    description="State, errors and latency of the servers.",
    variables=STANDARD_VARIABLES,
    rows=(_STATE, _REQUESTS, _LATENCY, _ENGINE),
)
