"""The 2B4T shape on this machine's CPU: read bandwidth, then packed ternary beside its 16-bit twin.

Every figure is measured in one run. The roofline is the least time a decode step could take: the
bytes it must read, at the rate this machine was just measured to read.
"""

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from bitwatt_kernels.backend import BLOCK_SIZE, StepLayout
from bitwatt_kernels.cpu.native import NativeBackend

from bitwatt.bench.measure import Spread, spread_of, time_calls
from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import Submit
from bitwatt.model.config import ModelConfig
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.presets import PRESETS
from bitwatt.model.random import random_model
from bitwatt.model.runner import ModelRunner
from bitwatt.model.transformer import Transformer
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import SamplingParams
from bitwatt.scheduling.scheduler import Scheduler

__all__ = ["bench_cpu", "make_layout"]

_DTYPE = torch.bfloat16
_CONTEXT_TOKENS = 128
_PREFILL_TOKENS = 512
_BATCHES = (1, 8)
_STEPS = 6  # timed together
_MAX_MODEL_LEN = 640
_SEED = 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def bench_cpu(
    *,
    preset: str = "2B4T",
    num_layers: int | None = None,
    repeats: int = 5,
    report: Callable[[str], None] = _say,
) -> dict[str, Any]:
    """Return the figures of one run: bandwidth, then each model's decode, prefill and memory.

    num_layers   fewer layers than the preset's, for a quick look; figures are of what ran
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
    # The baseline runs as fast as its library can.
    fast = NativeBackend(torch.device("cpu"), batch_invariant=False)
    figures: dict[str, dict[str, Any]] = {}
    for name, weights, its_backend, head_bits in (
        ("ternary", "ternary", backend, 16),
        ("ternary, int8 head", "ternary", backend, 8),
        ("16-bit", "fp16", fast, 16),
    ):
        gc.collect()
        started = time.perf_counter()
        model = random_model(
            config,
            weights="ternary" if weights == "ternary" else "fp16",
            backend=its_backend,
            dtype=_DTYPE,
            seed=_SEED,
            head_bits=head_bits,
        )
        made_s = time.perf_counter() - started
        figures[name] = _measure(model, config, head_bits, bandwidth, repeats, name, report)
        figures[name] |= {
            "made_s": made_s,
            "weights_bytes": _weights_bytes(model),
        }
        del model
    twin = figures["16-bit"]
    ratios = {
        name: {
            "decode_1": one["decode_1"]["tokens_per_s"] / twin["decode_1"]["tokens_per_s"],
            "decode_8": one["decode_8"]["tokens_per_s"] / twin["decode_8"]["tokens_per_s"],
            "prefill": one["prefill"]["tokens_per_s"] / twin["prefill"]["tokens_per_s"],
            "weights_bytes": one["weights_bytes"] / twin["weights_bytes"],
        }
        for name, one in figures.items()
        if one is not twin
    }
    return {
        "preset": preset,
        "num_layers": config.num_layers,
        "instruction_set": backend.instruction_set,
        "num_threads": backend.num_threads,
        "read_gb_per_s": bandwidth / 1e9,
        "models": figures,
        "to_16_bit": ratios,
    }


def _weights_bytes(model: Transformer) -> int:
    memory = model.memory()
    return memory.packed_weights_bytes + memory.embedding_bytes + memory.other_weights_bytes


def _measure(
    model: Transformer,
    config: ModelConfig,
    head_bits: int,
    bandwidth: float,
    repeats: int,
    name: str,
    report: Callable[[str], None],
) -> dict[str, Any]:
    memory = model.memory()
    step_bytes = memory.packed_weights_bytes + memory.other_weights_bytes
    step_bytes += config.vocab_size * config.hidden_size * head_bits // 8
    roofline_s = step_bytes / bandwidth
    figures: dict[str, Any] = {"step_bytes": step_bytes, "roofline_ms": 1e3 * roofline_s}
    for batch in _BATCHES:
        spread = _time_decode(model, config, batch, repeats)
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
    spread = _time_prefill(model, config, repeats)
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


def _time_decode(model: Transformer, config: ModelConfig, batch: int, repeats: int) -> Spread:
    """Return the seconds of an engine's decode step with some 128 tokens of context each."""
    core = _make_core(model, config, batch)
    num_steps = (repeats + 1) * _STEPS
    for i in range(batch):
        prompt = [(31 * i + j) % config.vocab_size for j in range(_CONTEXT_TOKENS - num_steps // 2)]
        sampling = SamplingParams(max_tokens=num_steps + 8, temperature=0.0)
        core.submit(Submit(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
    num_first_tokens = 0
    while num_first_tokens < batch:
        num_first_tokens += len(core.step())

    def steps() -> None:
        for _ in range(_STEPS):
            core.step()

    spread = time_calls(steps, repeats=repeats)
    core.abort([str(i) for i in range(batch)])
    core.close()
    return Spread(spread.median / _STEPS, spread.min / _STEPS, spread.max / _STEPS, spread.n)


def _time_prefill(model: Transformer, config: ModelConfig, repeats: int) -> Spread:
    """Return the seconds an engine takes to the first token of a prompt of 512."""
    core = _make_core(model, config, 1)
    seconds = []
    for repeat in range(repeats + 1):
        prompt = [(repeat + j) % config.vocab_size for j in range(_PREFILL_TOKENS)]
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        core.submit(Submit(request_id=str(repeat), prompt_token_ids=prompt, sampling=sampling))
        started = time.perf_counter()
        while core.has_work:
            core.step()
        seconds.append(time.perf_counter() - started)
    core.close()
    return spread_of(seconds[1:])


def _make_core(model: Transformer, config: ModelConfig, max_num_seqs: int) -> EngineCore:
    num_blocks = max_num_seqs * _MAX_MODEL_LEN // BLOCK_SIZE
    kv_cache = KVCache(config, num_blocks, _DTYPE, model.backend.device)
    kv_cache.layers.zero_()
    blocks = BlockAllocator(num_blocks, BLOCK_SIZE, prefix_caching=False)
    limits = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": _PREFILL_TOKENS,
        "max_model_len": _MAX_MODEL_LEN,
    }
    return EngineCore(Scheduler(blocks, **limits), ModelRunner(model, kv_cache, **limits))


def _milliseconds(spread: Spread) -> dict[str, float]:
    return {key: value if key == "n" else 1e3 * value for key, value in asdict(spread).items()}


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
