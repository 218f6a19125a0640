"""Every operation of one ternary layer, and the head, on its own: where a step's time goes."""

from collections.abc import Iterator
from typing import Any

import torch
from bitwatt_kernels.backend import BLOCK_SIZE, Activation, StepLayout
from bitwatt_kernels.gpu.attention import rotated_attention
from bitwatt_kernels.gpu.linear import ternary_linear
from bitwatt_kernels.gpu.normed_linear import MAX_TOKENS, normed_linear
from bitwatt_kernels.gpu.row_queue import MAX_QUEUED_TOKENS, RawRows
from bitwatt_kernels.gpu.timing import Call, Timer
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from bitwatt_kernels.packing import TernaryWeight
from bitwatt_kernels.reference.attention import rope_table
from bitwatt_kernels.roofline import ModelSizes

from bench.matmuls import random_codes

__all__ = ["bench_layer_ops", "make_layout"]

EPS = 1e-5


def make_layout(
    num_sequences: int, context: int, new_tokens: int, max_context: int, device: torch.device
) -> StepLayout:
    """Return a step in which every sequence brings its last new_tokens of context."""
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.arange(num_sequences * blocks, dtype=torch.int32, device=device)
    tables = tables.view(num_sequences, blocks)
    positions = torch.arange(context - new_tokens, context, device=device)
    slots = tables[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    return StepLayout(
        positions=positions.repeat(num_sequences),
        slots=slots.flatten(),
        query_starts=torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * new_tokens,
        context_lens=torch.full((num_sequences,), context, dtype=torch.int32, device=device),
        block_tables=tables,
        max_query_len=new_tokens,
        max_context_len=max_context if new_tokens == 1 else context,
    )


def bench_layer_ops(
    name: str,
    sizes: ModelSizes,
    activation: Activation,
    *,
    num_tokens: list[int],
    context: int,
    max_context: int,
    device: torch.device,
    timer: Timer,
) -> Iterator[dict[str, Any]]:
    """Yield a row an operation and number of tokens, each token a sequence that decodes.

    Timed back to back in one graph, so that weights are warm in L2: what is left is what an
    operation costs beyond its bytes.
    context, max_context  tokens a sequence has, and those it may have, as a captured step is told
    """
    for tokens in num_tokens:
        for op, call in _calls(sizes, activation, tokens, context, max_context, device).items():
            timing = timer.measure([call] * 20, budget_s=0.05)
            yield {"model": name, "op": op, "num_tokens": tokens, **timing.to_dict()}


def _calls(
    sizes: ModelSizes,
    activation: Activation,
    num_tokens: int,
    context: int,
    max_context: int,
    device: torch.device,
) -> dict[str, Call]:
    backend = TritonBackend(device)
    dtype = torch.bfloat16
    hidden, inner = sizes.hidden_size, sizes.intermediate_size

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    layout = make_layout(num_tokens, context, 1, max_context, device)
    cache_shape = (2, layout.block_tables.numel(), sizes.num_kv_heads, BLOCK_SIZE, sizes.head_dim)
    cache = torch.zeros(cache_shape, dtype=dtype, device=device)
    rope = rope_table(max_context, sizes.head_dim, 1e4).to(device)
    features = (sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim
    h, qkv, gate_up = (randn(num_tokens, size) for size in (hidden, features, 2 * inner))
    queries = randn(num_tokens, sizes.num_heads, sizes.head_dim)
    norm, sub_norm = torch.ones(hidden, device=device), torch.ones(inner, device=device)
    calls: dict[str, Call] = {
        "rms_norm_quantize": lambda: backend.rms_norm_quantize(h, norm, EPS),
        "rope_and_cache": lambda: backend.rope_and_cache(qkv, rope, cache, layout, sizes.num_heads),
        "attention": lambda: backend.attention(queries, cache, layout, sizes.head_dim**-0.5),
        "gated_activation_quantize": lambda: backend.gated_activation_quantize(
            gate_up, activation, sub_norm, EPS
        ),
    }
    for layer, (n, k) in sizes.linear_shapes.items():
        x = backend.quantize(randn(num_tokens, k))
        weight = TernaryWeight(
            random_codes((n, k // 4), device), torch.full((n,), 0.02, device=device)
        )
        calls[f"ternary_linear {layer}"] = lambda x=x, w=weight: backend.ternary_linear(
            x, w, None, dtype
        )
        if num_tokens <= MAX_TOKENS:
            activation_of = activation if layer == "gate_up" else None
            rows, ones = randn(num_tokens, k), torch.ones(k, device=device)
            calls[f"normed_linear {layer}"] = lambda x=rows, w=weight, g=ones, a=activation_of: (
                normed_linear(x, g, EPS, w, None, dtype, backend.gpu, activation=a)
            )
        elif num_tokens <= MAX_QUEUED_TOKENS or layer in ("qkv", "gate_up"):
            activation_of = activation if layer == "down" else None
            rows = randn(num_tokens, 2 * k if activation_of else k)
            ones = torch.ones(k, device=device)
            raw = RawRows(rows, ones, EPS, activation_of)
            calls[f"ternary_linear of raw rows {layer}"] = lambda x=raw, w=weight: ternary_linear(
                x, w, None, dtype, backend.gpu
            )
    calls["rotated_attention"] = lambda: rotated_attention(
        qkv, rope, cache, layout, sizes.num_heads, sizes.head_dim**-0.5, backend.gpu
    )
    embedding = randn(sizes.vocab_size, hidden)
    head16, head8 = backend.prepare_head(embedding), backend.prepare_head(embedding, bits=8)
    calls["head 16 bits"] = lambda: backend.head(h, head16)
    calls["head 8 bits"] = lambda: backend.head(h, head8)
    return calls
