"""How full it is: tokens, cache, memory, power, and what a token costs at this load."""

from deploy.grafana.panels import Dashboard, Panel, Query, Row
from deploy.grafana.promql import SCOPE, STANDARD_VARIABLES, TARGET, gauge, quantile, rate, ratio

__all__ = ["CAPACITY"]


def _lengths(title: str, histogram: str) -> Panel:
    return Panel(
        title=title,
        unit="none",
        queries=[
            Query(quantile(q, histogram), f"{{{{model_name}}}} p{q * 100:g}", "empty")
            for q in (0.5, 0.95)
        ],
        description="Tokens.",
    )


_TOKENS = Row(
    "Tokens",
    [
        Panel(
            title="Tokens a second",
            unit="none",
            queries=[
                Query(rate("vllm:prompt_tokens_total"), "{{model_name}} in"),
                Query(rate("vllm:generation_tokens_total"), "{{model_name}} out"),
            ],
            description="Prompt tokens taken in and tokens generated.",
        ),
        _lengths("Prompt of a request", "vllm:request_prompt_tokens"),
        _lengths("Answer of a request", "vllm:request_generation_tokens"),
        _lengths("Longest answer that a request allows", "vllm:request_params_max_tokens"),
        Panel(
            title="Choices of a request",
            unit="none",
            queries=[
                Query(
                    ratio(rate("vllm:request_params_n_sum"), rate("vllm:request_params_n_count")),
                    "{{model_name}}",
                    "empty",
                )
            ],
            description="Mean of what requests ask for; each is computed apart.",
        ),
        Panel(
            title="Tokens of a step",
            unit="none",
            queries=[
                Query(
                    ratio(
                        rate("vllm:iteration_tokens_total_sum"),
                        rate("vllm:iteration_tokens_total_count"),
                    ),
                    "{{model_name}}",
                    "empty",
                )
            ],
            description="Mean of steps that draw tokens; a prompt counts with its first token.",
        ),
        Panel(
            title="Prompt tokens found in the prefix cache",
            unit="percentunit",
            queries=[
                Query(
                    ratio(
                        rate("vllm:prefix_cache_hits_total"),
                        rate("vllm:prefix_cache_queries_total"),
                    ),
                    "{{model_name}}",
                    "empty",
                )
            ],
            description="Of those looked up.",
        ),
        Panel(
            title="Drafted tokens that were drawn as well",
            unit="percentunit",
            queries=[
                Query(
                    ratio(
                        rate("vllm:spec_decode_num_accepted_tokens_total"),
                        rate("vllm:spec_decode_num_draft_tokens_total"),
                    ),
                    "{{model_name}}",
                    "empty",
                )
            ],
            description="Of those verified, with --speculate ngram.",
        ),
        Panel(
            title="Tokens that a verification brings",
            unit="short",
            queries=[
                Query(
                    ratio(
                        rate("vllm:spec_decode_num_accepted_tokens_total"),
                        rate("vllm:spec_decode_num_drafts_total"),
                    ),
                    "{{model_name}}",
                    "empty",
                )
            ],
            description="Besides the one that any step brings.",
        ),
        Panel(
            title="Busy share",
            unit="percentunit",
            queries=[Query(rate("bitwatt_engine_busy_seconds_total"), "{{model_name}}")],
            description="What is left is room, or time without requests.",
        ),
    ],
)

_MEMORY = Row(
    "Memory",
    [
        Panel(
            title="Memory of engines, by kind",
            unit="bytes",
            is_stacked=True,
            queries=[
                Query(
                    "sum by (model_name, kind) "
                    f'(bitwatt_memory_bytes{{{SCOPE},kind!="device_total"}})',
                    "{{model_name}} {{kind}}",
                )
            ],
            description="Weights by kind, and the KV cache's pool.",
        ),
        Panel(
            title="KV cache",
            unit="bytes",
            queries=[
                Query(gauge("bitwatt_kv_cache_used_bytes"), "{{model_name}} in use"),
                Query(
                    f'sum by (model_name) (bitwatt_memory_bytes{{{SCOPE},kind="kv_cache"}})',
                    "{{model_name}} pool",
                ),
            ],
            description="Blocks in use, of the pool.",
        ),
        Panel(
            title="KV-cache blocks",
            unit="none",
            kind="table",
            queries=[
                Query(
                    "max by (model_name, block_size, num_gpu_blocks, cache_dtype) "
                    f"(vllm:cache_config_info{{{SCOPE}}})",
                    "{{model_name}}",
                )
            ],
            description="How the KV cache is laid out.",
        ),
        Panel(
            title="Parameters",
            unit="short",
            kind="stat",
            queries=[Query(gauge("bitwatt_model_parameters", "max"), "{{model_name}}")],
            description="Of each model, whatever its bits.",
        ),
    ],
)

_POWER = Row(
    "GPU, power and cost, where they are measured and priced",
    [
        Panel(
            title="GPU memory in use",
            unit="mbytes",
            queries=[
                Query(
                    f"max by (instance, gpu, modelName) (DCGM_FI_DEV_FB_USED{{{TARGET}}})",
                    "{{instance}} GPU {{gpu}}",
                )
            ],
            description="The driver's view: every process. Empty without an NVIDIA GPU.",
        ),
        Panel(
            title="GPU power (measured)",
            unit="watt",
            queries=[
                Query(
                    f"max by (instance, gpu, modelName) (DCGM_FI_DEV_POWER_USAGE{{{TARGET}}})",
                    "{{instance}} GPU {{gpu}} now",
                ),
                Query(
                    "sum by (instance, gpu) (rate(DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"
                    f"{{{TARGET}}}[$__rate_interval])) / 1000",
                    "{{instance}} GPU {{gpu}} by its counter",
                ),
            ],
            description="Of the whole board. Empty without an NVIDIA GPU.",
        ),
        Panel(
            title="Energy per output token over five minutes (measured)",
            unit="joule",
            queries=[
                Query(
                    gauge("bitwatt:joules_per_output_token:rate5m", "avg"),
                    "{{model_name}}",
                    "empty",
                )
            ],
            description="Gross, mean of servers. It falls as load rises: see requests running.",
        ),
        Panel(
            title="Rent per million output tokens over five minutes",
            unit="currencyUSD",
            queries=[
                Query(
                    gauge("bitwatt:usd_of_rent_per_million_output_tokens:rate5m", "avg"),
                    "{{model_name}}",
                    "empty",
                )
            ],
            description="At the price set, mean of servers. It falls as load rises.",
        ),
        Panel(
            title="Requests running",
            unit="none",
            queries=[Query(gauge("vllm:num_requests_running"), "{{model_name}}")],
            description="The load at which the figures beside it hold.",
        ),
    ],
    is_collapsed=True,
)

CAPACITY = Dashboard(
    uid="bitwatt-capacity",
    title="bitwatt: capacity",
    description="Tokens, cache, memory, power, and the price of a token at this load.",
    variables=STANDARD_VARIABLES,
    rows=(_TOKENS, _MEMORY, _POWER),
)
