import pytest
import torch
from bitwatt.training.model import LanguageModel
from bitwatt.training.optimizer import Muon, Optimizers, orthogonalized
from bitwatt.training.schedule import Rates

from tests.server.training.factories import make_training_config


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48)])
def test_an_orthogonalized_matrix_keeps_its_directions_and_evens_its_singular_values(
    shape: tuple[int, int],
):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalized(matrix) @ v.T
    values = found.diagonal()
    assert (found - torch.diag(values)).abs().max() < 1e-3
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_the_first_update_has_the_size_of_adamws():
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    muon = Muon([weight], torch.float32)
    muon.param_groups[0]["lr"] = 0.5
    muon.step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.5 * 0.2, rel=0.2)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest():
    model = LanguageModel(make_training_config())
    optimizers = Optimizers(model, torch.float32)
    optimizers.set_rates(Rates(1e-3, 0.1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    state = optimizers.state()
    matrices = {name for name, weight in model.named_parameters() if weight.dim() == 2}
    by_muon = {name.partition("/")[2] for name in state if name.startswith("momentum/")}
    assert by_muon == matrices - {"model.embed_tokens.weight"}
    by_adamw = {name.partition("/")[2] for name in state if name.startswith("exp_avg/")}
    assert by_adamw == set(model.state_dict()) - by_muon
    assert all(parameter.grad is None for parameter in model.parameters())
