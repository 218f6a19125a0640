"""The paper's tables of cost, rerun on this machine's CPU with random weights of its shapes.

A model runs whole where memory and time allow. Else it runs at two depths, its first layer alone
and as many as fit, and a figure of all layers is the line through both: layers are alike, and what
lies outside them is in both. Such a figure is marked as extrapolated. Times are the best round's:
what else runs on a machine only adds to them, and a line through two medians would carry that on.
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from bitwatt.bench.cpu import ModelProcess
from bitwatt.bench.cpu_child import ChildConfig
from bitwatt.bench.measure import describe_machine
from bitwatt.bench.paper_figures import PAPER_SIZES, PAPER_THROUGHPUT
from bitwatt.model.config import ModelConfig, Weights
from bitwatt.model.presets import PRESETS
from bitwatt.telemetry.energy.arithmetic import ModelShape, arithmetic_joules_per_token
from bitwatt.telemetry.energy.counter import EnergyCounter, Unavailable
from bitwatt.telemetry.energy.sources import open_counter

__all__ = ["QUICK", "Effort", "Figures", "bench_paper", "line_through"]

_BATCH = 16
_BATCH_CONTEXT_TOKENS = 32
_ENERGY_TOKENS = 64
_MEMORY_SHARE = 0.7  # of what is free, for the models that are held at one time

Work = tuple[str, int]
"""What is measured, as cpu_child takes it: decode and a batch, or generate and tokens."""

LATENCY: Work = ("decode", 1)
BATCH: Work = ("decode", _BATCH)
ENERGY: Work = ("generate", _ENERGY_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is run.

    seconds         about what all may take; None takes every layer that fits in memory
    repeats         counted rounds, after one that warms up
    max_layers      layers of a model at most
    sizes           names of PAPER_SIZES
    throughput_size  the preset that is decoded in batches
    """

    seconds: float | None = None
    repeats: int = 5
    max_layers: int | None = None
    sizes: tuple[str, ...] = tuple(PAPER_SIZES)
    throughput_size: str = "70B"
    num_threads: int | None = None
    read_bytes: int = 1 << 28


QUICK = Effort(seconds=480, repeats=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A model's, for all its layers.

    num_layers_run  those that were run; fewer than num_layers where figures are extrapolated
    weights_gb      exact, by the shape; memory_gb is the process's, with a KV cache
    decode_ms       of a step, by its batch; None where the rounds were too uneven to continue
    floor_ms        the least time a step could take: the bytes of its weights at memory's rate
    joules_per_token  None where nothing measures them, or as decode_ms
    """

    num_layers: int
    num_layers_run: int
    weights_gb: float
    memory_gb: float | None
    decode_ms: dict[int, float | None]
    floor_ms: float
    joules_per_token: float | None = None

    @property
    def is_extrapolated(self) -> bool:
        return self.num_layers_run < self.num_layers


class _Run:
    """One model at one depth, and what it was measured to do."""

    def __init__(self, config: ChildConfig, counter: EnergyCounter | None) -> None:
        self.num_layers = config.num_layers
        self._process = ModelProcess(config)
        self.model = self._process.model
        self._counter = counter
        self.forget()

    def forget(self) -> None:
        """Drop what was measured."""
        self.wall_s = 0.0
        self.seconds: dict[Work, list[float]] = {}
        self.joules: list[float] = []
        self.read_bytes_per_s: list[float] = []

    def measure(self, work: Work) -> None:
        started = time.perf_counter()
        before = self._joules()
        measured = self._process.measure(*work)
        after = self._joules()
        self.wall_s += time.perf_counter() - started
        self.seconds.setdefault(work, []).append(measured.seconds)
        self.read_bytes_per_s.append(measured.read_bytes_per_s)
        if work == ENERGY and before is not None and after is not None:
            self.joules.append(after - before)

    def close(self) -> None:
        self._process.close()

    def _joules(self) -> float | None:
        return None if self._counter is None else self._counter.read_joules()


def bench_paper(
    effort: Effort,
    *,
    report: Callable[[str], None],
    counter: EnergyCounter | Unavailable | None = None,
) -> dict[str, Any]:
    """Return the tables: sizes, throughput at 70B, energy, each with the paper's own figures.

    report   takes a line as each size is begun and done
    counter  of joules; None takes this machine's
    """
    started = time.monotonic()
    counter = counter or open_counter("auto", "cpu", None)
    joules = None if isinstance(counter, Unavailable) else counter
    works = [LATENCY] if joules is None else [LATENCY, ENERGY]
    needed: dict[str, set[Weights]] = {}
    for name in effort.sizes:
        needed.setdefault(name, set()).add("ternary")
        needed.setdefault(PAPER_SIZES[name].dense_size, set()).add("dense")
    num_left = len(needed) + 1

    def ends_at() -> float:  # what a size leaves of its time is for those after it
        nonlocal num_left
        num_left -= 1
        now = time.monotonic()
        if effort.seconds is None:
            return math.inf
        return now + (started + effort.seconds - now) / (num_left + 1)

    figures = {
        name: _measure(name, sorted(kinds), works, effort, ends_at(), joules, report)
        for name, kinds in needed.items()
    }
    size, both = effort.throughput_size, sorted(get_args(Weights))
    large = _measure(size, both, [LATENCY, BATCH], effort, ends_at(), None, report)
    return {
        "machine": describe_machine(),
        "effort": asdict(effort),
        "seconds": time.monotonic() - started,
        "sizes": {name: _size_row(name, figures) for name in effort.sizes},
        "throughput": _throughput(large, size),
        "energy": _energy((*effort.sizes, size), counter),
    }


_Measured = dict[Weights, Figures] | str
"""By weights; or why there are none."""


def _measure(
    name: str,
    kinds: list[Weights],
    works: list[Work],
    effort: Effort,
    ends_at: float,
    counter: EnergyCounter | None,
    report: Callable[[str], None],
) -> _Measured:
    config = PRESETS[name]
    fitting = _layers_that_fit(config, kinds)
    if fitting < 2:
        reason = f"two layers and its embeddings don't fit in {_free_bytes() / 1e9:.1f} GB"
        report(f"{name}: {reason}")
        return reason
    is_batch = BATCH in works

    def start(stack: ExitStack, num_layers: int) -> dict[Weights, _Run]:
        return {
            weights: stack.enter_context(
                closing(
                    _Run(
                        ChildConfig(
                            name,
                            num_layers,
                            weights,
                            head_bits=16,
                            num_threads=effort.num_threads,
                            read_bytes=effort.read_bytes,
                            max_batch=_BATCH if is_batch else 1,
                            context_tokens=_BATCH_CONTEXT_TOKENS if is_batch else 128,
                        ),
                        counter,
                    )
                )
            )
            for weights in kinds
        }

    with ExitStack() as stack:
        first = start(stack, 1)
        for _ in range(2):  # the first warms up, the second says how long a layer takes at most
            for run in first.values():
                run.forget()
            _take_turns(first, works)
        round_s = sum(run.wall_s for run in first.values())
        making_s = sum(run.model.made_s for run in first.values())
        left_s = ends_at - time.monotonic() - effort.repeats * round_s
        a_layer_s = making_s + (effort.repeats + 1) * round_s
        in_time = fitting if left_s == math.inf else int(left_s / a_layer_s)
        limit = effort.max_layers or config.num_layers
        depth = min(max(in_time, 2), fitting, limit, config.num_layers)
        report(f"{name}, {' and '.join(kinds)}: {depth} of {config.num_layers} layers …")
        deep = start(stack, depth)
        groups = [deep] if depth == config.num_layers else [first, deep]
        for number in range(effort.repeats + 1):
            for group in groups:
                if number <= 1:
                    for run in group.values():
                        run.forget()
                _take_turns(group, works)
        figures: dict[Weights, Figures] = {}
        for weights in kinds:
            runs = [group[weights] for group in groups]
            figures[weights] = _figures(config, weights, runs, works)
            one = figures[weights]
            steps = [
                f"batch {batch}: {'uneven' if ms is None else f'{ms:.1f} ms'}"
                for batch, ms in one.decode_ms.items()
            ]
            report(f"  {weights}: {one.weights_gb:.2f} GB, {', '.join(steps)}{_mark(one)}")
        return figures


def _take_turns(runs: dict[Weights, _Run], works: list[Work]) -> None:
    for work in works:
        for run in runs.values():
            run.measure(work)


def _figures(config: ModelConfig, weights: Weights, runs: list[_Run], works: list[Work]) -> Figures:
    def at_all_layers(of: Callable[[_Run], float]) -> float | None:
        return line_through([(run.num_layers, of(run)) for run in runs], config.num_layers)

    def decode_ms(work: Work) -> float | None:
        return at_all_layers(lambda run: 1e3 * min(run.seconds[work]))

    rate = max(rate for run in runs for rate in run.read_bytes_per_s)
    step_bytes = at_all_layers(lambda run: run.model.step_bytes)
    memory = at_all_layers(lambda run: run.model.rss_anon_bytes or 0)
    joules = at_all_layers(lambda run: min(run.joules)) if all(r.joules for r in runs) else None
    assert step_bytes is not None, "a deeper model reads more"
    return Figures(
        num_layers=config.num_layers,
        num_layers_run=runs[-1].num_layers,
        weights_gb=_weights_bytes(config, weights) / 1e9,
        memory_gb=memory / 1e9 if memory else None,
        decode_ms={work[1]: decode_ms(work) for work in works if work != ENERGY},
        floor_ms=1e3 * step_bytes / rate,
        joules_per_token=None if joules is None else joules / _ENERGY_TOKENS,
    )


def line_through(points: list[tuple[int, float]], num_layers: int) -> float | None:
    """Return the figure of so many layers, by the one or two of (layers, figure) there are.

    None where more layers were not found to take more
    """
    (first, low), (last, high) = points[0], points[-1]
    if last == num_layers:
        return high
    if high <= low:
        return None
    return high + (high - low) / (last - first) * (num_layers - last)


def _size_row(name: str, figures: dict[str, _Measured]) -> dict[str, Any]:
    paper = PAPER_SIZES[name]
    ternary, dense = figures[name], figures[paper.dense_size]
    row: dict[str, Any] = {
        "paper": asdict(paper)
        | {"memory_gain": paper.memory_gain, "latency_gain": paper.latency_gain},
    }
    if isinstance(ternary, str) or isinstance(dense, str):
        return row | {"unavailable": ternary if isinstance(ternary, str) else dense}
    ours, theirs = ternary["ternary"], dense["dense"]
    gains = {
        "weights": _ratio(theirs.weights_gb, ours.weights_gb),
        "memory": _ratio(theirs.memory_gb, ours.memory_gb),
        "latency": _ratio(theirs.decode_ms[1], ours.decode_ms[1]),
        "energy": _ratio(theirs.joules_per_token, ours.joules_per_token),
    }
    return row | {"ternary": _as_json(ours), "dense": _as_json(theirs), "gain": gains}


def _throughput(figures: _Measured, size: str) -> dict[str, Any]:
    config = PRESETS[size]
    context = PAPER_THROUGHPUT.context_tokens
    sequence_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * context
    table: dict[str, Any] = {
        "size": size,
        "batch": _BATCH,
        "context_tokens": _BATCH_CONTEXT_TOKENS,
        "num_kv_heads": config.num_kv_heads,
        "largest_batch": {
            place: {
                weights: max(0, int((memory - _weights_bytes(config, weights)) // sequence_bytes))
                for weights in ("ternary", "dense")
            }
            for place, memory in (
                ("here", _total_bytes()),
                ("paper", PAPER_THROUGHPUT.memory_gb * 1e9),
            )
        },
        "paper": asdict(PAPER_THROUGHPUT),
    }
    if isinstance(figures, str):
        return table | {"unavailable": figures}
    ternary, dense = figures["ternary"], figures["dense"]
    return table | {
        "ternary": _as_json(ternary),
        "dense": _as_json(dense),
        "tokens_per_s": {
            weights: _ratio(1e3 * _BATCH, one.decode_ms[_BATCH]) for weights, one in figures.items()
        },
        "gain": {
            "throughput": _ratio(dense.decode_ms[_BATCH], ternary.decode_ms[_BATCH]),
            "latency": _ratio(dense.decode_ms[1], ternary.decode_ms[1]),
        },
    }


def _energy(sizes: tuple[str, ...], counter: EnergyCounter | Unavailable) -> dict[str, Any]:
    def ratio(name: str, context: int) -> float:
        config = PRESETS[name]
        shape = ModelShape(
            num_linear_parameters=config.num_layers * _layer_parameters(config),
            num_layers=config.num_layers,
            attention_width=config.num_heads * config.head_dim,
        )
        return arithmetic_joules_per_token(shape, "dense", context) / arithmetic_joules_per_token(
            shape, "ternary", context
        )

    source: dict[str, Any] = (
        {"unavailable": counter.detail}
        if isinstance(counter, Unavailable)
        else {"source": counter.source, "device": counter.device}
    )
    return source | {
        "arithmetic": {
            name: {"linears": ratio(name, 0), "with_attention_at_512": ratio(name, 512)}
            for name in sizes
        },
        "paper": {"arithmetic": 71.4},
    }


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _as_json(figures: Figures) -> dict[str, Any]:
    return asdict(figures) | {
        "decode_ms": {str(batch): ms for batch, ms in figures.decode_ms.items()},
        "is_extrapolated": figures.is_extrapolated,
    }


def _mark(figures: Figures) -> str:
    return " (extrapolated)" if figures.is_extrapolated else ""


def _layer_parameters(config: ModelConfig) -> int:
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * heads + 2 * kv_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


def _weights_bytes(config: ModelConfig, weights: Weights, num_layers: int | None = None) -> int:
    embeddings = 2 * (1 if config.is_tied else 2) * config.vocab_size * config.hidden_size
    linears = (num_layers or config.num_layers) * _layer_parameters(config)
    return embeddings + (linears // 4 if weights == "ternary" else 2 * linears)


def _layers_that_fit(config: ModelConfig, kinds: list[Weights]) -> int:
    """Return how many layers of every kind fit in memory beside one of each."""
    room = _MEMORY_SHARE * _free_bytes()
    one = sum(_weights_bytes(config, weights, 1) for weights in kinds)
    two = sum(_weights_bytes(config, weights, 2) for weights in kinds)
    return 1 + int((room - 2 * one) // (two - one)) if room >= 2 * one else 0


def _free_bytes() -> int:
    """Return bytes that may be taken without swapping; half of all where that isn't told."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, _total_bytes())
    except OSError:
        pass
    return _total_bytes() // 2


def _total_bytes() -> int:
    """Return the memory of this machine, or of this container where that has a limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
