"""Every operation of one ternary layer, and the head, on its own: where a step's time goes."""

from collections.abc import Iterator
from typing import Any

import torch
from bitwatt.model.config import ModelConfig
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.rope import rope_table
from bitwatt_kernels.gpu.timing import Call, Timer
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from bitwatt_kernels.packing import TernaryWeight

from bench.end_to_end import make_layout, model_sizes
from bench.matmuls import random_codes

__all__ = ["bench_layer_ops"]


def bench_layer_ops(
    name: str,
    config: ModelConfig,
    *,
    num_tokens: list[int],
    context: int,
    device: torch.device,
    timer: Timer,
) -> Iterator[dict[str, Any]]:
    """Yield a row an operation and number of tokens, each token a sequence that decodes.

    Timed back to back in one graph, so that weights are warm in L2: what is left is what an
    operation costs beyond its bytes.
    """
    for tokens in num_tokens:
        for op, call in _calls(config, tokens, context, device).items():
            timing = timer.measure([call] * 20, budget_s=0.05)
            yield {"model": name, "op": op, "num_tokens": tokens, **timing.to_dict()}


def _calls(
    config: ModelConfig, num_tokens: int, context: int, device: torch.device
) -> dict[str, Call]:
    backend = TritonBackend(device)
    dtype, eps = torch.bfloat16, config.rms_norm_eps
    hidden, inner = config.hidden_size, config.intermediate_size

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    layout = make_layout(num_tokens, context, 1, config.max_model_len, device)
    cache = KVCache(config, int(layout.block_tables.max()) + 1, dtype, device).by_layer[0].zero_()
    rope = rope_table(config, device)
    features = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    h, qkv, gate_up = (randn(num_tokens, size) for size in (hidden, features, 2 * inner))
    queries = randn(num_tokens, config.num_heads, config.head_dim)
    norm, sub_norm = torch.ones(hidden, device=device), torch.ones(inner, device=device)
    calls: dict[str, Call] = {
        "rms_norm_quantize": lambda: backend.rms_norm_quantize(h, norm, eps),
        "rope_and_cache": lambda: backend.rope_and_cache(
            qkv, rope, cache, layout, config.num_heads
        ),
        "attention": lambda: backend.attention(queries, cache, layout, config.head_dim**-0.5),
        "gated_activation_quantize": lambda: backend.gated_activation_quantize(
            gate_up, config.activation, sub_norm, eps
        ),
    }
    for layer, (n, k) in model_sizes(config).linear_shapes.items():
        x = backend.quantize(randn(num_tokens, k))
        weight = TernaryWeight(
            random_codes((n, k // 4), device), torch.full((n,), 0.02, device=device)
        )
        calls[f"ternary_linear {layer}"] = lambda x=x, w=weight: backend.ternary_linear(
            x, w, None, dtype
        )
    embedding = randn(config.vocab_size, hidden)
    head16, head8 = backend.prepare_head(embedding), backend.prepare_head(embedding, bits=8)
    calls["head 16 bits"] = lambda: backend.head(h, head16)
    calls["head 8 bits"] = lambda: backend.head(h, head8)
    return calls
