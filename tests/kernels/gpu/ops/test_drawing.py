"""The draw kernel draws what the sorted row gives, for every filter and at every edge."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from bitwatt.model.truncation_sampling import draw as reference_draw
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt_kernels.errors import DtypeError, ShapeError
from bitwatt_kernels.gpu.configs import DenseConfig
from bitwatt_kernels.gpu.dense import linear_and_best
from bitwatt_kernels.gpu.device import Gpu
from bitwatt_kernels.gpu.drawing import MAX_CANDIDATES, draw
from bitwatt_kernels.gpu.triton_backend import TritonBackend
from torch import Tensor

# Of a float32 softmax and of exp, in parts of the sum; what is drawn so near to a boundary may be
# the neighbour.
ROUNDING = 2.0**-19
JUST_BELOW_ONE = 1 - 2.0**-53


def settings(**filters: float) -> ResolvedSampling:
    return ResolvedSampling(max_tokens=1, **({"temperature": 1.0} | filters))  # type: ignore[arg-type]


FILTERS = [
    settings(),
    settings(temperature=0.3, min_p=0.1),
    settings(temperature=1.7, top_k=1),
    settings(top_k=5, top_p=0.7),
    settings(top_k=50, min_p=0.02),
    settings(top_p=0.9),
    settings(top_p=0.999, temperature=2.0),
    settings(top_p=1e-4),
    settings(top_p=0.5, min_p=1.0),
    settings(top_k=10**9),
]


def settings_of(sampling: Sequence[ResolvedSampling], uniform: Tensor) -> Tensor:
    rows = [
        [s.temperature, s.top_k, s.top_p, s.min_p, u, -1]
        for s, u in zip(sampling, uniform.tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def drawn(
    logits: Tensor, sampling: Sequence[ResolvedSampling], uniform: Tensor, device: torch.device
) -> Tensor:
    given = settings_of(sampling, uniform).to(device)
    return draw(logits.to(device), given, Gpu(device)).cpu()


def assert_drawn_as_sorted(
    logits: Tensor, sampling: Sequence[ResolvedSampling], uniform: Tensor, device: torch.device
) -> None:
    tokens = drawn(logits, sampling, uniform, device)
    for token, row, s, u in zip(tokens.tolist(), logits, sampling, uniform, strict=True):
        allowed: set[int] = set()
        for share in (u - ROUNDING, u, u + ROUNDING):
            for cut in (-ROUNDING, 0.0, ROUNDING):
                near = dataclasses.replace(
                    s,
                    top_p=s.top_p if s.top_p == 1 else max(s.top_p + cut, 0.0),
                    min_p=min(s.min_p * (1 + cut), 1.0),
                )
                share = share.clamp(0.0, JUST_BELOW_ONE)
                allowed.add(int(reference_draw(row[None], [near], share[None])[0]))
        assert token in allowed, s


def uniforms(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**53, (count,), generator=generator).double() * 2.0**-53


@pytest.mark.parametrize("vocab_size", [1, 63, 700, MAX_CANDIDATES + 900])
def test_every_filter_leaves_and_draws_what_a_sorted_row_does(
    vocab_size: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(len(FILTERS), vocab_size, generator=generator) * 4
    assert_drawn_as_sorted(logits, FILTERS, uniforms(len(FILTERS), vocab_size), device)


def test_filters_that_leave_more_than_the_candidates_look_at_the_whole_row(
    device: torch.device,
) -> None:
    """All logits are near one another: no bin of theirs has room, or too few bins have."""
    generator = torch.Generator().manual_seed(1)
    vocab_size = MAX_CANDIDATES + 2000
    logits = torch.rand(4, vocab_size, generator=generator) * torch.tensor([[1e-3], [1], [1], [9]])
    kinds = [
        settings(top_p=0.99),
        settings(top_p=0.97),
        settings(top_k=MAX_CANDIDATES + 1000),
        settings(top_k=MAX_CANDIDATES + 1900, top_p=0.9999),
    ]
    assert_drawn_as_sorted(logits, kinds, uniforms(4, 1), device)


def test_equal_logits_are_ranked_by_id(device: torch.device) -> None:
    """0.0 and -0.0 are equal too."""
    logits = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0]]).repeat(6, 1)
    kinds = [settings(top_k=3), settings(top_k=3), settings(top_k=3), *[settings(top_p=0.4)] * 3]
    uniform = torch.tensor([0.0, 0.5, JUST_BELOW_ONE] * 2, dtype=torch.float64)
    expected = reference_draw(logits, kinds, uniform)
    assert expected.tolist() == [0, 1, 3, 0, 1, 1]
    assert torch.equal(drawn(logits, kinds, uniform, device), expected)


@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 0.9}, {"top_k": 2}, {"temperature": 0.0}], ids=str
)
def test_what_cannot_be_drawn_from_gives_no_token_and_masked_ones_are_never_drawn(
    filters: dict[str, float], device: torch.device
) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [0.0, nan, 1.0, 2.0],
            [0.0, inf, 1.0, 2.0],
            [-inf, -inf, -inf, -inf],
            [-inf, 1.0, -inf, 1.0],
            [-inf, -3e38, -inf, -inf],
        ]
    )
    tokens = drawn(logits, [settings(**filters)] * 5, torch.full((5,), 0.75).double(), device)
    first_of_equals = 1 if "temperature" in filters else 3
    assert tokens.tolist() == [-1, -1, -1, first_of_equals, 1]


@pytest.mark.parametrize("out_features", [130, 7])
def test_the_head_finds_the_best_of_its_tiles_for_the_draw(
    out_features: int, device: torch.device
) -> None:
    """The first of equals, in one tile or another; a NaN or an infinity where there is one."""
    gpu = Gpu(device)
    config = DenseConfig(None, 32, 16, 64, 4, 2)
    weight = torch.zeros(out_features, 64)
    weight[3, 0] = weight[out_features - 1, 0] = 2.0
    weight[:, 1], weight[5, 1] = -1.0, -0.5
    weight[:, 2] = 1.0
    x = torch.eye(64)[:4]
    x[2, 2] = torch.inf  # in all of its row: 0 · inf is a NaN
    halves = torch.full((4,), 0.5)
    sampled = settings_of([settings()] * 4, halves).to(device)
    greedily = settings_of([settings(temperature=0.0)] * 4, halves).to(device)
    for spoiled, greedy in (([], [3, 5, -1, 0]), ([2], [-1] * 4)):
        weight[spoiled] = torch.nan
        out = torch.empty(4, out_features, device=device)
        best = linear_and_best(x.to(device), weight.to(device), None, out, gpu, config)
        assert best is not None
        assert draw(out, greedily, gpu, best).tolist() == greedy
        assert torch.equal(draw(out, sampled, gpu, best), draw(out, sampled, gpu))


def test_a_row_s_token_does_not_depend_on_the_rows_beside_it(device: torch.device) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(2))
    kinds = [FILTERS[5], FILTERS[0], FILTERS[3]]
    uniform = uniforms(3, 2)
    together = drawn(logits, kinds, uniform, device)
    for i in range(3):
        alone = drawn(logits[i : i + 1], kinds[i : i + 1], uniform[i : i + 1], device)
        assert alone == together[i]


def test_settings_that_do_not_fit_are_refused(device: torch.device) -> None:
    logits = torch.zeros(2, 6, device=device)
    given = torch.zeros(2, 6, dtype=torch.float64, device=device)
    with pytest.raises(DtypeError, match="and settings torch"):
        draw(logits, given.float(), Gpu(device))
    with pytest.raises(ShapeError, match="settings have shape"):
        draw(logits, given[:1], Gpu(device))
    with pytest.raises(ShapeError, match="logits have shape"):
        draw(logits.T, given, Gpu(device))


def test_masked_tokens_are_never_drawn(device: torch.device) -> None:
    """By the row that a mask is of, or by the mask that a row's settings name."""
    backend = TritonBackend(device)
    logits = torch.zeros(3, 40, device=device)
    bits = torch.tensor([[0, 1 << 5], [1 << 7, 0]], dtype=torch.int32, device=device)
    given = settings_of([settings()] * 3, torch.full((3,), 0.25))
    given[:, 5] = torch.tensor([1, -1, 0])
    tokens = backend.draw_tokens(logits.clone(), given.to(device), bits)
    assert tokens.tolist() == [7, 10, 37]
    backend.mask_logits(logits, [2, 0], bits)
    assert torch.equal(backend.draw_tokens(logits, given.to(device), None), tokens)
    assert (logits > -torch.inf).sum(dim=1).tolist() == [1, 40, 1]
