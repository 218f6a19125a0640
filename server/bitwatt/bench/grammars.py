"""What token masks cost: the embedded model's throughput with and without a grammar."""

import json
import time
from dataclasses import asdict
from typing import Any

from bitwatt import LLM, SamplingParams, StructuredOutputsParams, builtin
from bitwatt.bench.measure import spread_of

__all__ = ["bench_grammars"]

_PROMPT_TOKENS = 32
_MAX_TOKENS = 64
_REPEATS = 25
_SCHEMA = {
    "type": "array",
    "minItems": 1000,  # none ends before its 64 tokens
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "lines": {"type": "integer"},
            "kind": {"enum": ["function", "class", "module"]},
        },
        "required": ["name", "lines", "kind"],
        "additionalProperties": False,
    },
}


def bench_grammars(batch: int = 32) -> dict[str, Any]:
    """Return tokens/s of so many requests at once, free and by a JSON schema, in turn.

    Both have the same prompts, settings and numbers of tokens, and go first by turns.

    ratio  of each pair of neighbours, constrained to free
    """
    with LLM(builtin.TERNARY, weights="ternary", prefix_caching=False) as llm:
        prompts = [[5 + i + j for j in range(_PROMPT_TOKENS)] for i in range(batch)]
        free = SamplingParams(max_tokens=_MAX_TOKENS, seed=0, ignore_eos=True)
        asked = StructuredOutputsParams(json=json.dumps(_SCHEMA))
        constrained = SamplingParams(
            max_tokens=_MAX_TOKENS, seed=0, ignore_eos=True, structured_outputs=asked
        )

        def tokens_per_s(sampling: SamplingParams) -> float:
            started = time.perf_counter()
            answers = llm.generate(prompts, sampling)
            seconds = time.perf_counter() - started
            assert all(len(answer.token_ids) == _MAX_TOKENS for answer in answers)
            return batch * _MAX_TOKENS / seconds

        kinds = {"free": free, "constrained": constrained}
        for sampling in kinds.values():
            tokens_per_s(sampling)  # a warm-up; the grammar is compiled then
        speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(_REPEATS):
            for kind in sorted(kinds, reverse=bool(number % 2)):
                speeds[kind].append(tokens_per_s(kinds[kind]))
        pairs = zip(speeds["free"], speeds["constrained"], strict=True)
        return {
            "backend": llm.info.backend,
            "batch": batch,
            "tokens_per_s_free": asdict(spread_of(speeds["free"])),
            "tokens_per_s_constrained": asdict(spread_of(speeds["constrained"])),
            "ratio": asdict(spread_of([theirs / ours for ours, theirs in pairs])),
        }
