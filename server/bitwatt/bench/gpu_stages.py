"""One stage of `make gpu`, in a process of its own: python -m bitwatt.bench.gpu_stages.

A kernel that faults ends its stage and no other, and one that hangs is killed with it. Every row is
in the results file as soon as it is measured.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench.layer_ops import bench_layer_ops
from bench.machine import Board, describe_machine, gpu_rates, measure_rates
from bench.matmuls import MatmulShape, bench_matmuls, summarize_matmuls
from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.timing import CudaTimer, HostTimer, Timer
from bitwatt_kernels.gpu.triton_backend import TritonBackend

from bitwatt.bench.gpu_models import bench_model, model_sizes
from bitwatt.bench.gpu_results import NO_GPU, REPOSITORY, Results
from bitwatt.bench.gpu_serving import Server, ServingLimits, check_serving, time_serving
from bitwatt.model.config import ModelConfig, Weights
from bitwatt.model.presets import PRESETS
from bitwatt.model.random_weights import random_model

__all__ = ["main"]

OPS = REPOSITORY / "tests/kernels/gpu/ops"
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


@dataclass(frozen=True, slots=True)
class _Bench:
    """What every stage has."""

    results: Results
    device: torch.device
    gpu: Gpu
    timer: Timer
    board: Board
    is_rehearsal: bool


def _config(model: str) -> ModelConfig:
    return REHEARSAL if model == "rehearsal" else PRESETS[model]


def _rates(bench: _Bench) -> None:
    """The machine, and what it sustains."""
    figures, failed = measure_rates(bench.device, bench.timer, 64 if bench.is_rehearsal else 8192)
    bench.results.put(
        machine=describe_machine(bench.device),
        launch_configurations=bench.gpu.configs.source,
        board_unavailable=bench.board.unavailable,
        board=bench.board.now(),
        rates=figures,
    )
    for name, reason in failed.items():
        bench.results.skip(f"rate {name}", reason)


def _models(
    bench: _Bench,
    model: str,
    weights: Weights,
    batches: list[int],
    prompts: list[int],
    *,
    energy_s: float = 1.5,
    pdl: bool = False,
    persistent_step: bool = False,
) -> None:
    if bench.is_rehearsal:
        prompts = [20 for _ in prompts[:1]]
    rows = bench_model(
        model,
        _config(model),
        weights,
        batches=batches,
        prompts=prompts,
        context=20 if bench.is_rehearsal else 512,
        device=bench.device,
        dtype=torch.bfloat16,
        rates=gpu_rates(bench.results.data.get("rates", {})),
        timer=bench.timer,
        board=bench.board,
        energy_s=energy_s,
        pdl=pdl,
        persistent_step=persistent_step,
    )
    for row in rows:
        bench.results.add("end_to_end", row)
        if not row.get("equals_five_kernels", True):
            raise RuntimeError("a persistent step's logits are not those of five kernels a layer")


def _headline(bench: _Bench, model: str) -> None:
    """The figure that counts: one sequence decoded, ternary beside the best of 16 bits."""
    _models(bench, model, "ternary", [1], [], energy_s=4.0)
    _models(bench, model, "dense", [1], [], energy_s=4.0)


def _model(bench: _Bench, model: str, weights: Weights) -> None:
    """The batches and prompts that the headline leaves out."""
    _models(bench, model, weights, [2] if bench.is_rehearsal else [8, 32, 128], [1024, 4096])


def _whole_model(bench: _Bench, model: str, weights: Weights) -> None:
    _models(bench, model, weights, [1, 8, 32, 128], [1024, 4096])


def _pdl(bench: _Bench, model: str) -> None:
    if bench.gpu.capability < (9, 0) and not bench.is_rehearsal:
        return
    _models(bench, model, "ternary", [1] if bench.is_rehearsal else [1, 8], [], pdl=True)


def _persistent(bench: _Bench, model: str) -> None:
    """All layers in one kernel, whose programs wait for one another: an experiment."""
    batches = [1, 2] if bench.is_rehearsal else [1, 8]
    _models(bench, model, "ternary", batches, [], persistent_step=True)


def _serving(bench: _Bench, model: str) -> None:
    """Scheduler, runner, graphs and sampler: exact, waiting for nothing, and how fast."""
    backend = TritonBackend(bench.device)
    config = _config(model)
    built = random_model(config, weights="ternary", backend=backend, dtype=torch.bfloat16, seed=0)
    if bench.is_rehearsal:
        limits, prompts, max_tokens = ServingLimits(6, 16, 64), [3, 20, 5, 1], 2
        timed = [(1, 2, 3)]
    else:
        limits = ServingLimits(32, 512, min(config.max_model_len, 4096))
        prompts, max_tokens = [4000, 17, 300, 1000, 1, 513, 64, 128], 32
        timed = [(1, 512, 128), (8, 512, 128), (32, 512, 64)]
    server = Server(built, limits)
    try:
        row = check_serving(server, prompts, max_tokens)
        bench.results.put(serving_check=row)
        for num_sequences, prompt_tokens, num_drawn in timed:
            for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}):
                figures = time_serving(
                    server,
                    num_sequences=num_sequences,
                    prompt_tokens=prompt_tokens,
                    max_tokens=num_drawn,
                    sampling=sampling,
                )
                state = bench.board.now()
                bench.results.add("serving", {"model": model, **figures, "board": state})
    finally:
        server.close()
    if row["num_equal"] != row["num_tokens"]:
        raise RuntimeError(
            f"{row['num_tokens'] - row['num_equal']} of {row['num_tokens']} tokens served are not "
            f"those of the model run eagerly: {row['differ'][:3]}"
        )


def _layer_ops(bench: _Bench, model: str) -> None:
    config = _config(model)
    rows = bench_layer_ops(
        model,
        model_sizes(config),
        config.activation,
        num_tokens=[2] if bench.is_rehearsal else [1, 8, 32, 128],
        context=20 if bench.is_rehearsal else 512,
        max_context=config.max_model_len,
        device=bench.device,
        timer=bench.timer,
    )
    for row in rows:
        bench.results.add("layer_ops", row)


def _shapes(model: str) -> list[MatmulShape]:
    if model == "8192²":
        return [MatmulShape(model, "square", 8192, 8192)]
    shapes = model_sizes(_config(model)).linear_shapes
    return [MatmulShape(model, layer, n, k) for layer, (n, k) in shapes.items()]


def _matmuls(bench: _Bench, *models: str) -> None:
    rows = bench_matmuls(
        [shape for model in models for shape in _shapes(model)],
        [1, 20] if bench.is_rehearsal else NUM_TOKENS,
        bench.gpu,
        gpu_rates(bench.results.data.get("rates", {})),
        bench.timer,
        bench.board,
        bench.results.data.get("machine", {}).get("l2_bytes", 0),
    )
    for row in rows:
        bench.results.add("matmuls", row)
        bench.results.put(matmul_summary=summarize_matmuls(bench.results.data["matmuls"]))


def _tests(bench: _Bench) -> None:
    """The kernels' tests on the device, a process a module so that they compile side by side."""
    marked = [] if bench.is_rehearsal else ["-m", "gpu"]
    # The project's own settings ask for plugins that a GPU image lacks.
    options = ["-q", "-c", os.devnull, "--rootdir", str(REPOSITORY), "-p", "no:cacheprovider"]
    one = OPS / "test_elementwise.py"  # the fewest seconds in the interpreter
    modules = [one] if bench.is_rehearsal else sorted(OPS.glob("test_*.py"))
    figures: dict[str, Any] = {"passed": 0, "failed": [], "unfinished": [m.name for m in modules]}
    # Files, not pipes: one that nobody reads stops a process that has much to say.
    with ExitStack() as stack:
        running = {}
        for module in modules:
            file = stack.enter_context(tempfile.TemporaryFile("w+"))
            run = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "pytest", *options, *marked, str(module)],
                cwd=REPOSITORY,
                env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
            running[module.name] = (run, file)
        while running:
            time.sleep(0.1)
            for name, (run, file) in list(running.items()):
                if run.poll() is None:
                    continue
                del running[name]
                file.seek(0)
                output = file.read()
                passed = sum(int(n) for n in re.findall(r"(\d+) passed", output))
                failed = [line for line in output.splitlines() if line.startswith("FAILED")]
                if run.returncode and not failed:
                    failed = [f"{name}: exit status {run.returncode}"]
                if failed:
                    print(output[-6000:], file=sys.stderr)
                figures["passed"] += passed
                figures["failed"] += failed
                figures["unfinished"].remove(name)
                bench.results.put(tests=figures)
    if figures["failed"] or not figures["passed"]:
        raise RuntimeError(f"{figures['passed']} passed, {len(figures['failed'])} failed")


_STAGES: dict[str, Callable[..., None]] = {
    "rates": _rates,
    "headline": _headline,
    "serving": _serving,
    "tests": _tests,
    "model": _model,
    "whole_model": _whole_model,
    "layer_ops": _layer_ops,
    "matmuls": _matmuls,
    "pdl": _pdl,
    "persistent": _persistent,
}


def main() -> int:
    """Return the exit status: NO_GPU where there is none; what a stage raises is its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=_STAGES)
    parser.add_argument("results", type=Path)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    device = torch.device("cpu" if given.rehearse else "cuda")
    try:
        gpu = Gpu(device)
    except BackendError as error:
        print(f"make gpu cannot run here: {error}", file=sys.stderr)
        return NO_GPU
    timer: Timer = HostTimer() if given.rehearse else CudaTimer()
    bench = _Bench(Results(given.results), device, gpu, timer, Board(device), given.rehearse)
    _STAGES[given.stage](bench, *given.arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
