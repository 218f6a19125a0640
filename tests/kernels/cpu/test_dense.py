"""Matmuls of the CPU's libraries, by whatever they have here."""

import pytest
import torch
from bitwatt_kernels.cpu import dense


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize(
    ("in_features", "largest"), [(256, 1), (1 << 17, 1), ((1 << 17) + 64, 1), (1032, 127)]
)
def test_int8_products_are_exact_up_to_the_largest_sums(
    has_kernels: bool, in_features: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of 2^24 are the last that float32 holds one by one; larger ones are int32's."""
    monkeypatch.setattr(dense, "has_int8_kernels", lambda: has_kernels)
    monkeypatch.setattr(dense, "_MAX_WIDENED", 2 * in_features)  # three parts
    x = torch.full((3, in_features), -128, dtype=torch.int8)
    x[1] = torch.randint(-128, 128, (in_features,), dtype=torch.int8)
    weight = torch.full((5, in_features), -largest, dtype=torch.int8).T
    weight[:, 1:3] = torch.randint(-largest, largest + 1, (in_features, 2), dtype=torch.int8)
    weight[-1, 3] += 1  # a sum one code's product from the largest
    expected = (x.to(torch.int64) @ weight.to(torch.int64)).float()
    assert torch.equal(dense.int8_matmul(x, weight, largest=largest), expected)
