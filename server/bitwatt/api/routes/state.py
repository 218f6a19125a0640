"""GET /bitwatt/v1/comparison: both sides of the comparison in numbers, for the page."""

from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request, Response

from bitwatt import __version__
from bitwatt.api.dependencies import Models, SettingsOf
from bitwatt.api.json_route import json_response
from bitwatt.engine.messages import EngineInfo
from bitwatt.serving.models import ServedModel
from bitwatt.telemetry.cost import Prices
from bitwatt.telemetry.energy.arithmetic import ModelShape, arithmetic_joules_per_token
from bitwatt.telemetry.history import History, Series

__all__ = ["router"]

_ARITHMETIC_CONTEXT = 512  # the papers'

router = APIRouter()


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the engine started."""

    num_prompt_tokens: int
    num_generation_tokens: int
    num_preemptions: int
    busy_s: float


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Measured energy since the engine started; null with the reason where nothing measures.

    joules       of the device while this model's steps ran, idle power of those moments included
    arithmetic_joules_per_token  the papers' estimate of the multiply-adds alone, never measured
    """

    source: str | None
    attribution: str | None
    reason: str | None
    joules: float | None
    arithmetic_joules_per_token: float | None


class ModelSide(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    engine  what its engine says of itself, memory by kind among it; null before it has loaded
    """

    name: str
    state: str
    engine: EngineInfo | None
    totals: Totals
    energy: Energy
    history: Series


class ComparisonState(msgspec.Struct, frozen=True, kw_only=True):
    """Every model, and the last minutes' points after the time that was asked for."""

    version: str
    time_s: list[float]
    prices: Prices
    models: list[ModelSide]


def _side(model: ServedModel, history: Series) -> ModelSide:
    stats = model.metrics.stats
    return ModelSide(
        name=model.name,
        state=model.state,
        engine=model.engine.info,
        totals=Totals(
            num_prompt_tokens=stats.num_prompt_tokens,
            num_generation_tokens=stats.num_generation_tokens,
            num_preemptions=stats.num_preemptions,
            busy_s=stats.busy_s,
        ),
        energy=_energy(model),
        history=history,
    )


def _energy(model: ServedModel) -> Energy:
    energy, info = model.energy, model.engine.info
    estimate = None
    if info is not None and info.num_linear_parameters:
        shape = ModelShape(
            num_linear_parameters=info.num_linear_parameters,
            num_layers=info.num_layers,
            attention_width=info.attention_width,
        )
        estimate = arithmetic_joules_per_token(shape, info.weights, _ARITHMETIC_CONTEXT)
    is_measured = energy.source is not None
    return Energy(
        source=energy.source,
        attribution=energy.attribution if is_measured else None,
        reason=None if energy.unavailable is None else energy.unavailable.detail,
        joules=energy.busy_joules if is_measured else None,
        arithmetic_joules_per_token=estimate,
    )


@router.get("/bitwatt/v1/comparison")
async def get_comparison(
    request: Request,
    models: Models,
    settings: SettingsOf,
    since: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0.0,
) -> Response:
    """Return what each model holds, has done and is doing; since asks for newer points alone."""
    history: History = request.app.state.history
    times, series = history.since(since)
    return json_response(
        ComparisonState(
            version=__version__,
            time_s=times,
            prices=settings.prices,
            models=[_side(model, series[name]) for name, model in models.by_name.items()],
        )
    )
