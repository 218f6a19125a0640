"""The 2B4T shape on this machine's CPU: packed ternary beside its 16-bit twin, taken in turns.

Each model lives in a process of its own, as an engine does, and the processes are asked in turns:
a shared machine's speed moves from minute to minute, and a ratio holds within a round. The roofline
is the least time a decode step could take: the bytes it must read of the weights, at the rate that
memory was read at just before. `dense` has the twin beside what libraries make of its linears alone
(dense_child.py), so that a weak one is seen.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any, Self

from bitwatt.bench.cpu_child import ChildConfig, Measurement, Model
from bitwatt.bench.dense_child import DenseConfig, libraries
from bitwatt.bench.measure import Spread, spread_of
from bitwatt.engine.environment import engine_environment
from bitwatt.model.presets import PRESETS

__all__ = ["ModelProcess", "bench_cpu", "bench_dense", "bench_groups"]

# By name: what is asked of a model, and of how many sequences or tokens.
_Works = Mapping[str, tuple[str, int]]
_WORK: _Works = {"decode_1": ("decode", 1), "decode_8": ("decode", 8), "prefill": ("prefill", 512)}
_DENSE_WORK: _Works = {**_WORK, "decode_32": ("decode", 32)}

_SHORT_CONTEXT_TOKENS = 16  # a library's linears have none, and 32 prompts would take minutes


def _with_prompts(works: _Works, num_tokens: int) -> _Works:
    return {**works, "prefill": ("prefill", num_tokens)}


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def bench_cpu(
    *,
    preset: str = "2B4T",
    num_layers: int | None = None,
    repeats: int = 5,
    num_threads: int | None = None,
    cpu_isa: str | None = None,
    read_bytes: int = 1 << 28,
    prompt_tokens: int = 512,
    report: Callable[[str], None] = _print_to_stderr,
) -> dict[str, Any]:
    """Return each model's decode, prefill and memory, and the ternary ones' ratios to the twin.

    num_layers   fewer layers than the preset's, for a quick look; figures are of what ran
    repeats      counted rounds, after one that warms up
    num_threads  CPU threads of each model; None takes all the process may use
    cpu_isa      instruction set of the kernels; None takes the fastest that runs
    read_bytes   what the rate of memory is measured on; far more than the caches hold
    prompt_tokens  of a prefill, 512 at most
    report       takes a line as each figure is known
    """
    num_layers = num_layers or PRESETS[preset].num_layers
    ternary = ChildConfig(preset, num_layers, "ternary", 16, num_threads, cpu_isa, read_bytes)
    int8_head = replace(ternary, head_bits=8)
    twin = replace(ternary, weights="dense")
    configs = {"ternary": ternary, "ternary, int8 head": int8_head, "16-bit": twin}
    works = _with_prompts(_WORK, prompt_tokens)
    models, rounds, figures = _take_turns(configs, works, repeats, report)
    to_twin = {
        name: _ratios(models[name], models["16-bit"], rounds[name], rounds["16-bit"])
        for name in ("ternary", "ternary, int8 head")
    }
    for name, ratios in to_twin.items():
        resident = ratios.get("rss_anon_bytes")
        report(f"{name} to 16-bit: {_multiples(ratios, _WORK)}, resident {resident}")
    return {
        "preset": preset,
        "num_layers": num_layers,
        "instruction_set": models["16-bit"].instruction_set,
        "num_threads": models["16-bit"].num_threads,
        "models": figures,
        "to_16_bit": to_twin,
    }


def bench_dense(
    *,
    preset: str = "2B4T",
    num_layers: int = 10,
    repeats: int = 3,
    num_threads: int | None = None,
    cpu_isa: str | None = None,
    read_bytes: int = 1 << 28,
    prompt_tokens: int = 512,
    report: Callable[[str], None] = _print_to_stderr,
) -> dict[str, Any]:
    """Return figures of the 16-bit twin and of libraries' linears, and the ratios of their speeds.

    The twin does a whole model's work, with some 16 tokens of context, a library its linears and
    head alone. Parameters as bench_cpu's; a library takes the instruction set it chooses itself.
    """
    twin = ChildConfig(preset, num_layers, "dense", 16, num_threads, cpu_isa, read_bytes)
    twin = replace(twin, max_batch=32, context_tokens=_SHORT_CONTEXT_TOKENS)
    configs: dict[str, ChildConfig | DenseConfig] = {"16-bit": twin}
    for library in libraries():
        configs[library] = DenseConfig(preset, num_layers, library, num_threads, read_bytes)
    models, rounds, figures = _take_turns(
        configs, _with_prompts(_DENSE_WORK, prompt_tokens), repeats, report
    )
    ratios = {
        name: {
            work: asdict(_pairwise(rounds[name][work], rounds["16-bit"][work]))
            for work in _DENSE_WORK
        }
        for name in rounds
        if name != "16-bit"
    }
    for name, of_library in ratios.items():
        report(f"16-bit to the linears of {name}: {_multiples(of_library, _DENSE_WORK)}")
    return {
        "preset": preset,
        "num_layers": num_layers,
        "instruction_set": models["16-bit"].instruction_set,
        "num_threads": models["16-bit"].num_threads,
        "models": figures,
        "16_bit_to_library": ratios,
    }


def bench_groups(
    *,
    num_layers: int | None = None,
    num_threads: int | None = None,
    cpu_isa: str | None = None,
    repeats: int = 5,
    read_bytes: int = 1 << 28,
    prompt_tokens: int = 512,
    report: Callable[[str], None] = _print_to_stderr,
) -> list[dict[str, Any]]:
    """Return figures of Bonsai's shapes with a scale to each group of 128 weights and to each row.

    The two take turns, and the ratios of their speeds are what groups' scales cost. Embedding and
    head are ternary. Parameters as bench_cpu's.
    """
    results = []
    works = _with_prompts(_WORK, prompt_tokens)
    for preset in ("Bonsai 1.7B", "Bonsai 4B"):
        layers = num_layers or PRESETS[preset].num_layers
        rows = ChildConfig(preset, layers, "ternary", 16, num_threads, cpu_isa, read_bytes)
        rows = replace(rows, has_ternary_head=True)
        configs = {"groups of 128": replace(rows, group=128), "rows": rows}
        report(f"{preset}, a scale to")
        models, rounds, figures = _take_turns(configs, works, repeats, report)
        ratios = _ratios(
            models["groups of 128"], models["rows"], rounds["groups of 128"], rounds["rows"]
        )
        report(f"groups of 128 to rows: {_multiples(ratios, _WORK)}")
        results.append(
            {
                "preset": preset,
                "num_layers": layers,
                "instruction_set": models["rows"].instruction_set,
                "num_threads": models["rows"].num_threads,
                "models": figures,
                "to_rows": ratios,
            }
        )
    return results


class ModelProcess:
    """A model in a process of its own, started as an engine is; ready when made."""

    def __init__(self, config: ChildConfig | DenseConfig) -> None:
        module = "cpu_child" if isinstance(config, ChildConfig) else "dense_child"
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", f"bitwatt.bench.{module}", json.dumps(asdict(config))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=engine_environment(),
        )
        try:
            self.model = Model(**self._answer())
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def measure(self, kind: str, count: int) -> Measurement:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind} {count}\n")
        self._process.stdin.flush()
        return Measurement(**self._answer())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._process:  # closes the pipes, at which it ends, and waits
            pass

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a benchmark's process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


# By work: one measurement a round.
_Rounds = dict[str, list[Measurement]]


def _take_turns(
    configs: Mapping[str, ChildConfig | DenseConfig],
    works: _Works,
    repeats: int,
    report: Callable[[str], None],
) -> tuple[dict[str, Model], dict[str, _Rounds], dict[str, dict[str, Any]]]:
    """Return by name the model that ran, what it measured in each round, and its figures."""
    with ExitStack() as running:
        processes = {
            name: running.enter_context(ModelProcess(config)) for name, config in configs.items()
        }
        rounds = _measure(processes, works, repeats)
    models = {name: process.model for name, process in processes.items()}
    figures = {name: _figures(model, works, rounds[name]) for name, model in models.items()}
    for name, one in figures.items():
        _report(name, one, works, report)
    return models, rounds, figures


def _measure(models: dict[str, ModelProcess], works: _Works, repeats: int) -> dict[str, _Rounds]:
    rounds: dict[str, _Rounds] = {name: {work: [] for work in works} for name in models}
    for repeat in range(repeats + 1):
        for kind in ("decode", "prefill"):  # what a ratio compares lies near each other in time
            for name, model in models.items():
                for work in _of_kind(kind, works):
                    measurement = model.measure(*works[work])
                    if repeat:
                        rounds[name][work].append(measurement)
    return rounds


def _of_kind(kind: str, works: _Works) -> Iterable[str]:
    return (work for work, (its_kind, _) in works.items() if its_kind == kind)


def _figures(model: Model, works: _Works, rounds: _Rounds) -> dict[str, Any]:
    figures: dict[str, Any] = asdict(model)
    for work, (kind, count) in works.items():
        measured = rounds[work]
        figure: dict[str, Any] = {
            "ms": asdict(spread_of([1e3 * m.seconds for m in measured])),
            "tokens_per_s": asdict(spread_of([count / m.seconds for m in measured])),
        }
        if kind == "decode":
            shares = [model.step_bytes / m.read_bytes_per_s / m.seconds for m in measured]
            reads = [m.read_bytes_per_s / 1e9 for m in measured]
            figure |= {
                "of_roofline": asdict(spread_of(shares)),
                "read_gb_per_s": asdict(spread_of(reads)),
            }
        figures[work] = figure
    pairs = zip(rounds["decode_1"], rounds["decode_8"], strict=True)
    figures["batch_8_to_1"] = asdict(
        spread_of([8 * one.seconds / eight.seconds for one, eight in pairs])
    )
    return figures


def _ratios(model: Model, other: Model, ours: _Rounds, theirs: _Rounds) -> dict[str, Any]:
    """Return speeds as multiples of the other's, round by round, and memory as shares of its."""
    ratios: dict[str, Any] = {work: asdict(_pairwise(theirs[work], ours[work])) for work in _WORK}
    ratios["weights_bytes"] = model.weights_bytes / other.weights_bytes
    if model.rss_anon_bytes is not None and other.rss_anon_bytes is not None:
        ratios["rss_anon_bytes"] = model.rss_anon_bytes / other.rss_anon_bytes
    return ratios


def _multiples(ratios: Mapping[str, Any], works: _Works) -> str:
    return ", ".join(f"{work} {ratios[work]['median']:.2f}x" for work in works)


def _pairwise(slow: list[Measurement], fast: list[Measurement]) -> Spread:
    return spread_of([a.seconds / b.seconds for a, b in zip(slow, fast, strict=True)])


def _report(
    name: str, figures: dict[str, Any], works: _Works, report: Callable[[str], None]
) -> None:
    resident = figures["rss_anon_bytes"]
    report(
        f"{name}: made in {figures['made_s']:.1f} s, weights {figures['weights_bytes'] / 1e9:.2f} "
        f"GB, resident {'unknown' if resident is None else f'{resident / 1e9:.2f} GB'}"
    )
    for work, (kind, count) in works.items():
        one = figures[work]
        line = f"  {kind} {count}: {one['ms']['median']:.1f} ms, "
        line += f"{one['tokens_per_s']['median']:.1f} tok/s"
        if kind == "decode":
            line += (
                f", {100 * one['of_roofline']['median']:.0f}% of the roofline "
                f"at {one['read_gb_per_s']['median']:.1f} GB/s"
            )
        report(line)
    report(f"  batch 8 at {figures['batch_8_to_1']['median']:.1f} times the rate of batch 1")
