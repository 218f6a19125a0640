"""Tokens drawn by the native backend, against the filters' definitions in float64."""

from dataclasses import dataclass

import pytest
import torch
from bitwatt_kernels.errors import DtypeError, KernelError, ShapeError
from hypothesis import example, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.cpu.conftest import available, make_native

# The weights are float32 within 2 ulp, and what a filter leaves is a sum of them.
TOLERANCE = 1e-6
# With these no filter of rounded logits ends within rounding of a token's weight.
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0713),
    (1.3, 3, 1.0, 0.0),
    (1.0, 10**6, 1.0, 0.0713),
    (1.0, 0, 0.3719, 0.0),
    (0.7, 0, 0.999993, 0.0),
    (1.3, 40, 0.8171, 0.0713),
]


@dataclass
class Drawn:
    """Rows of logits, their settings, and the masks that some have."""

    logits: Tensor
    settings: Tensor
    rows: list[int]
    bits: Tensor | None

    def allowed(self, row: int) -> Tensor:
        vocab_size = self.logits.shape[1]
        if self.bits is None or row not in self.rows:
            return torch.ones(vocab_size, dtype=torch.bool)
        words = self.bits[self.rows.index(row)]
        return (
            (words[:, None] >> torch.arange(32, dtype=torch.int32) & 1)
            .flatten()[:vocab_size]
            .bool()
        )


def intervals(logits: Tensor, settings: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens in order, the weights that the filters leave, and the shares before each."""
    temperature, top_k, top_p, min_p, *_ = settings
    scaled = logits / torch.tensor(temperature, dtype=torch.float32)
    weights = (scaled.double() - scaled.double().max()).exp()
    by_rank = top_k > 0 or top_p < 1
    order = torch.arange(len(logits))
    if by_rank:
        order = scaled.sort(descending=True, stable=True).indices
        order = order[: int(top_k) or None]
    weights = weights[order]
    if top_p < 1:
        before = weights.cumsum(0) - weights
        is_left = before < float(torch.tensor(top_p, dtype=torch.float32)) * weights.sum()
        is_left[0] = True
        weights = weights * is_left
    weights = weights * (weights >= min_p)
    shares = weights.cumsum(0) / weights.sum()
    return order, weights, torch.cat([torch.zeros(1, dtype=torch.float64), shares])


def check_token(token: int, logits: Tensor, settings: list[float]) -> None:
    """Raise AssertionError unless the token is the one that the uniform number picks, or next."""
    if not logits.max().abs() < torch.inf:  # a NaN, an infinity, or nothing allowed
        assert token == -1
    elif settings[0] == 0:
        assert token == int(logits.argmax())
        assert logits[token] == logits.max()
    else:
        order, weights, shares = intervals(logits, settings)
        [place] = (order == token).nonzero()[0].tolist()
        assert shares[place] - TOLERANCE <= settings[4] <= shares[place + 1] + TOLERANCE
        assert weights[place] > 0, "what a filter takes is not drawn"


@st.composite
def draws(draw: st.DrawFn) -> Drawn:
    num_rows, vocab_size = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    logits = torch.randn(num_rows, vocab_size, generator=generator) * draw(
        st.sampled_from([0.1, 2, 8])
    )
    if draw(st.booleans()):
        logits = logits.round()  # ties
    for value in draw(st.lists(st.sampled_from([torch.nan, torch.inf, -torch.inf]), max_size=2)):
        logits[draw(st.integers(0, num_rows - 1)), draw(st.integers(0, vocab_size - 1))] = value
    uniform = st.one_of(st.sampled_from([0.0, 1 - 2.0**-53]), st.floats(0, 1, exclude_max=True))
    rows = draw(st.lists(st.integers(0, num_rows - 1), unique=True))
    words = st.one_of(st.sampled_from([0, 0, -1, 1, -(2**31)]), st.integers(-(2**31), 2**31 - 1))
    num_words = -(-vocab_size // 32) + draw(st.integers(0, 1))
    bits = [draw(st.lists(words, min_size=num_words, max_size=num_words)) for _ in rows]
    settings = [
        (
            *draw(st.sampled_from([(0.0, 0, 1.0, 0.0), *SETTINGS])),
            draw(uniform),
            rows.index(row) if row in rows else -1,
        )
        for row in range(num_rows)
    ]
    return Drawn(
        logits,
        torch.tensor(settings, dtype=torch.float64),
        rows,
        torch.tensor(bits, dtype=torch.int32) if rows else None,
    )


# A share of 4e-18, which adds nothing to that of the token before.
TINY = Drawn(
    torch.tensor([[0.0, -40.0]]),
    torch.tensor([(1.0, 0, 1.0, 0.0, 1 - 2.0**-53, -1)], dtype=torch.float64),
    [],
    None,
)


@settings_of_hypothesis(max_examples=40)
@given(draws())
@example(TINY)
def test_a_uniform_number_picks_the_token_of_its_share_among_those_allowed(native, given_draws):
    g = given_draws
    tokens = native.draw_tokens(g.logits, g.settings, g.bits).tolist()
    for row, token in enumerate(tokens):
        logits = g.logits[row].where(g.allowed(row), -torch.inf)
        check_token(token, logits, g.settings[row].tolist())


def many_rows(vocab_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return rows of every kind, and settings for them."""
    generator = torch.Generator().manual_seed(6)
    kinds = [(0.0, 0, 1.0, 0.0), *SETTINGS]
    logits = torch.randn(3 * len(kinds), vocab_size, generator=generator) * scale
    uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    settings = torch.tensor(3 * kinds, dtype=torch.float64)
    no_mask = torch.full_like(uniform, -1)
    return logits, torch.cat([settings, uniform[:, None], no_mask[:, None]], dim=1)


@pytest.mark.parametrize("scale", [0.05, 1, 4])  # flat rows are ranked to the end
def test_of_a_large_vocabulary_the_same_token_is_drawn_alone_and_by_any_threads(native, scale):
    logits, settings = many_rows(5003, scale)
    tokens = native.draw_tokens(logits, settings, None)
    for row, token in enumerate(tokens.tolist()):
        check_token(token, logits[row], settings[row].tolist())
    for row in range(0, len(logits), 5):
        alone = native.draw_tokens(logits[row : row + 1], settings[row : row + 1], None)
        assert alone.tolist() == tokens[row : row + 1].tolist()
    single = make_native(instruction_set=native.instruction_set, num_threads=1)
    assert single.draw_tokens(logits, settings, None).tolist() == tokens.tolist()


def test_every_instruction_set_with_fused_multiply_add_draws_the_same_tokens():
    logits, settings = many_rows(5003, 1)
    drawn = [
        make_native(instruction_set=name).draw_tokens(logits, settings, None).tolist()
        for name in available()
        if name != "portable"
    ]
    assert all(tokens == drawn[0] for tokens in drawn)


def test_what_does_not_fit_the_logits_is_refused(native):
    logits, settings = torch.zeros(2, 33), torch.zeros(2, 6, dtype=torch.float64)
    bits = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ShapeError, match=r"\[1, 6\] for 2 rows"):
        native.draw_tokens(logits, settings[:1], None)
    with pytest.raises(ShapeError, match="1 rows of 33 tokens"):
        native.draw_tokens(logits, settings, bits[:, :1].contiguous())
    for given_bits, mask in ((None, 0), (bits, 1), (bits, torch.nan)):
        settings[1, 5] = mask
        with pytest.raises(KernelError, match="a row's mask is none of those given"):
            native.draw_tokens(logits, settings, given_bits)
    with pytest.raises(ShapeError, match="not contiguous"):
        native.draw_tokens(torch.zeros(33, 2).T, settings, None)
    with pytest.raises(DtypeError, match=r"torch\.float32"):
        native.draw_tokens(logits, settings.float(), None)
