"""Search ternary_linear's launch configurations on the GPU at hand and write them as data.

    python -m bitwatt_kernels.gpu.tune --shapes 3840x2560 2560x2560 13824x2560 2560x6912

Compiling the candidates takes minutes of every core, which is why it never happens while serving.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.resources import files
from itertools import product
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from bitwatt_kernels.errors import BackendError
from bitwatt_kernels.gpu.configs import LinearConfig, TunedConfigs, gpu_slug
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.elementwise import quantize
from bitwatt_kernels.gpu.linear import ternary_linear
from bitwatt_kernels.gpu.timing import CudaTimer, Timer
from bitwatt_kernels.packing import TernaryWeight

__all__ = ["REGIMES", "candidates", "precompile", "tune"]

# The most tokens an entry serves, and how many it is timed with.
REGIMES: tuple[tuple[int | None, int], ...] = (
    (8, 1),
    (16, 16),
    (32, 32),
    (64, 64),
    (128, 128),
    (None, 1024),
)
BITNET_2B4T = ((3840, 2560), (2560, 2560), (13824, 2560), (2560, 6912))
ROTATED_BYTES = 256 << 20  # several times any L2
_SLOW_INT8 = (10, 11)  # compute capabilities whose int8 instructions are those of 8.0
MAX_JOBS = 16  # each has a CUDA context of half a gigabyte on the GPU
WORTH_AN_OVERRIDE = 0.97  # of the time with the entry that serves every shape


def candidates(max_tokens: int | None, *, bfloat16: bool = False) -> list[LinearConfig]:
    """Return the configurations worth timing for up to max_tokens: tiles that fit registers.

    bfloat16  whether to try that too for any number of tokens
    """
    found = []
    block_tokens = [128, 256] if max_tokens is None else sorted({min(max_tokens, 64), max_tokens})
    if bfloat16 and max_tokens is None:
        # Triton keeps sums of each of four planes: of more tokens they exceed tensor memory.
        block_tokens.insert(0, 64)
    for tokens, out, num_bytes in product(block_tokens, (32, 64, 128), (32, 64, 128, 256)):
        num_warps = 8 if out * tokens >= 128 * 128 else 2 if out == 32 and tokens <= 16 else 4
        accumulators = out * tokens // (32 * num_warps)
        too_large = out * num_bytes > 64 * 256 or tokens * num_bytes > 128 * 64
        if accumulators > 128 or too_large or (num_bytes == 32 and tokens < 256):
            continue
        splits = (1,) if max_tokens is None else (None, 1, 2, 4)
        for num_stages, num_splits in product((3, 4), splits):
            found.append(
                LinearConfig(
                    max_tokens,
                    out,
                    tokens,
                    num_bytes,
                    num_warps,
                    num_stages,
                    num_splits,
                    split_planes=accumulators <= 32,
                )
            )
    if bfloat16 and max_tokens is None:
        found += [replace(c, bfloat16=True) for c in found if c.block_tokens == 64]
    return found


def _time_s(
    shape: tuple[int, int],
    num_tokens: int,
    choices: Sequence[LinearConfig],
    gpu: Gpu,
    timer: Timer,
    rotated_bytes: int,
) -> list[float]:
    """Return each choice's median seconds; infinity where the GPU lacks the shared memory."""
    out_features, in_features = shape
    count = min(max(2, -(-rotated_bytes // (out_features * in_features // 4))), 200)
    size = (count, out_features, in_features // 4)
    codes = torch.randint(0, 256, size, dtype=torch.uint8, device=gpu.device)
    scales = torch.ones(out_features, device=gpu.device)
    weights = [TernaryWeight(c, scales) for c in codes]
    x = quantize(torch.randn(num_tokens, in_features, device=gpu.device), gpu)
    times = []
    for choice in choices:
        calls = [
            lambda w=w, c=choice: ternary_linear(x, w, None, torch.bfloat16, gpu, c)
            for w in weights
        ]
        try:
            times.append(timer.measure(calls, budget_s=0.02).median_s)
        except OutOfResources:
            times.append(math.inf)
    return times


def _compile(config: LinearConfig, in_features: int) -> None:
    """Leave a configuration's kernel in Triton's cache on disk."""
    gpu = Gpu(torch.device("cuda"))
    x = quantize(torch.zeros(config.block_tokens, in_features, device=gpu.device), gpu)
    size = (config.block_out, in_features // 4)
    codes = torch.zeros(size, dtype=torch.uint8, device=gpu.device)
    weight = TernaryWeight(codes, torch.ones(config.block_out, device=gpu.device))
    with contextlib.suppress(OutOfResources):
        ternary_linear(x, weight, None, torch.bfloat16, gpu, config)


def precompile(
    shapes: Sequence[tuple[int, int]],
    jobs: int,
    *,
    regimes: Sequence[tuple[int | None, int]] = REGIMES,
    choices: Callable[[int | None], list[LinearConfig]] = candidates,
) -> None:
    """Compile every candidate for every shape in as many processes as jobs."""
    kernels: dict[tuple[LinearConfig, bool], int] = {}
    for (max_tokens, _), (_, in_features) in product(regimes, shapes):
        for choice, num_splits in product(choices(max_tokens), (1, 2)):
            has_tail = in_features // 4 % choice.block_bytes != 0
            config = replace(choice, max_tokens=None, num_splits=num_splits)
            kernels[config, has_tail] = in_features
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        configs = [config for config, _ in kernels]
        list(pool.map(_compile, configs, kernels.values(), chunksize=4))


def tune(
    gpu: Gpu,
    shapes: Sequence[tuple[int, int]],
    timer: Timer,
    *,
    regimes: Sequence[tuple[int | None, int]] = REGIMES,
    choices: Callable[[int | None], list[LinearConfig]] = candidates,
    rotated_bytes: int = ROTATED_BYTES,
    report: Callable[[str], object] = print,
) -> TunedConfigs:
    """Return gpu's configurations with the fastest linear entries for (out, in) shapes.

    An entry that serves every shape has the least geometric mean; a shape has entries of its own
    where they save 3% or more.
    """
    chosen: list[LinearConfig] = []
    own: dict[str, list[LinearConfig]] = {f"{n}x{k}": [] for n, k in shapes}
    is_worth_it = dict.fromkeys(own, False)
    for max_tokens, num_tokens in regimes:
        entries = choices(max_tokens)
        times = [_time_s(s, num_tokens, entries, gpu, timer, rotated_bytes) for s in shapes]
        means = [math.prod(column) for column in zip(*times, strict=True)]
        best = means.index(min(means))
        if math.isinf(means[best]):
            raise BackendError(f"no launch configuration fits {gpu.name} at {num_tokens} tokens")
        chosen.append(entries[best])
        for name, row in zip(own, times, strict=True):
            fastest = row.index(min(row))
            if row[fastest] < WORTH_AN_OVERRIDE * row[best]:
                is_worth_it[name] = True
            else:
                fastest = best
            own[name].append(entries[fastest])
            report(f"{name}, {num_tokens} tokens: {row[fastest] * 1e6:.1f} µs, {entries[fastest]}")
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return replace(
        gpu.configs,
        gpu=gpu.name,
        source=f"linear entries measured on {gpu.name}, {day}; others as {gpu.configs.gpu}",
        linear=tuple(chosen),
        shapes={name: tuple(entries) for name, entries in own.items() if is_worth_it[name]},
    )


def _shape(text: str) -> tuple[int, int]:
    out_features, in_features = (int(number) for number in text.split("x"))
    return out_features, in_features


def tune_this_gpu(
    shapes: Sequence[tuple[int, int]] = BITNET_2B4T,
    *,
    output: Path | None = None,
    jobs: int | None = None,
) -> int:
    """Tune for (out, in) shapes, write the JSON and return the exit status.

    output  None for the package's own tuned folder
    jobs    processes that compile; None for one a core, at most MAX_JOBS
    """
    try:
        gpu = Gpu(torch.device("cuda"))
        jobs = jobs or min(MAX_JOBS, len(os.sched_getaffinity(0)))
        choices = partial(candidates, bfloat16=gpu.capability[0] in _SLOW_INT8)
        precompile(shapes, jobs, choices=choices)
        tuned = tune(gpu, shapes, CudaTimer(), choices=choices, report=_say)
    except BackendError as error:
        _say(f"cannot tune here: {error}")
        return 2
    folder = Path(str(files("bitwatt_kernels"))) / "tuned"
    output = output or folder / f"{gpu_slug(gpu.name)}.json"
    output.write_text(tuned.to_json())
    _say(f"wrote {output}")
    return 0


def main() -> int:
    """Read the command line, which needs no more than this package, and tune."""
    parser = argparse.ArgumentParser(description="Tune launch configurations on this GPU.")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=BITNET_2B4T, metavar="OUTxIN")
    parser.add_argument("--output", type=Path, help="default: the package's own tuned folder")
    parser.add_argument("--jobs", type=int, help="processes that compile")
    arguments = parser.parse_args()
    return tune_this_gpu(arguments.shapes, output=arguments.output, jobs=arguments.jobs)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
