import pytest
import torch
import torch.nn.functional as F
from bitwatt.training.loss import CHUNK, linear_cross_entropy


def make_operands(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(0, 50, (rows,), generator=generator)


@pytest.mark.parametrize("rows", [1, CHUNK, 2 * CHUNK + 3])
def test_loss_and_gradients_are_those_of_the_whole_logits(rows: int):
    hidden, weight, targets = make_operands(rows)
    loss = linear_cross_entropy(hidden, weight, targets)
    (3 * loss).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = F.cross_entropy(hidden @ weight.T, targets)
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, (hidden.grad, weight.grad))


def test_autocast_multiplies_in_bfloat16_and_adds_in_float32():
    hidden, weight, targets = make_operands(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets), rtol=2e-2, atol=0)


def test_without_positions_that_count_the_loss_is_zero():
    hidden, weight, targets = make_operands(1)
    assert linear_cross_entropy(hidden[:0], weight, targets[:0]).item() == 0
