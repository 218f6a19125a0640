"""What a step has drawn and read: queued to the host, and once it is there made a result."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from bitwatt.model.embedding import packed_embeddings
from bitwatt.model.prompt_scoring import Scores
from bitwatt.model.runner_protocol import StepResult, TokenLogprobsRow
from bitwatt.model.sampler import LogprobsBatch, Sampled, SamplingRow
from bitwatt.model.streams import Stream
from bitwatt.model.truncation_sampling import NO_TOKEN

__all__ = ["StepOutputs", "fetch", "fetch_sampled", "fetch_scores"]

_NOT_FINITE = "the logits of its next token are not finite, so none can be drawn"


def fetch(tensor: Tensor, stream: Stream | None) -> Tensor:
    """Return the tensor on the host, to be read when the step is done.

    stream  of the tensor's device; None on a CPU, where it is the tensor itself
    """
    if stream is None:
        return tensor
    host = stream.pinned(tensor.shape, tensor.dtype)
    stream.copy(host, tensor)
    return host


def fetch_sampled(sampled: Sampled, stream: Stream | None) -> Sampled:
    """Return what was drawn on the host, as fetch does."""
    batch = sampled.logprobs
    if batch is not None:
        batch = LogprobsBatch(
            fetch(batch.sampled, stream),
            fetch(batch.top_values, stream),
            fetch(batch.top_tokens, stream),
        )
    return replace(sampled, tokens=fetch(sampled.tokens, stream), logprobs=batch)


def fetch_scores(scores: Scores, stream: Stream | None) -> Scores:
    """Return the scores on the host, as fetch does."""
    return replace(
        scores,
        values=fetch(scores.values, stream),
        ranks=fetch(scores.ranks, stream),
        top_values=fetch(scores.top_values, stream),
        top_token_ids=fetch(scores.top_token_ids, stream),
    )


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """A step's outputs on the host, there once the step is done.

    sampled   None where nothing was drawn
    rows      of what was drawn
    embedded  [R, hidden_size] float32
    """

    sampled: Sampled | None
    rows: Sequence[SamplingRow]
    scores: Sequence[Scores]
    embedded: Tensor | None

    def collect(self) -> StepResult:
        """Return the step's result; reads tensors."""
        result = StepResult([], []) if self.sampled is None else _drawn(self.sampled, self.rows)
        if not self.scores and self.embedded is None:
            return result
        return replace(
            result,
            prompt_logprobs=[span for some in self.scores for span in some.collect()],
            embeddings=[] if self.embedded is None else packed_embeddings(self.embedded),
        )


def _drawn(sampled: Sampled, rows: Sequence[SamplingRow]) -> StepResult:
    tokens: list[int | None] = sampled.tokens.tolist()
    failures: dict[int, str] = {}
    for i, token in enumerate(tokens):
        if token == NO_TOKEN:
            tokens[i] = None
            failures[i] = sampled.failures.get(i, _NOT_FINITE)
    batch = sampled.logprobs
    if batch is None:
        return StepResult(tokens, [None] * len(tokens), failures)
    chosen = batch.sampled.tolist()
    values, ids = batch.top_values.tolist(), batch.top_tokens.tolist()
    logprobs: list[TokenLogprobsRow | None] = []
    for i, row in enumerate(rows):
        k = row.sampling.logprobs
        if k is None:
            logprobs.append(None)
        else:
            top = list(zip(ids[i][:k], values[i][:k], strict=True))
            logprobs.append((chosen[i], top))
    return StepResult(tokens, logprobs, failures)
