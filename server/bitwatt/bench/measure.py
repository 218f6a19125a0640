"""Timing and describing a benchmark: medians with their spread, and the machine they hold for."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitwatt.processors import cpu_name

__all__ = ["Spread", "describe_machine", "spread_of", "time_calls"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most of repeated measurements."""

    median: float
    min: float
    max: float
    n: int


def spread_of(values: list[float]) -> Spread:
    """Return the spread of measurements, at least one."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def time_calls(call: Callable[[], object], *, repeats: int = 5, warmups: int = 1) -> Spread:
    """Return the seconds a call takes, after warm-ups."""
    for _ in range(warmups):
        call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return spread_of(seconds)


def describe_machine() -> dict[str, Any]:
    """Return what a figure depends on: processor, cores, versions, commit."""
    return {
        "cpu": cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("bitwatt", "torch")},
        "commit": _commit(),
    }


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
