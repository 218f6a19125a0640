"""Medians, quartiles and bootstrap intervals of a handful of windows."""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Interval", "Spread", "bootstrap_ratio", "quantile", "spread"]

_SEED = 1_58


@dataclass(frozen=True, slots=True)
class Spread:
    """How values lie: the median, the quartiles, and how many there are."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the bounds of its 95% confidence interval."""

    value: float
    low: float
    high: float


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share lies, interpolated linearly; values not empty."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def spread(values: Sequence[float]) -> Spread:
    """Return the median and quartiles of values, which are not empty."""
    return Spread(
        statistics.median(values), quantile(values, 0.25), quantile(values, 0.75), len(values)
    )


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    num_resamples: int = 4000,
    center: Callable[[Sequence[float]], float] = statistics.median,
) -> Interval:
    """Return center(numerators) / center(denominators) with a percentile bootstrap interval.

    The two are pairs: window i of one ran right beside window i of the other, so pairs are drawn
    together and a disturbance that met both cancels. The draw is seeded: equal input gives equal
    output. One pair gives an interval without width, which says nothing of certainty.

    Raises  ValueError unless there are as many of both, at least one, all denominators positive
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(f"{len(numerators)} and {len(denominators)} values make no pairs")
    if min(denominators) <= 0:
        raise ValueError("a denominator is not positive")
    draw = random.Random(_SEED)  # noqa: S311 - resampling, no secret
    indices = range(len(numerators))
    ratios = []
    for _ in range(num_resamples):
        drawn = draw.choices(indices, k=len(indices))
        ratios.append(
            center([numerators[i] for i in drawn]) / center([denominators[i] for i in drawn])
        )
    return Interval(
        center(numerators) / center(denominators), quantile(ratios, 0.025), quantile(ratios, 0.975)
    )
