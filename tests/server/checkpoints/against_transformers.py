"""Our models' logits and greedy tokens beside those of transformers."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from bitwatt.checkpoints.registry import load_model
from bitwatt.model.config import Weights
from bitwatt.model.transformer import Transformer
from bitwatt_kernels.registry import choose_backend
from torch import Tensor

from tests.extent import TEST_ALL
from tests.server.model.steps import Context, forward, greedy_steps, make_kv_cache

PROMPT = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(5)).tolist()
NUM_STEPS = 64 if TEST_ALL else 32  # two blocks of the cache

# A model in float32 differs from another in the order of its sums: 1e-5 of logits of spread 1.
DENSE_TOLERANCE = 1e-4
# In a ternary one that difference may also move an activation across a rounding boundary. One
# step of one int8 code, seen to move a logit by 0.03, then reaches the token's other logits and
# the tokens after it. A token that meets none agrees as in a dense model.
FLIPPED_TOLERANCE = 0.1


def load(path: Path, weights: Weights, backend: str = "reference", **options: Any) -> Transformer:
    # Another thread would look out for work between the operations of models as small as these.
    chosen = choose_backend(torch.device("cpu"), backend, num_threads=1).backend
    return load_model(path, weights=weights, backend=chosen, dtype=torch.float32, **options)


def with_inputs_quantized(
    theirs: Any, group: Callable[[int], int], of: tuple[str, ...] = ("_proj",)
) -> Any:
    """Return a copy of the model whose linears read int8, one scale to each group(in_features).

    of  ends of their names
    """

    def quantize(linear: torch.nn.Linear, inputs: tuple[Tensor]) -> tuple[Tensor]:
        grouped = inputs[0].unflatten(-1, (-1, group(linear.in_features)))
        scales = 127 / grouped.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        return ((grouped * scales).round().div(scales).flatten(-2),)

    copied = deepcopy(theirs)
    for name, module in copied.named_modules():
        if name.endswith(of):
            module.register_forward_pre_hook(quantize)
    return copied


def logits_of(model: Transformer) -> Tensor:
    return forward(model, make_kv_cache(model, 4), [(Context([2, 0, 1]), PROMPT)])


@torch.no_grad()
def expected_logits(model: Any, tokens: list[int] = PROMPT) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def assert_same_greedy_tokens(ours: Transformer, theirs: Any, tolerance: float) -> None:
    """Decode greedily, then ask theirs about each step: its choice is the same, or a near tie.

    Which of two tokens within twice the tolerance wins depends on the processor, by which torch
    orders its sums. The reference, whose steps take the longest and compute as its prompts do
    (tests/server/model/test_transformer.py), decodes under BITWATT_TEST_ALL alone.
    """
    if ours.backend.name == "reference" and not TEST_ALL:
        return
    tokens, logits = greedy_steps(ours, PROMPT, NUM_STEPS)
    expected = expected_logits(theirs, PROMPT + tokens)[len(PROMPT) - 1 : -1]
    assert (logits - expected).abs().max() < tolerance, ours.backend.name
    best, chosen = expected.max(dim=1), expected[torch.arange(NUM_STEPS), tokens]
    margins = (best.values - chosen)[best.indices != torch.tensor(tokens)]
    assert len(margins) <= NUM_STEPS // 16, margins
    assert (margins < 2 * tolerance).all(), margins


def assert_same_ternary_model(ours: Transformer, theirs: Any) -> None:
    difference = (logits_of(ours) - expected_logits(theirs)).abs()
    by_token = difference.amax(dim=1)
    assert by_token.min() < DENSE_TOLERANCE, ours.backend.name
    assert by_token.max() < FLIPPED_TOLERANCE, ours.backend.name
    assert_same_greedy_tokens(ours, theirs, FLIPPED_TOLERANCE)


def assert_near_16_bit_model(ours: Transformer, theirs: Any) -> None:
    """A ternary model's logits beside those of the same weights with no activation quantized.

    A group of 128 normal numbers has its largest at 2.7 deviations, so that a code's rounding is
    off by 2.7 / 127 / √12 = 0.6% of one. The 14 linears of two layers add such errors, and a head
    of ternary weights one more, which are independent: 2.4% of the logits' spread, and nearly twice
    that is room for what isn't normal.
    """
    expected = expected_logits(theirs)
    error = (logits_of(ours) - expected).square().mean().sqrt() / expected.std()
    assert error < 0.046


@torch.no_grad()
def assert_same_model_by_groups(
    ours: Transformer,
    theirs: Any,
    group: Callable[[int], int],
    of: tuple[str, ...] = ("_proj",),
) -> None:
    """Compare with theirs reading int8, one scale to each group(in_features); of as above.

    A token alone in its context meets a rounding boundary of its own, or none: most meet none. In
    a prompt one that does reaches those that follow.
    """
    theirs = with_inputs_quantized(theirs, group, of)
    cache = make_kv_cache(ours, len(PROMPT))
    alone = forward(ours, cache, [(Context([i]), [token]) for i, token in enumerate(PROMPT)])
    difference = (alone - theirs(torch.tensor(PROMPT)[:, None]).logits[:, 0]).abs().amax(dim=1)
    assert (difference < DENSE_TOLERANCE).float().mean() > 0.25
    assert difference.max() < FLIPPED_TOLERANCE
    assert (logits_of(ours) - expected_logits(theirs)).abs().max() < FLIPPED_TOLERANCE


def assert_same_model(ours: Transformer, theirs: Any) -> None:
    torch.testing.assert_close(
        logits_of(ours), expected_logits(theirs), rtol=0, atol=DENSE_TOLERANCE
    )
    assert_same_greedy_tokens(ours, theirs, DENSE_TOLERANCE)
