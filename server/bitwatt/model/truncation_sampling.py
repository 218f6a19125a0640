"""Truncation sampling: draws a token a row from what top-k, top-p and min-p leave of its softmax.

A row is drawn from by inverting its cumulative distribution, in one of two orders:

- by rank, where top-k or top-p is set. Only the best 1024 tokens are sorted at first: a whole row
  of 128256 takes 10 ms on a core, as long as a decode step. A row for which those turn out too few
  is sorted whole.
- by token id, where neither is set. min-p is a threshold and needs no order.

This is torch's way, and what the others are held to: a GPU's is a kernel of its own
(bitwatt_kernels.gpu.drawing) and so is the native backend's (csrc/drawing.cpp), in the same orders.
A row's sums and ranks never involve another row, so a token doesn't depend on the batch. A row that
can't be drawn from gives NO_TOKEN, never an id past the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitwatt.model.streams import upload
from bitwatt.scheduling.request import ResolvedSampling

__all__ = ["NO_TOKEN", "draw"]

NO_TOKEN = -1
"""Stands for the token of a row whose weights aren't finite, or are all 0."""

_NUM_CANDIDATES = 1024  # sorted at first


def draw(logits: Tensor, sampling: Sequence[ResolvedSampling], uniform: Tensor) -> Tensor:
    """Return a token a row, [R] int64; NO_TOKEN where the row has no distribution.

    logits    [R, vocab_size] float32
    sampling  temperatures above 0
    uniform   [R] float64 in [0, 1): the same number draws the same token of the same row
    """
    is_ranked = [bool(s.top_k) or s.top_p < 1 for s in sampling]
    if not any(is_ranked):
        return _draw_by_id(logits, sampling, uniform)
    if all(is_ranked):
        return _draw_by_rank(logits, sampling, uniform, _num_candidates(logits, sampling))
    tokens = torch.empty(len(sampling), dtype=torch.int64, device=logits.device)
    for kind in (True, False):
        chosen = [i for i, ranked in enumerate(is_ranked) if ranked == kind]
        rows = upload(chosen, torch.int64, logits.device)
        tokens[rows] = draw(logits[rows], [sampling[i] for i in chosen], uniform[rows])
    return tokens


def _draw_by_id(logits: Tensor, sampling: Sequence[ResolvedSampling], uniform: Tensor) -> Tensor:
    weights = (logits / _column([s.temperature for s in sampling], logits)).softmax(dim=-1)
    if any(s.min_p for s in sampling):
        floor = _column([s.min_p for s in sampling], logits) * weights.amax(dim=-1, keepdim=True)
        weights = weights.masked_fill(weights < floor, 0.0)
    return _pick(weights.double().cumsum(dim=-1), uniform)


def _draw_by_rank(
    logits: Tensor, sampling: Sequence[ResolvedSampling], uniform: Tensor, num_candidates: int
) -> Tensor:
    """Return a token a row, the tokens in order of falling logit; equal ones in order of id.

    num_candidates  tokens sorted at first: more than any top_k, or all
    """
    vocab_size = logits.shape[1]
    scaled = logits / _column([s.temperature for s in sampling], logits)
    weights = scaled.softmax(dim=-1)
    if num_candidates == vocab_size:
        values, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    else:
        tokens = scaled.topk(num_candidates, dim=-1, sorted=False).indices.sort(dim=-1).values
        values, order = scaled.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
        tokens = tokens.gather(1, order)
    rank = torch.arange(num_candidates, device=logits.device)
    top_k = upload(
        [min(s.top_k or vocab_size, vocab_size) for s in sampling], torch.int64, logits.device
    )[:, None]
    ordered = weights.gather(1, tokens).masked_fill(rank >= top_k, 0.0)
    cumulative = ordered.double().cumsum(dim=-1)
    total = torch.where(
        top_k < vocab_size, cumulative[:, -1:], weights.double().cumsum(dim=-1)[:, -1:]
    )
    top_p = _column([s.top_p for s in sampling], logits)
    is_left = ((cumulative - ordered < top_p * total) | (top_p >= 1)) & (rank < top_k)
    is_left[:, 0] = True
    floor = _column([s.min_p for s in sampling], logits) * ordered[:, :1]
    cumulative = ordered.masked_fill(~is_left | (ordered < floor), 0.0).double().cumsum(dim=-1)
    picked = _pick(cumulative, uniform)
    drawn = tokens.gather(1, picked.clamp(min=0)[:, None])[:, 0].where(picked >= 0, NO_TOKEN)
    if num_candidates < vocab_size:
        # A row needs more candidates if the filters keep even the last one, or if a token that was
        # not sorted may tie with the last one kept: order of id would decide which of them stays.
        least = values.gather(1, is_left.sum(dim=-1, keepdim=True) - 1)
        is_short = ((is_left[:, -1:] & (top_k > num_candidates)) | (least == values[:, -1:]))[:, 0]
        rows = is_short.nonzero()[:, 0]
        if len(rows):
            some = [sampling[i] for i in rows.tolist()]
            drawn[rows] = _draw_by_rank(logits[rows], some, uniform[rows], vocab_size)
    return drawn


def _num_candidates(logits: Tensor, sampling: Sequence[ResolvedSampling]) -> int:
    vocab_size = logits.shape[1]
    return min(vocab_size, max(_NUM_CANDIDATES, *((s.top_k or 0) + 1 for s in sampling)))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(values, torch.float32, like.device)[:, None]


def _pick(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Return where the row's uniform share of its total falls, [R]: always on a weight above 0.

    NO_TOKEN where there is none: of infinities and NaN softmax makes a row of NaN.
    """
    total = cumulative[:, -1:]
    # Below the total, even where the product rounds up to it.
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    picked = torch.searchsorted(cumulative, target, right=True)
    return picked.where(total > 0, NO_TOKEN)[:, 0]
