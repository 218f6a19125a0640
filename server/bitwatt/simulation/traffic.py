"""Traffic: when requests arrive, and how long prompts and answers are. Times in seconds."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from bitwatt_client.lengths import MAX_TOKENS, Lengths, read_lengths

from bitwatt.errors import BitwattError

__all__ = [
    "Arrival",
    "Lengths",
    "LogTraffic",
    "PoissonTraffic",
    "Traffic",
    "TrafficError",
    "read_lengths",
    "read_log",
]


class TrafficError(BitwattError):
    """The traffic can't be read, or is none."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when, and how many tokens its prompt and its answer have.

    prefix             requests of one number share the first num_prefix_tokens of their prompts
    num_prefix_tokens  at most the prompt's
    """

    time_s: float
    num_prompt_tokens: int
    num_tokens: int
    prefix: int = 0
    num_prefix_tokens: int = 0


class Traffic(Protocol):
    """Requests at a rate that can be set."""

    def arrivals(self, requests_per_s: float, num_requests: int, seed: int) -> list[Arrival]:
        """Return so many requests in order of time, from 0 on; one seed gives the same ones."""
        ...


@dataclass(frozen=True, slots=True)
class PoissonTraffic:
    """Callers who know nothing of each other: exponential gaps between requests."""

    prompt_tokens: Lengths
    answer_tokens: Lengths

    def arrivals(self, requests_per_s: float, num_requests: int, seed: int) -> list[Arrival]:
        """Return the requests. Of two rates the gaps are in proportion, the lengths the same."""
        chance = random.Random(seed)
        time_s = 0.0
        arrivals = []
        for _ in range(num_requests):
            time_s += chance.expovariate(1.0) / requests_per_s
            prompt, answer = self.prompt_tokens.draw(chance), self.answer_tokens.draw(chance)
            arrivals.append(Arrival(time_s, prompt, answer))
        return arrivals


@dataclass(frozen=True, slots=True)
class LogTraffic:
    """Requests of a log, bursts and all, over and over.

    At a lower rate than the log's each request is left out with the same chance; at a higher one
    the log is laid over itself, each layer shifted in time.
    """

    log: Sequence[Arrival]

    @property
    def duration_s(self) -> float:
        """From the first request to one mean gap behind the last."""
        span = self.log[-1].time_s - self.log[0].time_s
        return span * len(self.log) / (len(self.log) - 1)

    @property
    def requests_per_s(self) -> float:
        """The log's own rate."""
        return len(self.log) / self.duration_s

    def arrivals(self, requests_per_s: float, num_requests: int, seed: int) -> list[Arrival]:
        """Return the requests."""
        chance = random.Random(seed)
        num_layers = requests_per_s / self.requests_per_s
        start, duration = self.log[0].time_s, self.duration_s
        arrivals: list[Arrival] = []
        turn = 0
        while len(arrivals) < num_requests:
            drawn = []
            for layer in range(math.ceil(num_layers)):
                share = min(1.0, num_layers - layer)
                shift = chance.uniform(0, duration) if layer else 0.0
                for one in self.log:
                    if chance.random() < share:
                        time_s = turn * duration + (one.time_s - start + shift) % duration
                        drawn.append(replace(one, time_s=time_s))
            arrivals += sorted(drawn, key=lambda arrival: arrival.time_s)
            turn += 1
        return arrivals[:num_requests]


def read_log(path: Path) -> LogTraffic:
    """Return the traffic of a JSONL file.

    Each line is an object with time_s (seconds, of any epoch), prompt_tokens and
    completion_tokens, as the usage of an answer names them.

    Raises  TrafficError, which names the line
    """
    log = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrafficError(f"{path} can't be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                log.append(_arrival(json.loads(line)))
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise TrafficError(
                    f"{path}, line {number}: a request is an object with time_s, prompt_tokens and "
                    f"completion_tokens ({type(error).__name__}: {error})"
                ) from error
    log.sort(key=lambda arrival: arrival.time_s)
    if len(log) < 2 or log[0].time_s == log[-1].time_s:
        raise TrafficError(f"{path} has {len(log)} requests; a rate needs two at different times")
    return LogTraffic(log)


def _arrival(given: dict[str, object]) -> Arrival:
    time_s = given["time_s"]
    if not isinstance(time_s, int | float) or isinstance(time_s, bool) or not math.isfinite(time_s):
        raise ValueError(f"time_s is {str(time_s)[:40]!r}")
    return Arrival(
        float(time_s), _count(given, "prompt_tokens"), _count(given, "completion_tokens")
    )


def _count(given: dict[str, object], name: str) -> int:
    value = given[name]
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise ValueError(f"{name} is {str(value)[:40]!r}, not 1 to {MAX_TOKENS}")
    return value
