"""GET /bitwatt/v1/comparison: both sides of the comparison in numbers, for the page."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from bitwatt import __version__
from bitwatt.api.dependencies import Models, SettingsOf, TwinOf
from bitwatt.api.json_route import json_response
from bitwatt.serving.state import ComparisonState, side_of
from bitwatt.telemetry.history import History

__all__ = ["router"]

router = APIRouter()


@router.get("/bitwatt/v1/comparison")
async def get_comparison(
    request: Request,
    models: Models,
    settings: SettingsOf,
    twin: TwinOf,
    since: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0.0,
    own: bool = False,
) -> Response:
    """Return what each model holds, has done and is doing.

    since asks for newer points alone, own leaves out the twin that another server has.
    """
    history: History = request.app.state.history
    times, series = history.since(since)
    sides = [
        side_of(model, series[name], settings.prices) for name, model in models.by_name.items()
    ]
    link = None
    if twin is not None and not own:
        side = await twin.side(since, times)
        sides += [] if side is None else [side]
        link = twin.link
    return json_response(
        ComparisonState(
            version=__version__,
            time_s=times,
            prices=settings.prices,
            measures_first=settings.first_measurement,
            models=sides,
            twin=link,
        )
    )
