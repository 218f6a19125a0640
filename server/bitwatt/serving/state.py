"""What each model holds, has done and is doing: the figures of /bitwatt/v1/comparison."""

from bisect import bisect_left
from collections.abc import Sequence

import msgspec

from bitwatt.engine.messages import EngineInfo
from bitwatt.model.card import Quality
from bitwatt.serving.models import ServedModel
from bitwatt.telemetry.energy.arithmetic import estimate_of
from bitwatt.telemetry.history import INTERVAL_S, Series
from bitwatt.telemetry.prices import Prices

__all__ = ["ComparisonState", "ModelSide", "TwinLink", "aligned", "side_of"]

_ARITHMETIC_CONTEXT = 512  # the papers'


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the engine started."""

    num_prompt_tokens: int
    num_generation_tokens: int
    num_preemptions: int
    busy_s: float


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Measured energy since the engine started; null with the reason where nothing measures.

    joules       of the device while this model's steps ran, idle power of those moments included
    estimated_arithmetic_joules_per_token  of the multiply-adds alone, as the papers estimate
    """

    source: str | None
    attribution: str | None
    reason: str | None
    joules: float | None
    estimated_arithmetic_joules_per_token: float | None


class ModelSide(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    root       what its files are called; null where that isn't known
    engine     what its engine says of itself, memory by kind among it; null before it has loaded
    num_open   callers' choices that run or wait
    quiet_s    seconds since a caller left; null before the first
    rss_anon_bytes  the engine process's own memory; null where the system doesn't tell
    read_bytes_per_s  at which its engine found memory to be read; null where it measures none, or
               hasn't been idle for its first seconds yet
    quality    what its card says; null where it says nothing
    prices     what its operator pays
    is_remote  whether another server serves it (--twin-url)
    """

    name: str
    root: str | None
    state: str
    engine: EngineInfo | None
    num_open: int
    quiet_s: float | None
    rss_anon_bytes: int | None
    read_bytes_per_s: float | None
    totals: Totals
    energy: Energy
    quality: Quality | None
    prices: Prices
    history: Series
    is_remote: bool = False


class TwinLink(msgspec.Struct, frozen=True, kw_only=True):
    """The server that has the twin.

    problem  why nothing is known of it; null where it answers
    """

    url: str
    problem: str | None


class ComparisonState(msgspec.Struct, frozen=True, kw_only=True):
    """Every model, and the last minutes' points after the time that was asked for.

    measures_first  whether the page measures by itself (--first-measurement)
    twin            null where this server reads no other
    """

    version: str
    time_s: list[float]
    prices: Prices
    measures_first: bool
    models: list[ModelSide]
    twin: TwinLink | None = None


def side_of(model: ServedModel, history: Series, prices: Prices) -> ModelSide:
    """Return the model's figures now."""
    stats = model.metrics.stats
    return ModelSide(
        name=model.name,
        root=model.root,
        state=model.state,
        engine=model.engine.info,
        num_open=model.callers.num_open,
        quiet_s=model.callers.quiet_s,
        rss_anon_bytes=stats.rss_anon_bytes,
        read_bytes_per_s=stats.read_bytes_per_s,
        totals=Totals(
            num_prompt_tokens=stats.num_prompt_tokens,
            num_generation_tokens=stats.num_generation_tokens,
            num_preemptions=stats.num_preemptions,
            busy_s=stats.busy_s,
        ),
        energy=_energy(model),
        quality=model.quality,
        prices=prices,
        history=history,
    )


def _energy(model: ServedModel) -> Energy:
    energy, info = model.energy, model.engine.info
    is_measured = energy.source is not None
    return Energy(
        source=energy.source,
        attribution=energy.attribution if is_measured else None,
        reason=None if energy.unavailable is None else energy.unavailable.detail,
        joules=energy.busy_joules if is_measured else None,
        estimated_arithmetic_joules_per_token=(
            None if info is None else estimate_of(info, _ARITHMETIC_CONTEXT)
        ),
    )


def aligned(series: Series, times_s: Sequence[float], onto_s: Sequence[float]) -> Series:
    """Return another server's points at these times: the next point of its own, if it is near.

    times_s  when its points were, in order
    """
    indices = [bisect_left(times_s, time_s - INTERVAL_S / 2) for time_s in onto_s]
    near = [
        index if index < len(times_s) and times_s[index] - time_s <= INTERVAL_S else None
        for index, time_s in zip(indices, onto_s, strict=True)
    ]
    columns = {
        name: [None if index is None else getattr(series, name)[index] for index in near]
        for name in Series.__struct_fields__
    }
    return Series(**columns)
