"""Attention over long contexts on this machine's CPU: a KV cache in int8 beside one of 16 bits.

The operation alone beside its roofline, and models of a few layers. Both caches
are taken in turns, for a shared machine's speed moves, and a ratio holds within a round. Decoding's
roofline is the bytes of keys and values at the rate that memory was read at just before.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any, Literal

import torch
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from bitwatt_kernels.cpu.native_backend import NativeBackend
from bitwatt_kernels.kv_blocks import cache_shape, write
from torch import Tensor

from bitwatt.bench.cpu import ModelProcess
from bitwatt.bench.cpu_child import ChildConfig
from bitwatt.bench.measure import spread_of
from bitwatt.model.config import ModelConfig
from bitwatt.model.presets import PRESETS

__all__ = ["bench_attention"]

_KINDS: dict[Literal["bfloat16", "int8"], torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
_CACHED_TOKENS = 1 << 16  # 168 MB of 2B4T in 16 bits: a step's layers are read from memory
_PROMPT_TOKENS = 512  # of a prefill's step

_Rounds = dict[str, list[float]]


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def bench_attention(
    *,
    presets: Iterable[str] = ("2B4T", "Bonsai 8B"),
    contexts: Sequence[int] = (4096, 16384),
    num_layers: int = 2,
    repeats: int = 3,
    num_threads: int | None = None,
    cpu_isa: str | None = None,
    read_bytes: int = 1 << 28,
    report: Callable[[str], None] = _print_to_stderr,
) -> dict[str, Any]:
    """Return milliseconds, shares of the roofline and ratios, by shape and tokens of context.

    num_layers   of the models
    repeats      counted rounds, after one that warms up
    num_threads  CPU threads; None takes all the process may use
    cpu_isa      instruction set of the kernels; None takes the fastest that runs
    read_bytes   what the rate of memory is measured on; far more than the caches hold
    report       takes a line as each figure is known
    """
    backend = NativeBackend(torch.device("cpu"), num_threads=num_threads, instruction_set=cpu_isa)
    results: dict[str, Any] = {
        "num_layers": num_layers,
        "instruction_set": backend.instruction_set,
        "num_threads": backend.num_threads,
    }
    for preset in presets:
        config = PRESETS[preset]
        results[preset] = {}
        for context in contexts:
            figures = {
                "attention_decode": _decode(backend, config, context, repeats, read_bytes),
                "attention_prefill": _prefill(backend, config, context, repeats),
                **_models(preset, context, num_layers, repeats, num_threads, cpu_isa, read_bytes),
            }
            results[preset][str(context)] = figures
            for name, figure in figures.items():
                report(f"{preset}, {name}, {context} tokens: {_told(figure)}")
    return results


def _told(figure: dict[str, Any]) -> str:
    ratio = figure["ratio"]
    times = ", ".join(f"{kind} {figure[kind]['ms']['median']:.2f} ms" for kind in _KINDS)
    shares = [
        f"{kind} {share['median']:.0%}"
        for kind in _KINDS
        if (share := figure[kind].get("of_roofline"))
    ]
    of_roofline = f"; of the roofline {', '.join(shares)}" if shares else ""
    return f"{times}, {ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f}){of_roofline}"


def _decode(
    backend: NativeBackend, config: ModelConfig, context: int, repeats: int, read_bytes: int
) -> dict[str, Any]:
    """Return the figures of one token's attention in one layer, its cache read from memory."""
    num_caches = max(1, _CACHED_TOKENS // context)
    caches = {
        kind: [_cache(config, context, dtype) for _ in range(num_caches)]
        for kind, dtype in _KINDS.items()
    }
    layout, queries = _layout(context, 1), _queries(config, 1)
    rounds: _Rounds = {kind: [] for kind in _KINDS}
    shares: _Rounds = {kind: [] for kind in _KINDS}
    for repeat in range(repeats + 1):
        rate = backend.measure_read_bandwidth(read_bytes)
        for kind, its_caches in caches.items():
            seconds = _attend(backend, queries, its_caches, layout)
            if repeat:
                rounds[kind].append(seconds)
                shares[kind].append(its_caches[0].nbytes / rate / seconds)
    return _figures(rounds, shares)


def _prefill(
    backend: NativeBackend, config: ModelConfig, context: int, repeats: int
) -> dict[str, Any]:
    """Return the figures of a prompt's last step in one layer."""
    caches = {kind: [_cache(config, context, dtype)] for kind, dtype in _KINDS.items()}
    layout, queries = _layout(context, _PROMPT_TOKENS), _queries(config, _PROMPT_TOKENS)
    rounds: _Rounds = {kind: [] for kind in _KINDS}
    for repeat in range(repeats + 1):
        for kind, cache in caches.items():
            seconds = _attend(backend, queries, cache, layout)
            if repeat:
                rounds[kind].append(seconds)
    return _figures(rounds)


def _models(
    preset: str,
    context: int,
    num_layers: int,
    repeats: int,
    num_threads: int | None,
    cpu_isa: str | None,
    read_bytes: int,
) -> dict[str, Any]:
    """Return the figures of whole models: a token with so much context, and so long a prompt."""
    works = {"decode": ("decode", 1), "prefill": ("prefill", context)}
    rounds: dict[str, _Rounds] = {work: {kind: [] for kind in _KINDS} for work in works}
    with ExitStack() as stack:
        models = {
            kind: stack.enter_context(
                closing(
                    ModelProcess(
                        ChildConfig(
                            preset=preset,
                            num_layers=num_layers,
                            weights="ternary",
                            head_bits=8,
                            num_threads=num_threads,
                            cpu_isa=cpu_isa,
                            read_bytes=read_bytes,
                            max_batch=1,
                            context_tokens=context,
                            max_prompt_tokens=context,
                            kv_cache_dtype=kind,
                        )
                    )
                )
            )
            for kind in _KINDS
        }
        for repeat in range(repeats + 1):
            for work, (name, count) in works.items():
                for kind, model in models.items():
                    seconds = model.measure(name, count).seconds
                    if repeat:
                        rounds[work][kind].append(seconds)
    return {work: _figures(its) for work, its in rounds.items()}


def _figures(rounds: _Rounds, shares: _Rounds | None = None) -> dict[str, Any]:
    figures: dict[str, Any] = {
        kind: {"ms": asdict(spread_of([1e3 * s for s in seconds]))}
        for kind, seconds in rounds.items()
    }
    for kind, its in (shares or {}).items():
        figures[kind]["of_roofline"] = asdict(spread_of(its))
    pairs = zip(rounds["bfloat16"], rounds["int8"], strict=True)
    figures["ratio"] = asdict(spread_of([wide / narrow for wide, narrow in pairs]))
    return figures


def _attend(
    backend: NativeBackend, queries: Tensor, caches: list[Tensor], layout: StepLayout
) -> float:
    """Return the seconds of one cache's attention."""
    scale = queries.shape[2] ** -0.5
    started = time.perf_counter()
    for cache in caches:
        backend.attention(queries, cache, layout, scale)
    return (time.perf_counter() - started) / len(caches)


def _cache(config: ModelConfig, context: int, dtype: torch.dtype) -> Tensor:
    num_blocks = -(-context // BLOCK_SIZE)
    shape = cache_shape(num_blocks, config.num_kv_heads, config.head_dim, dtype)
    cache = torch.zeros(shape, dtype=dtype)
    keys_and_values = torch.randn(2, context, config.num_kv_heads, config.head_dim)
    write(cache, torch.arange(context), *keys_and_values)
    return cache


def _queries(config: ModelConfig, count: int) -> Tensor:
    return torch.randn(count, config.num_heads, config.head_dim).bfloat16()


def _layout(context: int, num_queries: int) -> StepLayout:
    """Return a step of one sequence's last tokens, its blocks in order."""
    positions = torch.arange(context - num_queries, context)
    return StepLayout(
        positions=positions,
        slots=positions,
        query_starts=torch.tensor([0, num_queries], dtype=torch.int32),
        context_lens=torch.tensor([context], dtype=torch.int32),
        block_tables=torch.arange(-(-context // BLOCK_SIZE), dtype=torch.int32)[None],
        max_query_len=num_queries,
        max_context_len=context,
    )
