"""What a library makes of the 16-bit twin's linears: `python -m bitwatt.bench.dense_child CONFIG`.

Answers as cpu_child.py does, with the linears and the head alone: no attention, norms, sampling or
scheduling, so the twin, which does all of it, is measured against less work than its own. A few
layers' weights stand for all, taken in turns; they are many times what the caches hold.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from bitwatt_kernels.cpu.dense import has_blocked_kernels
from bitwatt_kernels.cpu.native_backend import NativeBackend
from torch import Tensor
from torch.nn import functional

from bitwatt.bench.cpu_child import Measurement, Model
from bitwatt.model.presets import PRESETS

__all__ = ["DenseConfig", "DenseLibrary", "libraries"]

DenseLibrary = Literal["torch bfloat16", "torch float32", "oneDNN bfloat16, packed"]
_PACKED: DenseLibrary = "oneDNN bfloat16, packed"

_HELD_LAYERS = 4
_DECODE_STEPS, _WARMUP_STEPS = 4, 1

_Linear = Callable[[Tensor], Tensor]


def libraries() -> list[DenseLibrary]:
    """Return those that run here: oneDNN packs no bfloat16 where a processor has AVX2 alone."""
    every: tuple[DenseLibrary, ...] = get_args(DenseLibrary)
    return [one for one in every if one != _PACKED or has_blocked_kernels(torch.bfloat16)]


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """A preset's shape, or its first layers, and what multiplies; else as ChildConfig."""

    preset: str
    num_layers: int
    library: DenseLibrary
    num_threads: int | None = None
    read_bytes: int = 1 << 28


class _Child:
    def __init__(self, options: DenseConfig) -> None:
        self.options = options
        self.backend = NativeBackend(torch.device("cpu"), num_threads=options.num_threads)
        torch.set_num_threads(self.backend.num_threads)
        started = time.perf_counter()
        self.config = config = PRESETS[options.preset]
        self.dtype = torch.float32 if options.library == "torch float32" else torch.bfloat16
        queries = config.num_heads * config.head_dim
        qkv = queries + 2 * config.num_kv_heads * config.head_dim
        shapes = (
            (qkv, config.hidden_size),
            (config.hidden_size, queries),
            (2 * config.intermediate_size, config.hidden_size),
            (config.hidden_size, config.intermediate_size),
        )
        num_held = min(_HELD_LAYERS, options.num_layers)
        self.layers = [[self._linear(*shape) for shape in shapes] for _ in range(num_held)]
        self.head = self._linear(config.vocab_size, config.hidden_size)
        layer_weights = sum(rows * columns for rows, columns in shapes)
        head_weights = config.vocab_size * config.hidden_size
        num_bytes = (options.num_layers * layer_weights + head_weights) * self.dtype.itemsize
        self.model = Model(
            instruction_set=options.library,
            num_threads=self.backend.num_threads,
            made_s=time.perf_counter() - started,
            weights_bytes=num_bytes,
            step_bytes=num_bytes,
            rss_anon_bytes=None,  # not all layers are held
        )

    def _linear(self, rows: int, columns: int) -> tuple[int, _Linear]:
        weight = torch.empty(rows, columns, dtype=self.dtype).uniform_(-0.02, 0.02)
        if self.options.library != _PACKED:
            return columns, lambda x: functional.linear(x, weight)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        multiply = torch.ops.mkldnn._linear_pointwise
        return columns, lambda x: multiply(x, packed, None, "none", [], "")

    def measure(self, kind: str, count: int) -> Measurement:
        read_bytes_per_s = self.backend.measure_read_bandwidth(self.options.read_bytes)
        with torch.inference_mode():
            inputs = {
                columns: torch.randn(count, columns, dtype=self.dtype)
                for columns in {columns for layer in self.layers for columns, _ in layer}
            }
            of_head = torch.randn(
                count if kind == "decode" else 1, self.config.hidden_size, dtype=self.dtype
            )
            num_warmups, num_steps = (_WARMUP_STEPS, _DECODE_STEPS) if kind == "decode" else (0, 1)
            for step in range(num_warmups + num_steps):
                if step == num_warmups:
                    started = time.perf_counter()
                for layer in range(self.options.num_layers):
                    for columns, linear in self.layers[layer % len(self.layers)]:
                        linear(inputs[columns])
                self.head[1](of_head)
            seconds = (time.perf_counter() - started) / num_steps
        return Measurement(seconds, read_bytes_per_s)


def main() -> None:
    """Make the weights of the JSON given as the only argument, and answer until the input ends."""
    child = _Child(DenseConfig(**json.loads(sys.argv[1])))
    gc.freeze()
    print(json.dumps(asdict(child.model)), flush=True)
    for line in sys.stdin:
        kind, count = line.split()
        print(json.dumps(asdict(child.measure(kind, int(count)))), flush=True)


if __name__ == "__main__":
    main()
