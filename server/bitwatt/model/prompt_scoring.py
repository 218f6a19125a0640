"""Scores prompts: the log-probability of each token, given those before it.

The logits are those that decoding the same tokens would have: the same norm and head, whose result
for a row never depends on the others. A prompt's would take 1 GiB for 2048 tokens and 128k ids, so
they are computed in slices, of which only what was asked for is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from bitwatt.model.runner_protocol import PromptLogprobs
from bitwatt.model.streams import upload
from bitwatt.model.transformer import Transformer

__all__ = ["ScoredRows", "Scores", "score"]

_SLICE_BYTES = 32 << 20  # of logits; 65 rows of 128k ids, for which the head is read once


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Neighbouring rows of a step's hidden states, and the token that follows each.

    first    the first row
    num_top  how many of the likeliest tokens to keep a row
    """

    first: int
    targets: list[int]
    num_top: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of some spans, row after row."""

    spans: Sequence[ScoredRows]
    values: Tensor  # [S] float32
    ranks: Tensor  # [S] int32
    top_values: Tensor  # [S, num_top] float32
    top_token_ids: Tensor  # [S, num_top] int32

    def collect(self) -> list[PromptLogprobs | None]:
        """Return each span's, in order; None where one isn't finite. Reads tensors on the host."""
        sizes = [len(span.targets) for span in self.spans]
        tensors = self.values, self.ranks, self.top_values, self.top_token_ids
        parts = zip(*(torch.split(tensor, sizes) for tensor in tensors), strict=True)
        return [
            PromptLogprobs(top_values.shape[1], *map(_packed, (values, ranks, top_values, top_ids)))
            if values.isfinite().all()
            else None
            for values, ranks, top_values, top_ids in parts
        ]


def score(model: Transformer, hidden_states: Tensor, spans: Sequence[ScoredRows]) -> list[Scores]:
    """Return the scores of the spans' targets, the spans in their order.

    hidden_states  [T, hidden_size], what the layers made of the step's tokens
    """
    # Among equal tokens it depends on their number which of them are the likeliest.
    groups = groupby(spans, key=lambda span: span.num_top)
    return [_score(model, hidden_states, list(group), num_top) for num_top, group in groups]


def _score(
    model: Transformer, hidden_states: Tensor, spans: Sequence[ScoredRows], num_top: int
) -> Scores:
    device = hidden_states.device
    rows = torch.cat([torch.arange(s.first, s.first + len(s.targets)) for s in spans])
    rows = upload(rows, torch.int64, device)
    targets = upload([target for s in spans for target in s.targets], torch.int64, device)
    size = max(1, _SLICE_BYTES // (4 * model.config.vocab_size))
    slices = [
        _score_slice(model.logits(hidden_states, some_rows), some_targets, num_top)
        for some_rows, some_targets in zip(
            torch.split(rows, size), torch.split(targets, size), strict=True
        )
    ]
    return Scores(spans, *map(torch.cat, zip(*slices, strict=True)))


def _score_slice(
    logits: Tensor, targets: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, ranks, and the likeliest tokens' values and ids of logits [R, vocab_size]."""
    log_probabilities = logits.log_softmax(dim=-1)
    values = log_probabilities.gather(1, targets[:, None])
    ranks = 1 + (log_probabilities > values).count_nonzero(dim=-1)
    top = log_probabilities.topk(num_top, dim=-1)
    return values[:, 0], ranks.int(), top.values, top.indices.int()


def _packed(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
