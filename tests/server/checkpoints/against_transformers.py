"""Our models' logits and greedy tokens beside those of transformers."""

from pathlib import Path
from typing import Any

import torch
from bitwatt.checkpoints.registry import load_model
from bitwatt.model.config import Weights
from bitwatt.model.transformer import Transformer
from bitwatt_kernels.registry import choose_backend
from torch import Tensor

from tests.server.model.steps import Context, forward, greedy_tokens, make_kv_cache

PROMPT = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(5)).tolist()
NUM_STEPS = 64

# A model in float32 differs from another in the order of its sums: 1e-5 of logits of spread 1.
DENSE_TOLERANCE = 1e-4
# In a ternary one that difference may also move an activation across a rounding boundary. One
# step of one int8 code, seen to move a logit by 0.03, then reaches the token's other logits and
# the tokens after it. A token that meets none agrees as in a dense model.
FLIPPED_TOLERANCE = 0.1


def load(path: Path, weights: Weights, backend: str = "reference", **options: Any) -> Transformer:
    chosen = choose_backend(torch.device("cpu"), backend).backend
    return load_model(path, weights=weights, backend=chosen, dtype=torch.float32, **options)


def logits_of(model: Transformer) -> Tensor:
    return forward(model, make_kv_cache(model, 4), [(Context([2, 0, 1]), PROMPT)])


@torch.no_grad()
def expected_logits(model: Any) -> Tensor:
    logits: Tensor = model(torch.tensor([PROMPT])).logits[0]
    return logits


@torch.no_grad()
def expected_greedy_tokens(model: Any) -> list[int]:
    """Every step from the first token on: the name of the cache's argument is their version's."""
    tokens = torch.tensor([PROMPT])
    for _ in range(NUM_STEPS):
        logits = model(tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    generated: list[int] = tokens[0, len(PROMPT) :].tolist()
    return generated


def assert_same_ternary_model(ours: Transformer, theirs: Any) -> None:
    difference = (logits_of(ours) - expected_logits(theirs)).abs()
    by_token = difference.amax(dim=1)
    assert by_token.min() < DENSE_TOLERANCE
    assert by_token.max() < FLIPPED_TOLERANCE
    assert greedy_tokens(ours, PROMPT, NUM_STEPS) == expected_greedy_tokens(theirs)


def assert_same_model(ours: Transformer, theirs: Any) -> None:
    torch.testing.assert_close(
        logits_of(ours), expected_logits(theirs), rtol=0, atol=DENSE_TOLERANCE
    )
    assert greedy_tokens(ours, PROMPT, NUM_STEPS) == expected_greedy_tokens(theirs)
