"""How long a step takes, as a function of what it computes, fitted to measured steps.

A step costs a constant, its first decode among it, so much for each other decode, so much for each
token of a prompt, and for each key of steps before that is read. The price of a decode falls or
rises from one range of batches to the next; that of a prompt's token from one range of prompts to
the next, each prompt by itself: it attends to its own tokens, not to its neighbours'. In an
engine's steps these add up: 160 tokens of a prompt took 12.4 to 13.1 ms longer of the embedded
twin's, whether 1 or 32 others decoded, and three prompts thrice that.

None of these is negative, so more work never takes less time. The measurements' relative errors are
made least. Sizes beyond the largest that was measured go on at the last range's price. What a
prompt of no token would take is a request's time outside the engine: its first range goes from
nothing to the second of the sizes measured.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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

    num_decodes  requests that it advances by one token
    prompts      tokens that it computes of each of the others
    num_keys     keys of steps before that it reads, each once a request
    """

    num_decodes: int
    prompts: tuple[int, ...]
    num_keys: int

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """Return the work of a scheduler's plan."""
        prompts = tuple(chunk.num_tokens for chunk in plan.chunks if chunk.num_tokens > 1)
        num_keys = sum(chunk.start for chunk in plan.chunks)
        return cls(len(plan.chunks) - len(prompts), prompts, num_keys)

    @classmethod
    def decode(cls, batch: int, context: int) -> Self:
        """Return the work of a step that advances so many requests of so many tokens each."""
        return cls(batch, (), batch * context)

    @classmethod
    def prefill(cls, num_tokens: int) -> Self:
        """Return the work of a step that computes a prompt and draws a token."""
        return cls(0, (num_tokens,), 0)


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
    busy_wait_s  one that comes among many others waits so much longer, half of it among three
    busy_work_s  among any it makes the running step so much longer: server and callers share its
                 processors
    """

    def __init__(
        self,
        knots: "_Knots",
        weights: Sequence[float],
        points: Sequence[StepPoint],
        *,
        busy_wait_s: float = 0.0,
        busy_work_s: float = 0.0,
    ) -> None:
        self._knots = knots
        self._weights = tuple(weights)
        self.busy_wait_s = busy_wait_s
        self.busy_work_s = busy_work_s
        num_decode_prices = len(knots.decodes)
        self._base = weights[0]
        self._decode_prices = weights[1 : 1 + num_decode_prices]
        self._prompt_prices = weights[1 + num_decode_prices : -2]
        self._per_key, self.overhead_s = weights[-2:]
        self.points = tuple(points)
        self._of_decodes: dict[int, float] = {}
        self._of_prompt: dict[int, float] = {}

    @classmethod
    def fit(cls, points: Sequence[StepPoint]) -> Self:
        """Return what fits the points best.

        Raises  StepTimesError without a point, or for one whose seconds are no positive number
        """
        if not points:
            raise StepTimesError("no step was measured")
        for point in points:
            is_empty = not point.work.num_decodes and not any(point.work.prompts)
            if not 0 < point.seconds < float("inf") or is_empty:
                raise StepTimesError(f"a step of {point.work} took {point.seconds} s")
        knots = _Knots.of([point.work for point in points])
        rows = [knots.features(p.work, is_whole_request=p.is_whole_request) for p in points]
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
        seconds = self._of_decodes.get(work.num_decodes)
        if seconds is None:
            segments = _segments(self._knots.decodes, work.num_decodes)
            seconds = sum(map(float.__mul__, segments, self._decode_prices), self._base)
            self._of_decodes[work.num_decodes] = seconds
        for num_tokens in work.prompts:
            of_prompt = self._of_prompt.get(num_tokens)
            if of_prompt is None:
                segments = _segments(self._knots.prompts, num_tokens)
                of_prompt = sum(map(float.__mul__, segments, self._prompt_prices))
                self._of_prompt[num_tokens] = of_prompt
            seconds += of_prompt
        return seconds + self._per_key * work.num_keys

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
    probe_s       that the arithmetic of a PaceMeter took meanwhile; None where none ran
    """

    name: str
    step_times: StepTimes
    max_model_len: int | None = None
    num_blocks: int | None = None
    watts_busy: float | None = None
    watts_reason: str | None = None
    probe_s: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what read_measured reads."""
        return {
            "name": self.name,
            "max_model_len": self.max_model_len,
            "num_blocks": self.num_blocks,
            "watts_busy": self.watts_busy,
            "watts_reason": self.watts_reason,
            "probe_s": self.probe_s,
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
            StepWork(int(s["num_decodes"]), tuple(map(int, s["prompts"])), int(s["num_keys"])),
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
        probe_s=given.get("probe_s"),
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


@dataclass(frozen=True, slots=True)
class _Knots:
    """Where prices change: in decodes of a step, and in tokens of a prompt."""

    decodes: tuple[int, ...]
    prompts: tuple[int, ...]

    @classmethod
    def of(cls, works: Sequence[StepWork]) -> Self:
        """Return a knot at every size but the largest, and none at the smallest prompt."""
        batches = sorted({1} | {work.num_decodes for work in works if work.num_decodes > 1})
        sizes = sorted({num_tokens for work in works for num_tokens in work.prompts})
        return cls(tuple(batches[:-1]), (0, *sizes[1:-1]) if sizes else ())

    def features(self, work: StepWork, *, is_whole_request: bool) -> list[float]:
        """Return what each price is multiplied by."""
        of_prompts = [_segments(self.prompts, num_tokens) for num_tokens in work.prompts]
        return [
            1.0,
            *_segments(self.decodes, work.num_decodes),
            *(map(sum, zip(*of_prompts, strict=True)) if of_prompts else [0.0] * len(self.prompts)),
            float(work.num_keys),
            float(is_whole_request),
        ]


def _segments(knots: Sequence[int], number: int) -> list[float]:
    """Return how much of the number is between each knot and the next; the last has no end."""
    ends: Iterable[float] = (*knots[1:], float("inf")) if knots else ()
    return [float(max(0, min(number, end) - start)) for start, end in zip(knots, ends, strict=True)]


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
