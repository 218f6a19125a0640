"""The twins side by side: what 1.58-bit weights save on this traffic, or cost."""

from collections.abc import Callable

from deploy.grafana.mirrored import MIRRORED
from deploy.grafana.panels import Dashboard, Panel, Query, Row, Variable
from deploy.grafana.promql import gauge, quantile, rate, ratio

__all__ = ["COMPARISON"]

_SIDES = {
    "ternary": 'job=~"$job",instance=~"$instance",model_name="$ternary"',
    "16-bit": 'job=~"$job",instance=~"$instance",model_name="$baseline"',
}
_EQUAL_LOAD = "Compare at equal load: see running requests and busy share."


def _tokens(scope: str) -> str:
    return rate("vllm:generation_tokens_total", scope)


def _recorded(figure: str) -> Callable[[str], str]:
    """Return the recorded figure of a side, a mean of its servers: rules.yml has the formulas."""
    return lambda scope: gauge(f"bitwatt:{figure}:rate5m", "avg", scope)


_joules_per_token = _recorded("joules_per_output_token")
_rent = _recorded("usd_of_rent_per_million_output_tokens")
_electricity = _recorded("usd_of_electricity_per_million_output_tokens")
_carbon = _recorded("gco2_per_million_output_tokens")


def _dynamic_joules_per_token(scope: str) -> str:
    idle = gauge("bitwatt_idle_power_watts", "avg", scope)
    tokens = gauge("bitwatt:output_tokens:rate5m", "avg", scope)
    return f"{_joules_per_token(scope)} - {ratio(idle, tokens)}"


def _weights(scope: str) -> str:
    kinds = 'kind=~"packed_weights|embedding|other_weights"'
    return f"sum by (model_name) (bitwatt_memory_bytes{{{scope},{kinds}}})"


def _both(expr: Callable[[str], str], *, idle: bool = True) -> list[Query]:
    return [
        Query(expr(scope), f"{side} {{{{model_name}}}}", "data" if idle else "empty")
        for side, scope in _SIDES.items()
    ]


def _saving(expr: Callable[[str], str], *, idle: bool = False) -> list[Query]:
    ternary, baseline = (f"sum({expr(scope)})" for scope in _SIDES.values())
    return [Query(f"1 - {ratio(ternary, baseline)}", "saved", "data" if idle else "empty")]


def _stat(title: str, expr: Callable[[str], str], description: str, *, idle: bool = False) -> Panel:
    return Panel(
        title=title,
        unit="percentunit",
        kind="stat",
        width=6,
        height=5,
        is_saving=True,
        queries=_saving(expr, idle=idle),
        description=f"{description} A negative figure is a loss.",
    )


_SAVINGS = Row(
    "What the ternary weights save",
    [
        _stat("Energy per output token, saved", _joules_per_token, f"Measured. {_EQUAL_LOAD}"),
        _stat("Rent per output token, saved", _rent, f"Over wall-clock time. {_EQUAL_LOAD}"),
        _stat(
            "Memory of weights, saved", _weights, "Packed and other weights, embedding.", idle=True
        ),
        Panel(
            title="Speed, ternary over 16-bit",
            unit="none",
            kind="stat",
            width=6,
            height=5,
            queries=[
                Query(
                    ratio(*(f"sum({_tokens(scope)})" for scope in _SIDES.values())),
                    "times",
                    "empty",
                )
            ],
            description=f"Output tokens a second, one over the other. {_EQUAL_LOAD}",
        ),
        Panel(
            title="Energy per output token, saved over time",
            unit="percentunit",
            width=24,
            height=6,
            is_saving=True,
            queries=_saving(_joules_per_token),
            description="Measured. Below zero the ternary model takes more.",
        ),
    ],
)

_LOAD = Row(
    "Load, to compare at",
    [
        Panel(
            title="Requests running",
            unit="none",
            queries=_both(lambda scope: gauge("vllm:num_requests_running", scope=scope)),
            description="Concurrency: a figure of energy or cost means little without it.",
        ),
        Panel(
            title="Output tokens a second",
            unit="none",
            queries=_both(_tokens),
            description="Tokens generated.",
        ),
        Panel(
            title="Busy share",
            unit="percentunit",
            queries=_both(lambda scope: rate("bitwatt_engine_busy_seconds_total", scope)),
            description="Share of the time in which a step ran.",
        ),
    ],
)

_ENERGY = Row(
    "Energy",
    [
        Panel(
            title="Energy per output token, gross (measured)",
            unit="joule",
            queries=_both(_joules_per_token, idle=False),
            description="The device's counter over tokens in 5 min, idle and prompts included.",
        ),
        Panel(
            title="Energy per output token, dynamic (measured)",
            unit="joule",
            queries=_both(_dynamic_joules_per_token, idle=False),
            description="The same less the idle power seen while the model was loaded.",
        ),
        Panel(
            title="Power, by what it goes into (measured)",
            unit="watt",
            is_stacked=True,
            queries=[
                Query(
                    rate("bitwatt_energy_joules_total", scope, "model_name, phase, attribution"),
                    "{{model_name}} {{phase}} ({{attribution}})",
                )
                for scope in _SIDES.values()
            ],
            description=(
                "A device's joules are spread over steps by their time, then over requests by "
                "their tokens. `proportional_shared`: two engines share the device."
            ),
        ),
        Panel(
            title="Idle power (measured)",
            unit="watt",
            queries=_both(lambda scope: gauge("bitwatt_idle_power_watts", "max", scope)),
            description="Model loaded, nothing running.",
        ),
        Panel(
            title="Energy is measured",
            unit="bool_yes_no",
            queries=[
                Query(
                    f"max by (model_name, source, reason) (bitwatt_energy_available{{{scope}}})",
                    "{{model_name}} {{source}} {{reason}}",
                )
                for scope in _SIDES.values()
            ],
            description="What measures, or why nothing does. Nothing is estimated in its place.",
        ),
        Panel(
            title="Arithmetic alone, per token (estimate of the papers)",
            unit="joule",
            queries=[
                Query(
                    "max by (model_name, context) "
                    f"(bitwatt_estimated_arithmetic_joules_per_token{{{scope}}})",
                    "{{model_name}} at {{context}} tokens of context",
                )
                for scope in _SIDES.values()
            ],
            description=(
                "Multiply-adds at 7 nm, without memory: tens of times below measured energy. "
                "Not added to it, and not priced."
            ),
        ),
    ],
)

_COST = Row(
    "Cost, at the prices set",
    [
        Panel(
            title="Rent per million output tokens",
            unit="currencyUSD",
            queries=_both(_rent, idle=False),
            description=f"Price of an hour over its tokens, at five minutes' rate. {_EQUAL_LOAD}",
        ),
        Panel(
            title="Electricity per million output tokens",
            unit="currencyUSD",
            queries=_both(_electricity, idle=False),
            description="Measured joules at the price of a kWh, times PUE. Rent may include it.",
        ),
        Panel(
            title="Carbon per million output tokens",
            unit="massg",
            queries=_both(_carbon, idle=False),
            description="Measured joules at the grid's intensity, times PUE, in grams of CO₂e.",
        ),
    ],
)

_SPEED = Row(
    "Latency and memory",
    [
        Panel(
            title="Time to first token",
            unit="s",
            queries=[
                Query(
                    quantile(q, "vllm:time_to_first_token_seconds", scope),
                    f"{side} p{q * 100:g}",
                    "empty",
                )
                for side, scope in _SIDES.items()
                for q in (0.5, 0.99)
            ],
            description="Arrival to first token.",
        ),
        Panel(
            title="Time between tokens",
            unit="s",
            queries=[
                Query(
                    quantile(q, "vllm:inter_token_latency_seconds", scope),
                    f"{side} p{q * 100:g}",
                    "empty",
                )
                for side, scope in _SIDES.items()
                for q in (0.5, 0.99)
            ],
            description="One token to the next.",
        ),
        Panel(
            title="Memory, by kind",
            unit="bytes",
            is_stacked=True,
            queries=[
                Query(
                    "sum by (model_name, kind) "
                    f'(bitwatt_memory_bytes{{{scope},kind!="device_total"}})',
                    "{{model_name}} {{kind}}",
                )
                for scope in _SIDES.values()
            ],
            description="What each engine holds. The KV cache is a pool of fixed size.",
        ),
    ],
)

COMPARISON = Dashboard(
    uid="bitwatt-comparison",
    title="bitwatt: ternary and 16-bit twins",
    description="What 1.58-bit weights save in energy, cost and memory on this traffic.",
    variables=(
        Variable(name="job", label="Job", query="label_values(bitwatt_engine_up, job)"),
        Variable(
            name="instance",
            label="Instance",
            query='label_values(bitwatt_engine_up{job=~"$job"}, instance)',
        ),
        Variable(
            name="ternary",
            label="Ternary model",
            query='label_values(bitwatt_model_info{job=~"$job",weights="ternary"}, model_name)',
            is_multi=False,
        ),
        Variable(
            name="baseline",
            label="16-bit model",
            query='label_values(bitwatt_model_info{job=~"$job",weights="dense"}, model_name)',
            is_multi=False,
        ),
    ),
    rows=(_SAVINGS, _LOAD, _ENERGY, _COST, _SPEED, MIRRORED),
)
