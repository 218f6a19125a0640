"""A whole tiny model on TritonBackend gives the reference's logits, prefilled and decoded."""

import pytest
import torch
from bitwatt.model.config import ModelConfig, Weights
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.random_weights import random_model
from bitwatt.model.transformer import Transformer
from bitwatt_kernels.backend import BLOCK_SIZE, Backend, StepLayout
from bitwatt_kernels.gpu.interpreter import INTERPRETED
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from bitwatt_kernels.reference.reference_backend import ReferenceBackend

CONFIG = ModelConfig(
    architecture="BitNetForCausalLM",
    vocab_size=96,
    hidden_size=128,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_model_len=64,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    activation="relu2",
    has_sub_norms=True,
    is_tied=True,
)
PROMPT = [5, 17, 2, 80, 33, 8, 90, 41, 17, 3, 60, 12, 55, 7, 28, 1, 19, 66, 4]


def run(model: Transformer, kv_cache: KVCache, first: int, tokens: list[int]) -> torch.Tensor:
    """Return the last token's logits of a step that brings tokens from position first on."""
    device = model.backend.device
    positions = torch.arange(first, first + len(tokens))
    blocks = torch.tensor([3, 1, 2], dtype=torch.int32)
    slots = blocks[positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    layout = StepLayout(
        positions=positions.to(device),
        slots=slots.to(device),
        query_starts=torch.tensor([0, len(tokens)], dtype=torch.int32, device=device),
        context_lens=torch.tensor([first + len(tokens)], dtype=torch.int32, device=device),
        block_tables=blocks[None].to(device),
        max_query_len=len(tokens),
        max_context_len=first + len(tokens),
    )
    last = torch.tensor([len(tokens) - 1], device=device)
    return model.forward(torch.tensor(tokens, device=device), layout, kv_cache, last)


def logits(backend: Backend, weights: Weights) -> torch.Tensor:
    """Return the logits after the prompt and after each of two more tokens, [3, vocab_size]."""
    model = random_model(CONFIG, weights=weights, backend=backend, dtype=torch.float32, seed=1)
    kv_cache = KVCache(CONFIG, 4, torch.float32, backend.device)
    steps = [run(model, kv_cache, 0, PROMPT)]
    steps += [run(model, kv_cache, len(PROMPT) + i, [token]) for i, token in enumerate((9, 70))]
    return torch.cat(steps).cpu()


@pytest.mark.skipif(not INTERPRETED, reason="CUDA has no integer matmul for the reference")
@pytest.mark.parametrize("weights", ["ternary", "dense"])
def test_logits_equal_the_reference(weights: Weights, device: torch.device) -> None:
    expected = logits(ReferenceBackend(device), weights)
    actual = logits(TritonBackend(device), weights)
    assert torch.equal(actual.argmax(dim=-1), expected.argmax(dim=-1))
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
