"""What batching brings, and what exactness costs, on the embedded model."""

import time
from dataclasses import asdict
from typing import Any

from bitwatt import LLM, SamplingParams, builtin
from bitwatt.bench.measure import Spread, spread_of

__all__ = ["bench_batching", "bench_exactness", "decode_rate"]

_PROMPT_TOKENS = 32
_MAX_TOKENS = 64
_REPEATS = 5


def decode_rate(llm: LLM, batch: int, repeats: int = _REPEATS) -> Spread:
    """Return tokens/s of so many requests at once, each of 32 tokens of prompt and 64 of answer."""
    sampling = SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0, min_tokens=_MAX_TOKENS)
    prompts = [[5 + i + j for j in range(_PROMPT_TOKENS)] for i in range(batch)]
    rates = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        generations = llm.generate(prompts, sampling)
        seconds = time.perf_counter() - started
        if repeat:  # the first is a warm-up
            rates.append(sum(len(g.token_ids) for g in generations) / seconds)
    return spread_of(rates)


def bench_batching(batch: int = 32) -> dict[str, Any]:
    """Return the tokens/s of one request at a time, of a batch, and their ratio."""
    with LLM(builtin.TERNARY, weights="ternary", prefix_caching=False) as llm:
        alone = decode_rate(llm, 1)
        together = decode_rate(llm, batch)
        return {
            "backend": llm.info.backend,
            "batch": batch,
            "tokens_per_s_alone": asdict(alone),
            "tokens_per_s_together": asdict(together),
            "ratio": together.median / alone.median,
        }


def bench_exactness(batch: int = 32) -> dict[str, Any]:
    """Return the 16-bit backend's tokens/s as fast as its library can, and batch-invariant."""
    rates: dict[str, Spread] = {}
    for name, is_exact in (("fastest", False), ("batch_invariant", True)):
        with LLM(
            builtin.FP16, weights="dense", batch_invariant=is_exact, prefix_caching=False
        ) as llm:
            rates[name] = decode_rate(llm, batch)
    return {
        "batch": batch,
        "tokens_per_s": {name: asdict(rate) for name, rate in rates.items()},
        "ratio": rates["batch_invariant"].median / rates["fastest"].median,
    }
