"""Masks of logits by the native backend, against torch."""

import pytest
import torch
from bitwatt_kernels.errors import DtypeError, ShapeError
from hypothesis import given
from hypothesis import strategies as st

WORDS = st.one_of(st.sampled_from([0, -1, 1, -(2**31)]), st.integers(-(2**31), 2**31 - 1))


def masked(logits: torch.Tensor, rows: list[int], bits: torch.Tensor) -> torch.Tensor:
    """Return logits with -inf where a row's bit is not set."""
    logits = logits.clone()
    vocab_size = logits.shape[1]
    for row, words in zip(rows, bits.tolist(), strict=True):
        for token in range(vocab_size):
            if not words[token // 32] >> (token % 32) & 1:
                logits[row, token] = -torch.inf
    return logits


@st.composite
def masks(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    num_rows, vocab_size = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    rows = draw(st.lists(st.integers(0, num_rows - 1), unique=True))
    num_words = -(-vocab_size // 32) + draw(st.integers(0, 1))
    bits = [draw(st.lists(WORDS, min_size=num_words, max_size=num_words)) for _ in rows]
    seed = draw(st.integers(0, 2**32 - 1))
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    for value in draw(st.lists(st.sampled_from([torch.nan, torch.inf, -torch.inf, -0.0]))):
        logits[draw(st.integers(0, num_rows - 1)), draw(st.integers(0, vocab_size - 1))] = value
    return logits, rows, torch.tensor(bits, dtype=torch.int32).view(len(rows), num_words)


@given(masks())
def test_a_mask_leaves_the_logits_whose_bits_are_set_and_rows_without_one(native, given_masks):
    logits, rows, bits = given_masks
    expected = masked(logits, rows, bits)
    native.mask_logits(logits, rows, bits)
    assert torch.equal(logits.view(torch.int32), expected.view(torch.int32))  # NaN to the bit


def test_rows_of_a_large_vocabulary_are_shared_out_over_threads(native):
    logits, rows = torch.randn(40, 32003), [*range(39, 0, -2)]
    bits = torch.randint(-(2**31), 2**31, (len(rows), 1001), dtype=torch.int32)
    allowed = (bits[:, :, None] >> torch.arange(32, dtype=torch.int32) & 1).bool().flatten(1)
    expected = logits.clone()
    expected[rows] = logits[rows].where(allowed[:, :32003], -torch.inf)
    native.mask_logits(logits, rows, bits)
    assert torch.equal(logits, expected)


def test_masks_that_do_not_fit_the_logits_are_refused(native):
    logits, bits = torch.zeros(2, 33), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ShapeError, match="1 rows of 33 tokens"):
        native.mask_logits(logits, [0], bits[:, :1].contiguous())
    with pytest.raises(ShapeError, match="2 rows of 33 tokens"):
        native.mask_logits(logits, [0, 1], bits)
    for row in (-1, 2):
        with pytest.raises(ShapeError, match="the logits have 2"):
            native.mask_logits(logits, [row], bits)
    with pytest.raises(ShapeError, match="not contiguous"):
        native.mask_logits(torch.zeros(33, 2).T, [0], bits)
    with pytest.raises(DtypeError, match=r"torch\.int64"):
        native.mask_logits(logits, [0], bits.long())
