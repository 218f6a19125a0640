"""Everything that wants a GPU, in one go: tests, kernels, whole models; one JSON and a table.

    make gpu ARGS="--output DIR"

and, where there is no make,

    PYTHONPATH=server:kernels:clients/python python3 -m bitwatt.bench.gpu --output DIR

Runs in a checkout, with kernels/ on the path for its package bench. Needs torch, triton, numpy,
nvidia-ml-py and pytest, and no more than a GPU image carries. With TRITON_INTERPRET=1 and
--rehearse it runs every stage on tiny shapes without a GPU: its figures mean nothing, but its code
has run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from bench.layer_ops import bench_layer_ops
from bench.machine import EnergyMeter, describe_machine, measure_rates
from bench.matmuls import MatmulShape, bench_matmuls, summarize_matmuls
from bench.report import goals, tables
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.gpu.configs import gpu_slug
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.timing import CudaTimer, HostTimer, Timer

from bitwatt.bench.gpu_models import bench_model, model_sizes, speedups
from bitwatt.model.config import ModelConfig, Weights
from bitwatt.model.presets import PRESETS

__all__ = ["main"]

REPOSITORY = Path(__file__).resolve().parents[3]
RESULTS = REPOSITORY / "kernels/bench/results"
OPS = REPOSITORY / "tests/kernels/gpu/ops"
TEST_TIMEOUT_S = 120  # of all modules at once: a kernel that hangs must not take the bench along
NUM_TOKENS = [1, 8, 32, 128, 1024, 4096]
REHEARSAL = ModelConfig(
    architecture="rehearsal",
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    max_model_len=64,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    activation="relu2",
    has_sub_norms=True,
    is_tied=True,
)


class Bench:
    """The stages, each of which adds its figures to results and leaves the file complete."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        self.is_rehearsal: bool = arguments.rehearse
        self.deadline = time.monotonic() + arguments.budget_s
        self.gpu = Gpu(device)
        self.timer: Timer = HostTimer() if self.is_rehearsal else CudaTimer()
        self.meter = EnergyMeter(device)
        self.results: dict[str, Any] = {
            "kind": "bitwatt gpu bench",
            "is_rehearsal": self.is_rehearsal,
            "machine": describe_machine(device),
            "launch_configurations": self.gpu.configs.source,
            "energy_unavailable": self.meter.unavailable,
            "skipped": {},
        }
        name = gpu_slug(self.gpu.name)
        day = time.strftime("%Y-%m-%d", time.gmtime())
        output: Path = arguments.output or RESULTS
        self.output = output if output.suffix == ".json" else output / f"{name}-{day}.json"

    def run(self, stages: list[tuple[str, Callable[[], None]]]) -> None:
        """Run the stages in order until the time is up; what is left out is named."""
        for name, stage in stages:
            started = time.monotonic()
            if started > self.deadline:
                self.results["skipped"][name] = "out of time (--budget-s)"
                continue
            print(f"{name} …", file=sys.stderr, flush=True)
            try:
                stage()
            except Exception as error:
                traceback.print_exc()
                self.results["skipped"][name] = f"failed: {error!r}"[:500]
            self.results.setdefault("stage_s", {})[name] = round(time.monotonic() - started, 1)
            self.save()

    def save(self) -> None:
        self.results["goals"] = goals(self.results)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.results, indent=1) + "\n")

    def test(self) -> None:
        """Run the kernels' tests on the device, a process a module so that compiling is shared."""
        marked = [] if self.is_rehearsal else ["-m", "gpu"]
        # The project's own settings ask for plugins that a GPU image lacks.
        options = ["-q", "-c", os.devnull, "--rootdir", str(REPOSITORY), "-p", "no:cacheprovider"]
        modules = sorted(OPS.glob("test_*.py"))[: 1 if self.is_rehearsal else None]
        # Files, not pipes: one that nobody reads stops a process that has much to say.
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in modules]
            runs = [
                subprocess.Popen(  # noqa: S603
                    [sys.executable, "-m", "pytest", *options, *marked, str(module)],
                    cwd=REPOSITORY,
                    env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for module, file in zip(modules, files, strict=True)
            ]
            deadline = time.monotonic() + TEST_TIMEOUT_S
            outputs = [_output(*run, deadline) for run in zip(runs, files, strict=True)]
        passed = sum(int(n) for out in outputs for n in re.findall(r"(\d+) passed", out))
        failed = [line for out in outputs for line in out.splitlines() if "FAILED" in line]
        are_good = all(run.returncode == 0 for run in runs) and passed > 0
        self.results["tests"] = {
            "passed": are_good,
            "summary": f"{passed} passed, {len(failed)} failed",
            "failed": failed,
        }
        if not are_good:
            for run, output in zip(runs, outputs, strict=True):
                if run.returncode:
                    print(output[-6000:], file=sys.stderr)

    def measure_rates(self) -> None:
        self.rates, figures = measure_rates(
            self.device, self.timer, 64 if self.is_rehearsal else 8192
        )
        self.results["rates"] = figures

    def bench_matmuls(self, models: list[str]) -> None:
        shapes = [shape for model in models for shape in _shapes(model)]
        rows = self.results.setdefault("matmuls", [])
        for row in bench_matmuls(
            shapes,
            [1, 20] if self.is_rehearsal else NUM_TOKENS,
            self.gpu,
            self.rates,
            self.timer,
            self.results["machine"].get("l2_bytes", 0),
        ):
            rows.append(row)
            self.save()
            if time.monotonic() > self.deadline:
                self.results["skipped"]["matmuls"] = f"out of time after {row['model']}"
                break
        self.results["matmul_summary"] = summarize_matmuls(rows)

    def bench_layer_ops(self, name: str) -> None:
        config = _config(name)
        self.results["layer_ops"] = list(
            bench_layer_ops(
                name,
                model_sizes(config),
                config.activation,
                num_tokens=[2] if self.is_rehearsal else [1, 8, 32, 128],
                context=20 if self.is_rehearsal else 512,
                max_context=config.max_model_len,
                device=self.device,
                timer=self.timer,
            )
        )

    def bench_model(self, name: str, weights: Weights, *, pdl: bool = False) -> None:
        batches, prompts = [1, 8, 32, 128], [1024, 4096]
        if pdl:
            batches, prompts = [1, 8], []
        if self.is_rehearsal:
            batches, prompts = [2], [] if pdl else [20]
        rows = self.results.setdefault("end_to_end", [])
        rows += bench_model(
            name,
            _config(name),
            weights,
            batches=batches,
            prompts=prompts,
            context=20 if self.is_rehearsal else 512,
            device=self.device,
            dtype=torch.bfloat16,
            rates=self.rates,
            timer=self.timer,
            meter=self.meter,
            pdl=pdl,
        )
        self.results["speedups"] = speedups(rows)


def _output(run: subprocess.Popen[str], file: IO[str], deadline: float) -> str:
    """Return what a process printed; one that doesn't end by the deadline is killed."""
    told = ""
    try:
        run.wait(timeout=max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
        told = f"\nFAILED: killed after {TEST_TIMEOUT_S} s\n"
    file.seek(0)
    return file.read() + told


def _config(model: str) -> ModelConfig:
    return REHEARSAL if model == "rehearsal" else PRESETS[model]


def _shapes(model: str) -> list[MatmulShape]:
    if model == "8192²":
        return [MatmulShape(model, "square", 8192, 8192)]
    shapes = model_sizes(_config(model)).linear_shapes
    return [MatmulShape(model, layer, n, k) for layer, (n, k) in shapes.items()]


def _stages(bench: Bench, arguments: argparse.Namespace) -> list[tuple[str, Callable[[], None]]]:
    """Return the stages, those that answer most first."""
    first, others = ("rehearsal", []) if bench.is_rehearsal else ("2B4T", ["3B", "7B"])
    squares = [] if bench.is_rehearsal else ["8192²"]
    large = [] if bench.is_rehearsal else ["3B", "7B", "70B"]

    def models(name: str) -> list[tuple[str, Callable[[], None]]]:
        return [
            (f"{name} ternary", lambda: bench.bench_model(name, "ternary")),
            (f"{name} dense", lambda: bench.bench_model(name, "dense")),
        ]

    stages: list[tuple[str, Callable[[], None]]] = []
    if not arguments.skip_tests:
        stages.append(("tests", bench.test))
    stages.append(("rates", bench.measure_rates))
    stages += models(first)
    stages.append((f"{first} layer ops", lambda: bench.bench_layer_ops(first)))
    stages.append(("matmuls", lambda: bench.bench_matmuls([first, *squares])))
    stages += [stage for name in reversed(others) for stage in models(name)]
    if bench.gpu.capability >= (9, 0) or bench.is_rehearsal:
        stages.append((f"{first} pdl", lambda: bench.bench_model(first, "ternary", pdl=True)))
    if large:
        stages.append(("matmuls of large models", lambda: bench.bench_matmuls(large)))
    return stages


def main() -> int:
    """Return the exit status: 0 if every stage ran and every test passed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the JSON goes, or its path; default kernels/bench/results/",
    )
    parser.add_argument("--budget-s", type=float, default=540.0, help="start no stage after this")
    parser.add_argument("--skip-tests", action="store_true", help="benchmarks alone")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in the interpreter")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    try:
        bench = Bench(arguments, device)
    except BackendError as error:
        print(f"make gpu cannot run here: {error}", file=sys.stderr)
        return 2
    bench.run(_stages(bench, arguments))
    print(tables(bench.results))
    print(f"\nevery figure, with its spread and its roofline: {bench.output}")
    tests = bench.results.get("tests")
    summary = {key: bench.results[key] for key in ("is_rehearsal", "machine", "skipped", "goals")}
    print(json.dumps(summary | {"tests": tests and tests["summary"]}))
    return 0 if not bench.results["skipped"] and (tests is None or tests["passed"]) else 1


if __name__ == "__main__":
    sys.exit(main())
