"""How long a step takes, as a function of what it computes, fitted to measured steps.

A step costs a constant, then so much a token, a price that falls or rises from one range of sizes
to the next, so much for each token that is sampled, and for each key of steps before that is read.
Keys of its own, a prompt's square, are in the price of tokens: those measured are of one prompt.
None of these is negative, so more work never takes less time. The measurements' relative errors are
made least. Sizes beyond the largest that was measured go on at the last range's price.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from bitwatt.errors import BitwattError
from bitwatt.scheduling.plan import Plan

__all__ = ["MeasuredModel", "StepPoint", "StepTimes", "StepTimesError", "StepWork", "read_measured"]

_SWEEPS = 4000
_CONVERGED = 1e-10
_BENCH_CONTEXT_TOKENS = 128  # of each sequence of a decode step of `make bench`


class StepTimesError(BitwattError):
    """The measurements can't be read, or say too little."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes.

    num_tokens    of all its requests
    num_samples   tokens that it draws
    num_keys      keys of steps before that it reads, each once a request
    """

    num_tokens: int
    num_samples: int
    num_keys: int

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Return the work of a scheduler's plan."""
        num_samples = num_keys = 0
        for chunk in plan.chunks:
            num_samples += chunk.samples
            num_keys += chunk.start
        return cls(plan.num_tokens, num_samples, num_keys)

    @classmethod
    def decode(cls, batch: int, context: int) -> Self:
        """Return the work of a step that advances so many requests of so many tokens each."""
        return cls(batch, batch, batch * context)

    @classmethod
    def prefill(cls, num_tokens: int) -> Self:
        """Return the work of a step that computes a prompt and draws a token."""
        return cls(num_tokens, 1, 0)


@dataclass(frozen=True, slots=True)
class StepPoint:
    """A measured step.

    is_whole_request  whether the seconds are a lone caller's, from request to first token: what a
                      request costs outside the engine is then in them
    spread            median distance of its runs from their median, over that; None of one run
    """

    work: StepWork
    seconds: float
    is_whole_request: bool = False
    spread: float | None = None


class StepTimes:
    """Seconds of a step, and of a request outside the engine.

    overhead_s   a lone request waits outside the engine
    busy_wait_s  one that comes while a step runs waits so much longer
    busy_work_s  and makes that step so much longer: step, server and callers share the processors
    """

    def __init__(
        self,
        knots: Sequence[int],
        weights: Sequence[float],
        points: Sequence[StepPoint],
        *,
        busy_wait_s: float = 0.0,
        busy_work_s: float = 0.0,
    ) -> None:
        self._knots = tuple(knots)
        self._weights = tuple(weights)
        self.busy_wait_s = busy_wait_s
        self.busy_work_s = busy_work_s
        self._base, *self._slopes = weights[: len(knots) + 1]
        self._per_sample, self._per_key, self.overhead_s = weights[len(knots) + 1 :]
        self.points = tuple(points)
        self._of_tokens: dict[int, float] = {}

    @classmethod
    def fit(cls, points: Sequence[StepPoint]) -> Self:
        """Return what fits the points best.

        Raises  StepTimesError without a point, or for one whose seconds are no positive number
        """
        if not points:
            raise StepTimesError("no step was measured")
        for point in points:
            if not 0 < point.seconds < float("inf") or point.work.num_tokens < 1:
                raise StepTimesError(f"a step of {point.work} took {point.seconds} s")
        knots = sorted({0} | {point.work.num_tokens for point in points})[:-1]
        rows = [_features(knots, p.work, is_whole_request=p.is_whole_request) for p in points]
        scaled = [[v / p.seconds for v in row] for row, p in zip(rows, points, strict=True)]
        return cls(knots, _non_negative_least_squares(scaled), points)

    def at_load(self, busy_wait_s: float, busy_work_s: float) -> Self:
        """Return the same steps with this wait and this work."""
        return type(self)(
            self._knots,
            self._weights,
            self.points,
            busy_wait_s=busy_wait_s,
            busy_work_s=busy_work_s,
        )

    def seconds(self, work: StepWork) -> float:
        """Return the seconds that a step of this work takes."""
        of_tokens = self._of_tokens.get(work.num_tokens)
        if of_tokens is None:
            segments = _segments(self._knots, work.num_tokens)
            of_tokens = sum(map(float.__mul__, segments, self._slopes), self._base)
            self._of_tokens[work.num_tokens] = of_tokens
        return of_tokens + self._per_sample * work.num_samples + self._per_key * work.num_keys

    @property
    def largest_error(self) -> float:
        """The largest relative difference to a measurement."""
        return max(
            abs(self.seconds(p.work) + self.overhead_s * p.is_whole_request - p.seconds) / p.seconds
            for p in self.points
        )


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """A model's steps as they were measured, and what the engine was set to.

    watts_busy    of the device while it steps; None where nothing measures
    watts_reason  why not
    """

    name: str
    step_times: StepTimes
    max_model_len: int | None = None
    num_blocks: int | None = None
    watts_busy: float | None = None
    watts_reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what read_measured reads."""
        return {
            "name": self.name,
            "max_model_len": self.max_model_len,
            "num_blocks": self.num_blocks,
            "watts_busy": self.watts_busy,
            "watts_reason": self.watts_reason,
            "busy_wait_s": self.step_times.busy_wait_s,
            "busy_work_s": self.step_times.busy_work_s,
            "steps": [
                asdict(p.work)
                | {
                    "seconds": p.seconds,
                    "is_whole_request": p.is_whole_request,
                    "spread": p.spread,
                }
                for p in self.step_times.points
            ],
        }


def read_measured(path: Path) -> list[MeasuredModel]:
    """Return the models of a file: of `bitwatt plan --save-steps`, or of `make bench`.

    Raises  StepTimesError, which says what is wrong with it
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return [*map(_model, document["models"])] if "models" in document else _of_bench(document)
    except OSError as error:
        raise StepTimesError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StepTimesError(
            f"{path} has no step times: neither what `bitwatt plan --save-steps` writes nor what "
            f"`make bench` prints ({type(error).__name__}: {error})"
        ) from error


def _model(given: Mapping[str, Any]) -> MeasuredModel:
    points = [
        StepPoint(
            StepWork(*(int(s[field.name]) for field in fields(StepWork))),
            float(s["seconds"]),
            bool(s["is_whole_request"]),
            s.get("spread"),
        )
        for s in given["steps"]
    ]
    at_load = [float(given.get(name, 0.0)) for name in ("busy_wait_s", "busy_work_s")]
    if not all(0 <= seconds < float("inf") for seconds in at_load):
        raise ValueError(f"busy_wait_s and busy_work_s are {at_load}")
    return MeasuredModel(
        name=str(given["name"]),
        step_times=StepTimes.fit(points).at_load(*at_load),
        max_model_len=given.get("max_model_len"),
        num_blocks=given.get("num_blocks"),
        watts_busy=given.get("watts_busy"),
        watts_reason=given.get("watts_reason"),
    )


def _of_bench(document: Mapping[str, Any]) -> list[MeasuredModel]:
    models = document["cpu"]["models"]
    measured = []
    for name in ("ternary", "16-bit"):
        points = []
        for batch in (1, 8):
            work = StepWork.decode(batch, _BENCH_CONTEXT_TOKENS)
            points.append(StepPoint(work, models[name][f"decode_{batch}"]["ms"]["median"] / 1e3))
        work = StepWork.prefill(512)
        points.append(StepPoint(work, models[name]["prefill"]["ms"]["median"] / 1e3))
        measured.append(MeasuredModel(name, StepTimes.fit(points)))
    return measured


def _segments(knots: Sequence[int], num_tokens: int) -> list[float]:
    """Return how many tokens fall between each knot and the next; the last range has no end."""
    ends: Iterable[float] = (*knots[1:], float("inf"))
    return [
        float(max(0, min(num_tokens, end) - start)) for start, end in zip(knots, ends, strict=True)
    ]


def _features(knots: Sequence[int], work: StepWork, *, is_whole_request: bool) -> list[float]:
    return [
        1.0,
        *_segments(knots, work.num_tokens),
        float(work.num_samples),
        float(work.num_keys),
        float(is_whole_request),
    ]


def _non_negative_least_squares(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return x of at least 0 that makes the rows' products with it nearest to 1.

    By coordinate descent on the normal equations, columns scaled to one length.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    scales = [sum(v * v for v in column) ** 0.5 or 1.0 for column in columns]
    columns = [[v / s for v in column] for column, s in zip(columns, scales, strict=True)]
    products = [[sum(map(float.__mul__, a, b)) for b in columns] for a in columns]
    wanted = [sum(column) for column in columns]
    x = [0.0] * len(columns)
    for _ in range(_SWEEPS):
        moved = 0.0
        for i, row in enumerate(products):
            if row[i] == 0:
                continue  # nothing measured depends on it
            step = (wanted[i] - sum(map(float.__mul__, row, x))) / row[i]
            now = max(0.0, x[i] + step)
            moved = max(moved, abs(now - x[i]))
            x[i] = now
        if moved < _CONVERGED * max(x):
            break
    return [value / scale for value, scale in zip(x, scales, strict=True)]
