"""ternary_linear against cuBLAS over the layer shapes of published models, weights cold in L2."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.elementwise import quantize
from bitwatt_kernels.gpu.linear import ternary_linear
from bitwatt_kernels.gpu.timing import Call, Timer, Timing
from bitwatt_kernels.packing import VALID_BYTES, TernaryWeight
from bitwatt_kernels.roofline import Gpu as GpuRates
from bitwatt_kernels.roofline import Weights, linear
from torch import Tensor

from bench.cublas import best_way
from bench.machine import Board

__all__ = ["MatmulShape", "bench_matmuls", "random_codes", "summarize_matmuls"]

# Weights read in turn add up to this many times L2, so that none is found there.
ROTATED_L2 = 4
MIN_INT_MM_TOKENS = 17  # torch._int_mm refuses fewer


@dataclass(frozen=True, slots=True)
class MatmulShape:
    """One matmul of a model's layer."""

    model: str
    layer: str
    out_features: int
    in_features: int


def random_codes(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return packed codes of uniformly random ternary weights; shape counts bytes."""
    valid = torch.tensor(VALID_BYTES, dtype=torch.uint8, device=device)
    return valid[torch.randint(len(valid), shape, device=device, dtype=torch.uint8).int()]


def _measure(
    kind: str, shape: MatmulShape, num_tokens: int, gpu: Gpu, timer: Timer, rotated_bytes: int
) -> tuple[str, Timing]:
    """Return what was run, and its time, each call with a weight of its own."""
    n, k, device = shape.out_features, shape.in_features, gpu.device
    x = torch.randn(num_tokens, k, device=device).to(torch.bfloat16)
    weight_bytes = {"ternary": n * k // 4, "bf16": n * k * 2, "int8": n * k}[kind]
    count = min(max(2, -(-rotated_bytes // weight_bytes)), 400)
    calls: list[Call]
    if kind == "ternary":
        q, scales = quantize(x, gpu), torch.full((n,), 0.02, device=device)
        weights = [TernaryWeight(c, scales) for c in random_codes((count, n, k // 4), device)]
        calls = [lambda w=w: ternary_linear(q, w, None, torch.bfloat16, gpu) for w in weights]
        return "ternary_linear", timer.measure(calls)
    if kind == "bf16":
        dense = torch.randn(count, n, k, dtype=torch.bfloat16, device=device).mul_(0.02)
        return best_way(x, list(dense), timer, budget_s=0.1)
    codes = torch.randint(-1, 2, (count, n, k), dtype=torch.int8, device=device)
    x8 = quantize(x, gpu).codes
    calls = [lambda w=w: torch._int_mm(x8, w.T) for w in codes]
    return "torch._int_mm", timer.measure(calls)


def bench_matmuls(
    shapes: list[MatmulShape],
    num_tokens: list[int],
    gpu: Gpu,
    rates: GpuRates,
    timer: Timer,
    board: Board,
    l2_bytes: int,
) -> Iterator[dict[str, Any]]:
    """Yield a row a shape and number of tokens: times, speed-ups and shares of the roofline."""
    for shape, tokens in product(shapes, num_tokens):
        row: dict[str, Any] = {
            "model": shape.model,
            "layer": shape.layer,
            "out_features": shape.out_features,
            "in_features": shape.in_features,
            "num_tokens": tokens,
        }
        for kind in ("ternary", "bf16", "int8"):
            if kind == "int8" and tokens < MIN_INT_MM_TOKENS:
                row[kind] = None
                continue
            way, timing = _measure(kind, shape, tokens, gpu, timer, ROTATED_L2 * l2_bytes)
            row[kind] = {"way": way, **timing.to_dict()}
        row["board"] = board.now()  # just after: clocks fall slowly
        ternary_s, bf16_s = row["ternary"]["median_s"], row["bf16"]["median_s"]
        row["speedup_over_bf16"] = bf16_s / ternary_s
        row["speedup_over_int8"] = row["int8"] and row["int8"]["median_s"] / ternary_s
        kinds: dict[str, Weights] = {"ternary": "ternary", "bf16": "dense"}
        for kind, weights in kinds.items():
            op = linear("", tokens, shape.out_features, shape.in_features, weights)
            floor_s = op.floor_s(rates)
            row[f"{kind}_roofline_s"] = floor_s
            row[f"{kind}_roofline_share"] = floor_s / row[kind]["median_s"]
        yield row


def summarize_matmuls(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a model and number of tokens: its layer's matmuls one after another."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["num_tokens"]), []).append(row)
    summary = []
    for (model, tokens), group in groups.items():
        times = {kind: sum(row[kind]["median_s"] for row in group) for kind in ("ternary", "bf16")}
        floor_s = sum(row["ternary_roofline_s"] for row in group)
        summary.append(
            {
                "model": model,
                "num_tokens": tokens,
                "ternary_s": times["ternary"],
                "bf16_s": times["bf16"],
                "speedup_over_bf16": times["bf16"] / times["ternary"],
                "ternary_roofline_share": floor_s / times["ternary"],
            }
        )
    return summary
