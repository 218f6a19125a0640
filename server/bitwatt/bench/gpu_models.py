"""Whole models of random weights on a GPU, ternary against dense: decode, prefill, joules."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from bench.cublas import CublasBackend
from bench.layer_ops import make_layout
from bench.machine import Board
from bitwatt_kernels.backend import BLOCK_SIZE
from bitwatt_kernels.gpu.timing import Call, Timer
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from bitwatt_kernels.roofline import Gpu as GpuRates
from bitwatt_kernels.roofline import ModelSizes, step

from bitwatt.model.config import ModelConfig, Weights
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.random_weights import random_model
from bitwatt.model.transformer import Transformer

__all__ = ["bench_model", "model_sizes"]

OUT_OF_MEMORY = "out of memory"


def model_sizes(config: ModelConfig) -> ModelSizes:
    """Return what the roofline needs of a model."""
    return ModelSizes(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
    )


def _step(
    model: Transformer, num_sequences: int, context: int, new_tokens: int, dtype: torch.dtype
) -> Call:
    """Return a call that runs one step over a cache of zeros. Allocates the cache."""
    device = model.backend.device
    num_blocks = num_sequences * -(-context // BLOCK_SIZE)
    kv_cache = KVCache(model.config, num_blocks, dtype, device)
    kv_cache.layers.zero_()
    layout = make_layout(num_sequences, context, new_tokens, model.config.max_model_len, device)
    num_tokens = num_sequences * new_tokens
    token_ids = torch.arange(num_tokens, device=device) % model.config.vocab_size
    last = torch.arange(new_tokens - 1, num_tokens, new_tokens, device=device)
    return lambda: model.forward(token_ids, layout, kv_cache, last)


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def bench_model(
    name: str,
    config: ModelConfig,
    weights: Weights,
    *,
    batches: list[int],
    prompts: list[int],
    context: int,
    device: torch.device,
    dtype: torch.dtype,
    rates: GpuRates,
    timer: Timer,
    board: Board,
    energy_s: float = 1.5,
    pdl: bool = False,
    persistent_step: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield a row a batch decoded and a row a prompt prefilled; what doesn't fit says so.

    The ternary model sums in a fixed order throughout; each matmul of the dense one takes the
    fastest of cuBLAS's ways.

    energy_s         seconds of steps whose joules are counted; the counter moves every few
                     hundredths
    persistent_step  of a ternary model's batches; a row then has five kernels a layer beside it,
                     and whether the logits are theirs to the bit
    """
    backend = (
        TritonBackend(device, persistent_step=persistent_step)
        if weights == "ternary"
        else CublasBackend(device, timer)
    )
    if pdl:
        backend.gpu.configs = replace(backend.gpu.configs, pdl=True)
    model = random_model(config, weights=weights, backend=backend, dtype=dtype, seed=0)
    memory = model.memory()
    weight_bytes = memory.packed_weights_bytes + memory.embedding_bytes + memory.other_weights_bytes
    sizes = model_sizes(config)
    cases = [("decode", batch, 1) for batch in batches] + [("prefill", 1, n) for n in prompts]
    for phase, num_sequences, new_tokens in cases:
        row: dict[str, Any] = {
            "model": name,
            "weights": weights,
            "dtype": str(dtype).removeprefix("torch."),
            "phase": phase,
            "num_sequences": num_sequences,
            "new_tokens": new_tokens,
            "context_tokens": context if phase == "decode" else new_tokens,
            "pdl": pdl,
            "persistent_step": persistent_step,
            "weight_bytes": weight_bytes,
        }
        cost = step(
            sizes,
            weights,
            num_sequences=num_sequences,
            context_tokens=row["context_tokens"],
            new_tokens=new_tokens,
            is_persistent=persistent_step,
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            call = _step(model, num_sequences, row["context_tokens"], new_tokens, dtype)
            if persistent_step:
                backend.persistent_step = False
                expected = cast(torch.Tensor, call())
                row["five_kernels"] = timer.measure([call], budget_s=0.5).to_dict()
                backend.persistent_step = True
                row["equals_five_kernels"] = torch.equal(cast(torch.Tensor, call()), expected)
            timing = timer.measure([call], budget_s=0.5)
            row["step"] = timing.to_dict()
            row["tokens_per_s"] = num_sequences * new_tokens / timing.median_s
            row["roofline_s"] = cost.floor_s(replace(rates, kernel_s=0.0))
            row["roofline_share"] = row["roofline_s"] / timing.median_s
            row["roofline_with_launches_s"] = cost.floor_s(rates)
            if phase == "prefill":
                row["launched"] = timer.measure_launched(call).to_dict()
            with board.watch() as state:
                row["joules_per_token"] = _joules_per_token(
                    call, num_sequences * new_tokens, timer, board, energy_s
                )
            row["board"] = state
            row["peak_bytes"] = _peak_bytes(device)
            if isinstance(backend, CublasBackend):
                row["cublas"] = {
                    f"{n}x{k}": way
                    for (tokens, n, k), way in backend.ways.items()
                    if tokens == num_sequences * new_tokens
                }
            del call
        except torch.OutOfMemoryError:
            row["skipped"] = OUT_OF_MEMORY
        yield row


def _joules_per_token(
    call: Call, num_tokens: int, timer: Timer, board: Board, seconds: float
) -> float | None:
    before = board.joules()
    count = timer.repeat(call, seconds=seconds)
    after = board.joules()
    if before is None or after is None:
        return None
    return (after - before) / (count * num_tokens)
