"""What a step computes, and what comes of it, as the scheduler tells it to engine and runner."""

from collections.abc import Sequence
from dataclasses import dataclass

from bitwatt.scheduling.request import FinishReason, Request

MAX_VERIFYING_DRAWS = 32
"""Tokens that a step which verifies drafts draws: with more a processor's step takes longer."""

__all__ = ["MAX_VERIFYING_DRAWS", "Chunk", "Committed", "Plan", "ScoredSpan", "max_draws"]


def max_draws(max_num_seqs: int) -> int:
    """Return how many tokens one step samples at most, drafts being verified or not."""
    return max(max_num_seqs, MAX_VERIFYING_DRAWS)


@dataclass(slots=True, eq=False)  # not frozen: that costs 1 µs an object, 64 times a step
class Chunk:
    """Neighbouring tokens of one request in one step. Read-only once planned.

    start           position of the first token
    num_tokens      tokens computed; the last may be pending, known to the device alone
    is_pending      whether it is
    samples         whether the step draws the request's next token from its last token's logits
    new_blocks      blocks added since the request's last chunk, from index first_new_block on
    drafts          the last of the tokens computed, where they are guesses; the step draws what
                    follows the token before them, and what follows each
    """

    request: Request
    row: int
    start: int
    num_tokens: int
    is_pending: bool
    samples: bool
    first_new_block: int
    new_blocks: Sequence[int]
    drafts: Sequence[int] = ()

    @property
    def position(self) -> int:
        """Position of the first token drawn; with the seed, the key of the generator."""
        return self.start + self.num_tokens - len(self.drafts)

    @property
    def num_drawn(self) -> int:
        """Tokens drawn, those behind a wrong draft among them."""
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def is_admission(self) -> bool:
        """Whether it is the first since the request (again) began to run: its row is new."""
        return self.first_new_block == 0


@dataclass(frozen=True, slots=True)
class ScoredSpan:
    """Tokens of a prompt whose logits score the token behind each.

    chunk       that computes them
    start, end  their positions, from the first to the one after the last
    """

    chunk: Chunk
    start: int
    end: int

    @property
    def request(self) -> Request:
        return self.chunk.request

    @property
    def num_top(self) -> int:
        """How many of the likeliest tokens are wanted besides."""
        return self.request.sampling.prompt_logprobs or 0

    @property
    def targets(self) -> list[int]:
        """The tokens that are scored."""
        return self.request.prompt_token_ids[self.start + 1 : self.end + 1]

    @property
    def is_end(self) -> bool:
        """Whether the request wants nothing else."""
        return self.end == self.request.num_needed


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step computes.

    scored    in the order of their chunks
    embedded  the chunks that end with the last token of a prompt that is embedded, in their order
    """

    chunks: list[Chunk]
    num_tokens: int
    scored: Sequence[ScoredSpan] = ()
    embedded: Sequence[Chunk] = ()


@dataclass(slots=True, eq=False)
class Committed:
    """A request's new tokens, and with its last ones the reason it ended; stop tokens are given.

    tokens      one at least, unless it ended with FinishReason.ERROR: then the next can't be drawn
    first_draw  index of the first of them among all that the step drew
    """

    request: Request
    tokens: list[int]
    finish_reason: FinishReason | None
    first_draw: int
