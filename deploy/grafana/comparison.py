"""The twins side by side: what 1.58-bit weights save on this traffic, or cost."""

from collections.abc import Callable

from deploy.grafana.mirrored import MIRRORED
from deploy.grafana.panels import Dashboard, Panel, Query, Row, Variable
from deploy.grafana.promql import gauge, increase, quantile, rate, ratio

__all__ = ["COMPARISON"]

_SIDES = {
    "ternary": 'job=~"$job",instance=~"$instance",model_name="$ternary"',
    "16-bit": 'job=~"$job",instance=~"$instance",model_name="$baseline"',
}
_OF_STEPS = "how much traffic each model has is left out, how it batches is not."

_Count = Callable[[str, str], str]  # a counter's growth: a second's, or all of the time shown


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


def _tokens_per_busy_s(scope: str) -> str:
    tokens = increase("vllm:generation_tokens_total", scope)
    return ratio(tokens, increase("bitwatt_engine_busy_seconds_total", scope))


def _rent_of_steps(scope: str) -> str:
    return ratio(gauge("bitwatt_price_usd_per_hour", "avg", scope), _tokens_per_busy_s(scope))


def _joules_of_steps(scope: str, count: _Count = increase) -> str:
    joules = count("bitwatt_energy_joules_total", f'{scope},phase=~"prefill|decode"')
    return ratio(joules, count("vllm:generation_tokens_total", scope))


def _weights(scope: str) -> str:
    kinds = 'kind=~"packed_weights|embedding|other_weights"'
    by_server = f"sum by (instance, model_name) (bitwatt_memory_bytes{{{scope},{kinds}}})"
    return f"avg by (model_name) ({by_server})"


def _both(expr: Callable[[str], str], *, idle: bool = True) -> list[Query]:
    return [
        Query(expr(scope), f"{side} {{{{model_name}}}}", "data" if idle else "empty")
        for side, scope in _SIDES.items()
    ]


def _saving(legend: str, expr: Callable[[str], str], *, idle: bool = False) -> Query:
    ternary, baseline = (f"sum({expr(scope)})" for scope in _SIDES.values())
    return Query(f"1 - {ratio(ternary, baseline)}", legend, "data" if idle else "empty")


# What can't be measured here has no value among the others, and so takes no room.
_SAVINGS = Row(
    "What the ternary weights save",
    [
        Panel(
            title="Saved in memory of weights, and per output token in steps",
            unit="percentunit",
            kind="stat",
            width=12,
            height=5,
            is_saving=True,
            queries=[
                _saving("memory of weights", _weights, idle=True),
                _saving("rent of a token", _rent_of_steps),
                _saving("energy of a token, measured", _joules_of_steps),
            ],
            description=(
                "Rent, where a price is set (--usd-per-hour), and energy, where a counter is read, "
                f"are those of steps in the time shown: {_OF_STEPS} A negative figure is a loss."
            ),
            if_absent="no two models",
        ),
        Panel(
            title="Speed, ternary over 16-bit, in tokens a busy second",
            unit="none",
            kind="stat",
            width=6,
            height=5,
            queries=[
                Query(
                    ratio(*(f"sum({_tokens_per_busy_s(scope)})" for scope in _SIDES.values())),
                    "times",
                    "empty",
                )
            ],
            description=f"Output tokens over seconds in steps, in the time shown: {_OF_STEPS}",
            if_absent="no requests to both",
        ),
        Panel(
            title="Energy is measured, or why not",
            unit="bool_yes_no",
            kind="stat",
            width=6,
            height=5,
            queries=[
                Query(
                    f"max by (model_name, source, reason) (bitwatt_energy_available{{{scope}}})",
                    "{{model_name}} {{source}} {{reason}}",
                )
                for scope in _SIDES.values()
            ],
            description="What measures, or why nothing does. Nothing is estimated in its place.",
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
    "Energy, where the device's counter can be read",
    [
        Panel(
            title="Energy per output token in steps, saved over time",
            unit="percentunit",
            width=24,
            height=6,
            is_saving=True,
            queries=[_saving("saved", lambda scope: _joules_of_steps(scope, rate))],
            description=f"Measured: {_OF_STEPS} Below zero the ternary model takes more.",
        ),
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
    is_collapsed=True,
)

_COST = Row(
    "Cost, at the prices set (--usd-per-hour, --usd-per-kwh)",
    [
        Panel(
            title="Rent per million output tokens",
            unit="currencyUSD",
            queries=_both(_rent, idle=False),
            description=(
                "Price of an hour over its tokens, at five minutes' rate: with load it falls, so "
                "compare at equal load, or by what is saved in steps above."
            ),
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
    is_collapsed=True,
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
    rows=(_SAVINGS, _LOAD, _SPEED, _ENERGY, _COST, MIRRORED),
)
