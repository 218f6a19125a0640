"""How fast the machine is from moment to moment, told by the time that fixed arithmetic takes.

A processor of a shared machine takes up to twice as long for the same work while a neighbour uses
the other thread of its core, for seconds or for minutes. Figures of different times are compared by
what the same work took meanwhile.
"""

import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Self

__all__ = ["STEADY", "Pace", "PaceMeter", "Paces", "steady"]

_WINDOW_S = 0.2
_MOST_PROBES = 8  # of 30 MB each
RECORD = struct.Struct("=dd")  # a probe's: time.perf_counter, seconds that the arithmetic took

Pace = Callable[[float], float]
"""How many times as long as usual everything takes, at seconds since some beginning."""


def steady(_time_s: float) -> float:
    """Return 1: a machine whose speed doesn't change."""
    return 1.0


@dataclass(frozen=True, slots=True)
class Paces:
    """Paces of windows of time, one after the other; the outermost hold beyond.

    began_s  of the first, by time.perf_counter
    values   of each fifth of a second
    """

    began_s: float
    values: tuple[float, ...]

    def since(self, started_s: float) -> Pace:
        """Return the pace at seconds since then."""
        values, last = self.values, len(self.values) - 1
        offset_s = started_s - self.began_s
        return lambda time_s: values[min(last, max(0, int((offset_s + time_s) / _WINDOW_S)))]

    def mean(self, start_s: float, end_s: float) -> float:
        """Return the mean from one time to a later one."""
        pace = self.since(start_s)
        number = max(1, math.ceil((end_s - start_s) / _WINDOW_S))
        each_s = (end_s - start_s) / number
        return statistics.mean(pace((i + 0.5) * each_s) for i in range(number))

    def median(self, start_s: float, end_s: float) -> float:
        """Return the median from one time to another."""
        pace = self.since(start_s)
        number = max(1, round((end_s - start_s) / _WINDOW_S))
        return statistics.median(pace(i * _WINDOW_S) for i in range(number))

    def over(self, usual: float) -> Self:
        """Return the same as multiples of this."""
        return type(self)(self.began_s, tuple(value / usual for value in self.values))


STEADY = Paces(0.0, (1.0,))


@dataclass(slots=True)
class _Probe:
    """What a probe has written: its file, how far it was read, and its samples by their window."""

    file: IO[bytes]
    num_read: int = 0
    samples: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def read(self, began_s: float) -> None:
        descriptor = self.file.fileno()  # whose position is where the probe writes
        size = os.fstat(descriptor).st_size // RECORD.size * RECORD.size
        data = os.pread(descriptor, size - self.num_read, self.num_read)
        self.num_read += len(data)
        for time_s, seconds in RECORD.iter_unpack(data):
            self.samples[int((time_s - began_s) / _WINDOW_S)].append(seconds)


class PaceMeter:
    """A probe on each processor that this process may use, as a process of its own; a context.

    Of more than eight processors it is every second one, or third, and so on: eight at most. A
    probe takes a quarter of a millisecond of its processor 33 times a second, under a hundredth.
    None runs where a process can't be tied to a processor, as on macOS; its paces are steady then.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._probes: list[_Probe] = []
        self._began_s = 0.0

    def __enter__(self) -> Self:
        self._began_s = time.perf_counter()
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        with ExitStack() as stack:
            for cpu in cpus[:: max(1, -(-len(cpus) // _MOST_PROBES))]:
                file = stack.enter_context(tempfile.TemporaryFile())
                arguments = [str(cpu), str(os.getpid())]
                probe = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-m", "bitwatt.simulation.processor_probe", *arguments],
                    stdout=file,
                    process_group=0,  # Ctrl-C ends this process alone, which ends the probes
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                )
                stack.callback(probe.wait)
                stack.callback(probe.terminate)
                self._probes.append(_Probe(file))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def paces(self) -> Paces:
        """Return the seconds that the arithmetic took until now, mean of the processors.

        Of each processor a window's is the median of its samples; of a window without one, the
        one's before.
        """
        for probe in self._probes:
            probe.read(self._began_s)
        of_each = [_filled(probe.samples) for probe in self._probes if probe.samples]
        if not of_each:
            return STEADY
        number = max(map(len, of_each))
        filled = [values + values[-1:] * (number - len(values)) for values in of_each]
        return Paces(self._began_s, tuple(map(statistics.mean, zip(*filled, strict=True))))


def _filled(samples: dict[int, list[float]]) -> list[float]:
    value = statistics.median(samples[min(samples)])
    values = []
    for window in range(max(samples) + 1):
        if window in samples:
            value = statistics.median(samples[window])
        values.append(value)
    return values
