"""A plan: what a traffic takes of ternary machines and of their twins', and what that costs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitwatt.errors import BitwattError
from bitwatt.simulation.capacity import Load, ServiceLevel, simulate
from bitwatt.simulation.fleet_cost import (
    BreakEven,
    FleetCost,
    Machine,
    Need,
    break_even,
    cost_of,
    need_of,
)
from bitwatt.simulation.replica import Engine
from bitwatt.simulation.step_times import MeasuredModel
from bitwatt.simulation.traffic import Traffic

__all__ = ["ModelPlan", "Plan", "PlanError", "PlannedModel", "make_plan", "plan_as_markdown"]


class PlanError(BitwattError):
    """There is nothing to plan with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """A model, its engine and the machine that it would run on."""

    measured: MeasuredModel
    engine: Engine
    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """What one model takes.

    need, cost  None where no number of machines meets the service level
    alone       a lone request, which shows by how much
    """

    name: str
    need: Need | None
    cost: FleetCost | None
    alone: Load
    watts_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The models in the order given, ternary first, and where it begins to pay.

    saved  share of the twin's that ternary saves, by figure: negative where it costs more, None
           where either isn't known
    """

    requests_per_s: float
    level: ServiceLevel
    models: tuple[ModelPlan, ...]
    saved: dict[str, float | None]
    break_even: BreakEven | None

    def as_json(self) -> dict[str, Any]:
        """Return everything."""
        return asdict(self)


def make_plan(
    models: Sequence[PlannedModel],
    traffic: Traffic,
    requests_per_s: float,
    level: ServiceLevel,
    *,
    num_spares: int = 0,
    num_requests: int = 2000,
    seed: int = 0,
) -> Plan:
    """Return the machines of each model: one or two, the ternary one first.

    num_spares    machines beyond what is needed, in case one fails; they take their part of load
    num_requests  simulated at each rate that is tried
    Raises        PlanError where requests could never run
    """
    plans = []
    for model in models:

        def load_at(rate: float, model: PlannedModel = model) -> Load:
            return simulate(
                model.engine,
                model.measured.step_times,
                traffic,
                rate,
                num_requests=num_requests,
                share=level.percentile,
                seed=seed,
            )

        plans.append(_plan_of(model, requests_per_s, level, load_at, num_spares))
    saved, even = _compared(models, plans, num_spares)
    return Plan(
        requests_per_s=requests_per_s,
        level=level,
        models=tuple(plans),
        saved=saved,
        break_even=even,
    )


def _plan_of(
    model: PlannedModel,
    requests_per_s: float,
    level: ServiceLevel,
    load_at: Callable[[float], Load],
    num_spares: int,
) -> ModelPlan:
    alone = load_at(1e-6)
    if alone.num_refused:
        raise PlanError(
            f"{model.measured.name}: {alone.num_refused} of the simulated requests could never "
            f"run: {alone.refusal} (--prompt-tokens, --answer-tokens, --max-model-len)"
        )
    need = need_of(level, requests_per_s, load_at, num_spares=num_spares)
    return ModelPlan(
        name=model.measured.name,
        need=need,
        cost=None if need is None else cost_of(need, model.machine),
        alone=alone,
        watts_reason=None if model.machine.watts_busy is not None else model.measured.watts_reason,
    )


def _compared(
    models: Sequence[PlannedModel], plans: Sequence[ModelPlan], num_spares: int
) -> tuple[dict[str, float | None], BreakEven | None]:
    if len(plans) != 2:
        return {}, None
    ours, theirs = plans
    if ours.need is None or theirs.need is None or ours.cost is None or theirs.cost is None:
        return {}, None
    saved = {
        "machines": _saved(ours.need.num_machines, theirs.need.num_machines),
        "usd_per_hour": _saved(ours.cost.usd_per_hour, theirs.cost.usd_per_hour),
        "watts": _saved(ours.cost.watts, theirs.cost.watts),
        "kg_co2_per_hour": _saved(ours.cost.kg_co2_per_hour, theirs.cost.kg_co2_per_hour),
    }
    prices = [model.machine.usd_per_hour for model in models]
    return saved, break_even(ours.need, theirs.need, *prices, num_spares=num_spares)


def _saved(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else 1 - ours / theirs


_ROWS: tuple[tuple[str, Callable[[Need, FleetCost], float | None], str], ...] = (
    ("requests/s that one machine bears", lambda need, _: need.at_capacity.requests_per_s, ".4g"),
    ("machines", lambda need, _: need.num_machines, "d"),
    ("utilization", lambda need, _: 100 * need.load.utilization, ".0f"),
    ("TTFT, ms", lambda need, _: _ms(need.load.ttft_s), ".0f"),
    ("time per output token, ms", lambda need, _: _ms(need.load.tpot_s), ".1f"),
    ("tokens/s", lambda need, _: need.num_machines * need.load.tokens_per_s, ",.0f"),
    ("rent, $/hour", lambda _, cost: cost.usd_per_hour, ",.2f"),
    ("rent, $ per million tokens", lambda _, cost: cost.usd_per_million_tokens, ",.4g"),
    ("electricity, $/hour", lambda _, cost: cost.usd_of_electricity_per_hour, ",.2f"),
    ("watts", lambda _, cost: cost.watts, ",.0f"),
    ("joules per token", lambda _, cost: cost.joules_per_token, ".3g"),
    ("kg CO2e/hour", lambda _, cost: cost.kg_co2_per_hour, ".3g"),
)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def plan_as_markdown(plan: Plan) -> str:
    """Return the plan as a table and sentences."""
    share = f"p{plan.level.percentile:g}"
    header = ["", *(model.name for model in plan.models)]
    lines = [f"| {' | '.join(header)} |", "|---" + "|--:" * len(plan.models) + "|"]
    for label, figure, form in _ROWS:
        cells = []
        for model in plan.models:
            value = None
            if model.need is not None and model.cost is not None:
                value = figure(model.need, model.cost)
            cells.append("unknown" if value is None else format(value, form))
        timed = label.startswith(("TTFT", "time"))
        lines.append(f"| {label}{f' ({share})' if timed else ''} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_sentences(plan), ""])


def _sentences(plan: Plan) -> list[str]:
    told = []
    for model in plan.models:
        if model.need is None:
            told.append(
                f"No number of machines meets the service level with {model.name}: a lone request "
                f"has a TTFT of {_ms(model.alone.ttft_s) or 0:.0f} ms and "
                f"{_ms(model.alone.tpot_s) or 0:.1f} ms per output token."
            )
        elif model.cost is not None and model.cost.watts is None:
            reason = model.watts_reason or "nobody said what a machine draws"
            told.append(
                f"Joules of {model.name} are unknown: {reason} (--watts-busy, --watts-idle)."
            )
    names = {
        "machines": "machines",
        "usd_per_hour": "dollars",
        "watts": "joules",
        "kg_co2_per_hour": "CO2e",
    }
    for figure, share in plan.saved.items():
        if share is not None and figure in names:
            told.append(
                f"Ternary saves {share:.0%} of the twin's {names[figure]}."
                if share > 0
                else f"Ternary takes {-share:.0%} more {names[figure]} than the twin."
                if share < 0
                else f"Ternary takes the twin's {names[figure]}: nothing is saved."
            )
    even = plan.break_even
    if even is not None and even.usd_per_hour is not None:
        told.append(
            f"Both cost the same where a ternary machine rents for ${even.usd_per_hour:.4g} an "
            "hour."
        )
    if even is not None:
        told.append(
            "Ternary costs less at no rate that was looked at."
            if even.requests_per_s is None
            else f"Ternary costs less from {even.requests_per_s:.4g} requests/s on, where the "
            "twin first needs a machine more."
            if even.requests_per_s
            else "Ternary costs less at every rate from the first request on."
        )
    return told
