"""Prometheus's text format, as much of it as reading our own figures needs."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Sample", "Samples", "parse_samples"]

_SAMPLE = re.compile(
    r"([a-zA-Z_:][a-zA-Z0-9_:]*)"
    r'(?:\{((?:[^"{}]|"(?:[^"\\]|\\.)*")*)\})?'
    r" (\S+)(?: -?\d+(?:\.\d+)?)?(?: #.*)?"
)
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One series' value."""

    name: str
    labels: dict[str, str]
    value: float


class Samples:
    """What one scrape brought."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    def find(self, name: str, **labels: str) -> Iterator[Sample]:
        """Yield the series of this name that have these labels."""
        for sample in self._samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum of the series that match; None where there is none."""
        values = [sample.value for sample in self.find(name, **labels)]
        return math.fsum(values) if values else None


def parse_samples(text: str) -> Samples:
    """Return a scrape's samples; a line that isn't one is passed over."""
    samples = []
    for line in text.splitlines():
        match = None if line.startswith("#") else _SAMPLE.fullmatch(line.strip())
        if match is None:
            continue
        name, labels, value = match.groups()
        try:
            number = float(value)
        except ValueError:
            continue
        pairs = {key: _unescape(raw) for key, raw in _LABEL.findall(labels or "")}
        samples.append(Sample(name, pairs, number))
    return Samples(samples)


def _unescape(raw: str) -> str:
    return _ESCAPE.sub(lambda match: "\n" if match[1] == "n" else match[1], raw)
