"""The 2B4T shape on this machine's CPU: read bandwidth, then packed ternary beside its 16-bit twin.

Every figure is measured in one run. The roofline is the least time a decode step could take: the
bytes it must read, at the rate this machine was just measured to read.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from bitwatt_kernels.cpu.native import NativeBackend

from bitwatt.bench.measure import Spread, describe_machine, time_calls
from bitwatt.model.config import ModelConfig
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.presets import PRESETS
from bitwatt.model.random import random_model
from bitwatt.model.transformer import Transformer

__all__ = ["bench_cpu", "make_layout"]

_DTYPE = torch.bfloat16
_CONTEXT_TOKENS = 64
_PREFILL_TOKENS = 512
_BATCHES = (1, 8)
_SEED = 0


def bench_cpu(
    *,
    preset: str = "2B4T",
    num_layers: int | None = None,
    twin_layers: int | None = None,
    repeats: int = 5,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Return the figures of one run: bandwidth, decode steps and prefill of both models.

    num_layers   fewer layers than the preset's, for a quick look; figures are of what ran
    twin_layers  layers of the 16-bit twin, 0 for none; where fewer than num_layers, its times are
                 stretched in proportion, head apart, and say so
    report       takes a line as each figure is known
    """
    config = PRESETS[preset]
    config = replace(config, num_layers=num_layers or config.num_layers)
    backend = NativeBackend(torch.device("cpu"), batch_invariant=True)
    torch.set_num_threads(backend.num_threads)
    bandwidth = backend.measure_read_bandwidth()
    report(
        f"{backend.num_threads} threads, {backend.instruction_set}: "
        f"{bandwidth / 1e9:.1f} GB/s read from memory"
    )
    result: dict[str, Any] = {
        "benchmark": "cpu",
        "preset": preset,
        "num_layers": config.num_layers,
        "machine": describe_machine(),
        "instruction_set": backend.instruction_set,
        "num_threads": backend.num_threads,
        "read_gb_per_s": bandwidth / 1e9,
    }
    model = random_model(config, weights="ternary", backend=backend, dtype=_DTYPE, seed=_SEED)
    result["ternary"] = _measure(model, config, bandwidth, repeats, "ternary", report)
    del model
    if twin_layers != 0:
        twin_config = replace(config, num_layers=twin_layers or config.num_layers)
        # The baseline runs as fast as its library can.
        fast = NativeBackend(torch.device("cpu"), batch_invariant=False)
        twin = random_model(twin_config, weights="fp16", backend=fast, dtype=_DTYPE, seed=_SEED)
        result["twin"] = _measure(twin, twin_config, bandwidth, repeats, "16-bit", report)
        result["twin"]["num_layers"] = twin_config.num_layers
    return result


def _measure(
    model: Transformer,
    config: ModelConfig,
    bandwidth: float,
    repeats: int,
    name: str,
    report: Callable[[str], None],
) -> dict[str, Any]:
    max_blocks = -(-(max(_PREFILL_TOKENS, _CONTEXT_TOKENS) + 1) // BLOCK_SIZE)
    cache = KVCache(config, max_blocks * max(_BATCHES), _DTYPE, model.backend.device)
    cache.layers.zero_()
    memory = model.memory()
    step_bytes = memory.packed_weights_bytes + memory.other_weights_bytes
    step_bytes += config.vocab_size * config.hidden_size * _DTYPE.itemsize
    roofline_s = step_bytes / bandwidth
    figures: dict[str, Any] = {"step_bytes": step_bytes, "roofline_ms": 1e3 * roofline_s}
    for batch in _BATCHES:
        spread = _time_step(model, cache, [_CONTEXT_TOKENS] * batch, [1] * batch, repeats)
        figures[f"decode_{batch}"] = {
            "ms": _milliseconds(spread),
            "tokens_per_s": batch / spread.median,
            "of_roofline": roofline_s / spread.median,
        }
        report(
            f"{name} decode, batch {batch}: roofline {1e3 * roofline_s:.1f} ms, "
            f"measured {1e3 * spread.median:.1f} ms ({100 * roofline_s / spread.median:.0f}%), "
            f"{batch / spread.median:.1f} tok/s"
        )
    spread = _time_step(model, cache, [_PREFILL_TOKENS], [_PREFILL_TOKENS], repeats)
    figures["prefill"] = {
        "num_tokens": _PREFILL_TOKENS,
        "ms": _milliseconds(spread),
        "tokens_per_s": _PREFILL_TOKENS / spread.median,
    }
    report(
        f"{name} prefill, {_PREFILL_TOKENS} tokens: {1e3 * spread.median:.0f} ms, "
        f"{_PREFILL_TOKENS / spread.median:.0f} tok/s"
    )
    return figures


def _milliseconds(spread: Spread) -> dict[str, float]:
    return {key: value if key == "n" else 1e3 * value for key, value in asdict(spread).items()}


def _time_step(
    model: Transformer,
    cache: KVCache,
    context_lens: list[int],
    query_lens: list[int],
    repeats: int,
) -> Spread:
    layout = make_layout(context_lens, query_lens)
    token_ids = torch.zeros(sum(query_lens), dtype=torch.int64)
    last_tokens = layout.query_starts[1:].long() - 1
    return time_calls(
        lambda: model.forward(token_ids, layout, cache, last_tokens), repeats=repeats, warmups=2
    )


def make_layout(context_lens: list[int], query_lens: list[int]) -> StepLayout:
    """Return a step of sequences whose blocks follow one another."""
    blocks = -(-max(context_lens) // BLOCK_SIZE)
    tables = torch.arange(len(context_lens) * blocks, dtype=torch.int32).view(-1, blocks)
    positions = [
        torch.arange(context - query, context)
        for context, query in zip(context_lens, query_lens, strict=True)
    ]
    slots = [row * blocks * BLOCK_SIZE + where for row, where in enumerate(positions)]
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    return StepLayout(
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        query_starts=starts,
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=tables,
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
    )
