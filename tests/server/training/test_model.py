import pytest
import torch
import torch.nn.functional as F
from bitwatt.training.data import Batch
from bitwatt.training.model import Architecture, LanguageModel, ModelConfig
from bitwatt.training.ternary import BitLinear
from bitwatt.training.train import loss_of

from tests.server.training.factories import make_training_config

ARCHITECTURES: tuple[Architecture, ...] = ("ternary", "llama", "binary")


def make_model(architecture: Architecture, seed: int = 0) -> LanguageModel:
    return LanguageModel(make_training_config(architecture, vocab_size=50), seed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_token_changes_nothing_before_it(architecture: Architecture):
    model = make_model(architecture)
    tokens = torch.arange(12)[None] % 50
    changed = tokens.clone()
    changed[0, 7] = 49
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(dim=-1)[0]
    assert torch.all(difference[:7] == 0)
    assert torch.all(difference[7:] > 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_gets_a_gradient(architecture: Architecture):
    model = make_model(architecture)
    tokens = torch.arange(40).reshape(2, 20)
    positions = torch.arange(20).expand(2, 20)
    torch.autograd.backward(loss_of(model, Batch(tokens, positions, tokens + 1)))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_documents_packed_in_one_row_compute_what_each_computes_alone(architecture: Architecture):
    model = make_model(architecture)
    first, second = torch.arange(9)[None], torch.arange(20, 32)[None]
    together = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
    with torch.no_grad():
        logits = F.linear(model.hidden(together, positions), model.model.embed_tokens.weight)
        torch.testing.assert_close(logits[:, :9], model(first))
        torch.testing.assert_close(logits[:, 9:], model(second))


def test_every_linear_of_the_ternary_model_is_ternary_and_none_of_the_twins():
    ternary, twin = make_model("ternary"), make_model("llama")
    assert sum(isinstance(module, BitLinear) for module in ternary.modules()) == 2 * 7
    assert not any(isinstance(module, torch.nn.Linear) for module in ternary.modules())
    assert not any(isinstance(module, BitLinear) for module in twin.modules())


def test_the_pair_has_the_same_size_but_for_the_sub_norms():
    ternary = LanguageModel(ModelConfig("ternary")).num_parameters()
    twin = LanguageModel(ModelConfig("llama")).num_parameters()
    assert ternary - twin == 4 * (512 + 1280)
    assert 12e6 < twin < 14e6


def test_weights_depend_on_the_seed_alone():
    first, second, other = (make_model("ternary", seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
