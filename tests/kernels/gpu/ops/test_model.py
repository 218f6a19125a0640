"""A whole tiny model on TritonBackend gives the reference's logits, prefilled and decoded."""

import pytest
import torch
from bitwatt.model.config import Weights
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.random_weights import random_model
from bitwatt.model.transformer import Transformer
from bitwatt_kernels.backend import Backend
from bitwatt_kernels.gpu.interpreter import INTERPRETED
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from bitwatt_kernels.reference.reference_backend import ReferenceBackend

from tests.factories import make_model_config, make_step_layout, moved

CONFIG = make_model_config(vocab_size=96, max_model_len=64)
PROMPT = [5, 17, 2, 80, 33, 8, 90, 41, 17, 3, 60, 12, 55, 7, 28, 1, 19, 66, 4]


def run(model: Transformer, kv_cache: KVCache, first: int, tokens: list[int]) -> torch.Tensor:
    """Return the last token's logits of a step that brings tokens from position first on."""
    device = model.backend.device
    tables = torch.tensor([[3, 1, 2]], dtype=torch.int32)
    layout = moved(make_step_layout(tables, [first + len(tokens)], [len(tokens)]), device)
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
