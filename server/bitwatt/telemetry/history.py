"""The last minutes of every model, a point a second: what the page's charts show."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import msgspec

from bitwatt.engine.messages import EngineStats

__all__ = ["INTERVAL_S", "History", "Series"]

INTERVAL_S = 1.0
_NUM_POINTS = 300


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One model's points, one to each time; None where its engine was not up.

    generation_tokens_per_s  and the next: over the interval that ends at the point
    kv_cache_usage           from 0 to 1
    """

    generation_tokens_per_s: list[float | None]
    prompt_tokens_per_s: list[float | None]
    kv_cache_usage: list[float | None]
    num_running: list[int | None]
    num_waiting: list[int | None]


class _Point(msgspec.Struct, frozen=True):
    time_s: float
    rows: dict[str, tuple[float | None, float | None, float, int, int] | None]


class History:
    """Points of several models, on one clock. Used from one event loop."""

    def __init__(self, names: Iterable[str], *, clock: Callable[[], float] = time.time) -> None:
        self._names = tuple(names)
        self._clock = clock
        self._points: deque[_Point] = deque(maxlen=_NUM_POINTS)
        self._last: dict[str, EngineStats] = {}
        self._last_s: float | None = None

    def sample(self, now: Mapping[str, EngineStats | None]) -> None:
        """Add a point; None for a model whose engine is not up."""
        time_s = self._clock()
        length_s = None if self._last_s is None else time_s - self._last_s
        rows = {}
        for name in self._names:
            stats = now.get(name)
            rows[name] = None if stats is None else _row(stats, self._last.get(name), length_s)
        self._last = {name: stats for name, stats in now.items() if stats is not None}
        self._last_s = time_s
        self._points.append(_Point(time_s, rows))

    def since(self, time_s: float) -> tuple[list[float], dict[str, Series]]:
        """Return the times after this one, in seconds of the epoch, and each model's series."""
        points = [point for point in self._points if point.time_s > time_s]
        series = {}
        for name in self._names:
            rows = [point.rows[name] or (None,) * 5 for point in points]
            columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(5)]
            series[name] = msgspec.convert(
                dict(zip(Series.__struct_fields__, columns, strict=True)), Series
            )
        return [point.time_s for point in points], series


def _row(
    stats: EngineStats, last: EngineStats | None, length_s: float | None
) -> tuple[float | None, float | None, float, int, int]:
    generation = prompt = None
    if last is not None and length_s:
        generation = _count(stats.num_generation_tokens, last.num_generation_tokens) / length_s
        prompt = _count(stats.num_prompt_tokens, last.num_prompt_tokens) / length_s
    usage = stats.num_blocks_used / max(stats.num_blocks, 1)
    return generation, prompt, usage, stats.num_running, stats.num_waiting


def _count(now: int, before: int) -> int:
    """Return what was counted since; a counter below where it was began anew with its engine."""
    return now - before if now >= before else now
