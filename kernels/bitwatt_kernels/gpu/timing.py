"""Seconds of a call on the device, without the host's part in launching it."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

__all__ = ["Call", "CudaTimer", "HostTimer", "Timer", "Timing"]

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call took: the median, and the 10th and 90th percentiles of the samples."""

    median_s: float
    p10_s: float
    p90_s: float
    num_samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Return the statistics of one or more samples."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(0.1 * last)],
            ordered[round(0.9 * last)],
            len(ordered),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Timer(Protocol):
    """A way to time calls on one device."""

    def measure(self, calls: Sequence[Call], *, budget_s: float = 0.15) -> Timing:
        """Return the time of one call, the calls taken in turn for about budget_s."""
        ...

    def measure_launched(self, call: Call, *, num_samples: int = 5) -> Timing:
        """Return the time of a call launched kernel by kernel and waited for."""
        ...

    def repeat(self, call: Call, *, seconds: float) -> int:
        """Run call again and again for some seconds; return how often it ran."""
        ...


class CudaTimer:
    """Times calls inside a CUDA graph, so that launches cost what they cost in serving."""

    def measure(self, calls: Sequence[Call], *, budget_s: float = 0.15) -> Timing:
        graph = self._capture(calls)
        first_s = self._replay_s(graph)
        num_samples = min(50, max(5, int(budget_s / max(first_s, 1e-6))))
        return Timing.of([self._replay_s(graph) / len(calls) for _ in range(num_samples)])

    def measure_launched(self, call: Call, *, num_samples: int = 5) -> Timing:
        call()
        torch.cuda.synchronize()
        samples = []
        for _ in range(num_samples):
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
        return Timing.of(samples)

    def repeat(self, call: Call, *, seconds: float) -> int:
        graph = self._capture([call])
        once_s = self._replay_s(graph)
        count = max(1, int(seconds / max(once_s, 1e-6)))
        for i in range(count):
            graph.replay()
            if i % 64 == 63:  # the queue of launches stays short, the device busy
                torch.cuda.current_stream().synchronize()
        torch.cuda.synchronize()
        return count

    @staticmethod
    def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:  # compiles what must not compile while capturing
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    @staticmethod
    def _replay_s(graph: torch.cuda.CUDAGraph) -> float:
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000


class HostTimer:
    """Times calls on the host, for a rehearsal on a machine without a GPU."""

    def measure(self, calls: Sequence[Call], *, budget_s: float = 0.15) -> Timing:
        del budget_s
        return self.measure_launched(calls[0], num_samples=1)

    def measure_launched(self, call: Call, *, num_samples: int = 1) -> Timing:
        samples = []
        for _ in range(num_samples):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        return Timing.of(samples)

    def repeat(self, call: Call, *, seconds: float) -> int:
        del seconds
        call()
        return 1
