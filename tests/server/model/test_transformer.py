"""The transformer: batching, chunking and paging change nothing."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
import torch
from bitwatt.model.config import ModelConfig, Weights
from bitwatt.model.presets import PRESETS
from bitwatt.model.random_weights import random_model
from bitwatt.model.transformer import Transformer
from bitwatt_kernels.backend import BLOCK_SIZE
from bitwatt_kernels.registry import choose_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.factories import make_model_config
from tests.server.model.steps import CPU_BACKENDS, Context, forward, make_kv_cache, step_layout

NUM_BLOCKS = 24
MAX_LEN = 6 * BLOCK_SIZE


def tiny_config(*, is_llama: bool = False) -> ModelConfig:
    return make_model_config(is_llama=is_llama, vocab_size=131, max_model_len=MAX_LEN)


@cache
def make_model(
    backend: str, weights: Weights, dtype: torch.dtype, *, batch_invariant: bool = True
) -> Transformer:
    chosen = choose_backend(torch.device("cpu"), backend, batch_invariant=batch_invariant).backend
    return random_model(tiny_config(), weights=weights, backend=chosen, dtype=dtype, seed=3)


def tokens_of(seed: int, num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, 131, (num_tokens,), generator=generator).tolist()
    return tokens


def logits_in_chunks(model: Transformer, tokens: list[int], cuts: Sequence[int]) -> Tensor:
    """Return the logits of all tokens, brought in chunks that end at each cut and at the end."""
    kv_cache = make_kv_cache(model, NUM_BLOCKS)
    context = Context([5, 11, 2, 19, 7, 0])
    bounds = [0, *sorted(set(cuts)), len(tokens)]
    chunks = [tokens[a:b] for a, b in pairwise(bounds) if a < b]
    return torch.cat([forward(model, kv_cache, [(context, chunk)]) for chunk in chunks])


def assert_same(actual: Tensor, expected: Tensor, *, batch_invariant: bool) -> None:
    if batch_invariant:
        assert torch.equal(actual, expected)
    else:  # bfloat16 logits of spread 1, summed in another order
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("cuts", [[1], [7, 8, 31], [64]], ids=str)
def test_a_model_of_ternary_groups_head_and_all_is_the_same_in_chunks(
    backend: str, cuts: list[int]
) -> None:
    model = random_model(
        tiny_config(),
        weights="ternary",
        backend=choose_backend(torch.device("cpu"), backend).backend,
        dtype=torch.bfloat16,
        seed=3,
        group=64,
        has_ternary_head=True,
    )
    tokens = tokens_of(0, 70)
    assert torch.equal(logits_in_chunks(model, tokens, cuts), logits_in_chunks(model, tokens, []))


BACKENDS = pytest.mark.parametrize(
    ("backend", "batch_invariant"),
    [
        (name, invariant)
        for name in CPU_BACKENDS
        for invariant in ((True,) if name == "reference" else (True, False))  # that is always so
    ],
)
WEIGHTS = pytest.mark.parametrize("weights", ["ternary", "dense"])


@BACKENDS
@WEIGHTS
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 69), max_size=6))
def test_prefill_in_chunks_equals_prefill_in_one(
    backend: str, batch_invariant: bool, weights: Weights, cuts: list[int]
) -> None:
    model = make_model(backend, weights, torch.bfloat16, batch_invariant=batch_invariant)
    tokens = tokens_of(0, 70)
    whole = logits_in_chunks(model, tokens, [])
    assert_same(
        logits_in_chunks(model, tokens, cuts),
        whole,
        batch_invariant=(batch_invariant and weights == "dense") or batch_invariant,
    )


@BACKENDS
@WEIGHTS
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_sequence_in_a_batch_equals_the_sequence_alone(
    backend: str, batch_invariant: bool, weights: Weights, lengths: list[int], seed: int
) -> None:
    """Prompts of any lengths share a step, then each brings a token, in shuffled blocks."""
    model = make_model(backend, weights, torch.bfloat16, batch_invariant=batch_invariant)
    prompts = [tokens_of(seed + i, n + 1) for i, n in enumerate(lengths)]
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    contexts = [Context(order[3 * i : 3 * i + 3]) for i in range(len(prompts))]
    kv_cache = make_kv_cache(model, NUM_BLOCKS)
    prefill = forward(
        model, kv_cache, [(c, p[:-1]) for c, p in zip(contexts, prompts, strict=True)]
    )
    decode = forward(model, kv_cache, [(c, p[-1:]) for c, p in zip(contexts, prompts, strict=True)])
    for i, chunk in enumerate(prefill.split(lengths)):
        alone = logits_in_chunks(model, prompts[i], [lengths[i]])
        together = torch.cat([chunk, decode[i : i + 1]])
        assert_same(together, alone, batch_invariant=batch_invariant)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@WEIGHTS
def test_backends_agree_on_a_whole_model(backend: str, weights: Weights) -> None:
    tokens = tokens_of(1, 50)
    expected = logits_in_chunks(make_model("reference", weights, torch.float32), tokens, [])
    actual = logits_in_chunks(make_model(backend, weights, torch.float32), tokens, [])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


def test_only_the_chosen_tokens_have_logits() -> None:
    model = make_model("torch", "ternary", torch.float32)
    everything = logits_in_chunks(model, tokens_of(2, 9), [])
    context, kv_cache = Context([1]), make_kv_cache(model, 2)
    layout = step_layout([0], [9], [context.blocks])
    chosen = torch.tensor([8, 0, 3])
    logits = model.forward(torch.tensor(tokens_of(2, 9)), layout, kv_cache, chosen)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, everything[chosen])


def test_a_step_may_ask_for_no_logits() -> None:
    model = make_model("torch", "ternary", torch.bfloat16)
    layout = step_layout([0], [5], [[0]])
    none = torch.empty(0, dtype=torch.int64)
    logits = model.forward(torch.arange(5), layout, make_kv_cache(model, 1), none)
    assert logits.shape == (0, 131)


def test_random_models_of_one_seed_are_one_model_in_both_forms() -> None:
    tokens = tokens_of(4, 20)
    ternary = logits_in_chunks(make_model("torch", "ternary", torch.float32), tokens, [])
    dense = logits_in_chunks(make_model("torch", "dense", torch.float32), tokens, [])
    assert (ternary - dense).abs().max() < 0.2 * dense.std()  # int8 activations apart


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("2B4T", 4825), ("700M", 1457), ("3B", 6648), ("7B", 13214), ("13B", 25703), ("70B", 137426)],
)
def test_presets_have_the_published_sizes(name: str, megabytes: int) -> None:
    """What a token reads in 16 bits: linears and head."""
    config = PRESETS[name]
    heads = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    assert round(2 * (config.num_layers * layer + head) / 1e6) == megabytes
