"""How many tokens prompts and answers have: one number, or a distribution."""

import math
import random
import re
from dataclasses import dataclass
from typing import Protocol

__all__ = ["MAX_TOKENS", "Lengths", "read_lengths"]

MAX_TOKENS = 1 << 20
_Z95 = 1.6448536269514722  # of a normal distribution, 95% lie below


class Lengths(Protocol):
    """A distribution of numbers of tokens."""

    def draw(self, chance: random.Random) -> int:
        """Return a number of tokens, at least 1."""
        ...


@dataclass(frozen=True, slots=True)
class _Uniform:
    low: int
    high: int

    def draw(self, chance: random.Random) -> int:
        return chance.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class _Lognormal:
    median: int
    p95: int

    def draw(self, chance: random.Random) -> int:
        sigma = math.log(self.p95 / self.median) / _Z95
        return max(1, min(MAX_TOKENS, round(chance.lognormvariate(math.log(self.median), sigma))))


def read_lengths(written: str) -> Lengths:
    """Return the distribution: 128, 16-256 (uniform) or lognormal:MEDIAN:P95.

    Raises  ValueError, which says how one is written
    """
    if match := re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", written):
        low = int(match[1])
        high = int(match[2] or low)
        if 1 <= low <= high <= MAX_TOKENS:
            return _Uniform(low, high)
    elif match := re.fullmatch(r"lognormal:(\d{1,7}):(\d{1,7})", written):
        median, p95 = int(match[1]), int(match[2])
        if 1 <= median <= p95 <= MAX_TOKENS:
            return _Lognormal(median, p95)
    raise ValueError(
        f"write 128, 16-256 or lognormal:MEDIAN:P95, ascending, of 1 to {MAX_TOKENS} tokens"
    )
