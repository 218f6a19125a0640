"""Drafts: guesses of a request's next tokens, looked up in its own prompt and answer.

An answer that rewrites, quotes or continues a pattern says again what stands in the tokens before
it. The drafter looks the last tokens up there, follows what came behind them, and proposes it. The
model then computes all proposed tokens in one step and keeps those that it would have drawn, so a
wrong draft costs time and changes nothing.

How often it drafts follows from what that has brought. A match earns trust with every token that
agrees, drafted or not, and each verification is booked as gain and cost: who has lost is asked for
longer matches, so that text without repetition is soon left alone, and text that begins to repeat
itself is found again without a trial.

Source  prompt look-up: Saxena, "Prompt Lookup Decoding", 2023; verification in one step: Leviathan,
        Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023,
        here with the draws themselves in place of a rejection test
"""

from collections.abc import Sequence
from typing import Literal

__all__ = ["MAX_DRAFT_TOKENS", "Drafter", "Speculation"]

Speculation = Literal["ngram", "off"]
"""What drafts: a look-up in prompt and answer, or nothing."""

MAX_DRAFT_TOKENS = 15
"""Of one request in one step: with the token before them they fill 16 rows."""

_MATCH = 3  # tokens looked up together
_MAX_RUN = 16  # trust that a match can earn
_LEFT_BY_MISS = 4  # a wrong token leaves the match a quarter of its trust: it may be an edit
_EDIT = 3  # tokens that an edit puts in, leaves out or replaces at most, for its match to be found
_FIRST_BALANCE = 3.0  # tokens that a request may lose before it is asked for a longer match
_MAX_BALANCE = 8.0
_MIN_BALANCE = -6.0  # with which a match of 15 tokens is long enough
_ROWS_ALONE = 3  # rows that take about as long as what a step takes however many it has


class Drafter:
    """Follows one request's tokens; the list is the request's own and grows."""

    __slots__ = (
        "_balance",
        "_behind",
        "_broken_at",
        "_broken_behind",
        "_num_followed",
        "_run",
        "_source",
        "_tokens",
    )

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._behind: dict[tuple[int, ...], int] = {}  # where what followed so many tokens lies
        self._num_followed = 0
        self._source = 0  # where the guess of the next token lies, if anything matches
        self._run = 0  # tokens that have agreed
        self._broken_at = -_EDIT - 1  # the token at which the last match broke off
        self._broken_behind = 0  # and where the one stands that was guessed
        self._balance = _FIRST_BALANCE  # tokens gained, less what verifying them cost

    @property
    def is_promising(self) -> bool:
        """Whether the next tokens are worth a draft, of what is known by now."""
        self._follow()
        return self._run >= _MATCH + 2 * max(0.0, -self._balance)

    def draft(self, limit: int) -> Sequence[int]:
        """Return guesses of the next tokens, in order: at most limit, and none where unpromising.

        The longer the match, the longer the draft. One that comes to the end of what is known goes
        on with itself: a pattern repeats.
        """
        if not self.is_promising:
            return ()
        tokens, source = self._tokens, self._source
        num_drafted = min(limit, MAX_DRAFT_TOKENS, self._run + 1)
        draft = tokens[source : source + num_drafted]
        period = len(tokens) - source
        while len(draft) < num_drafted:
            draft.append(draft[-period])
        return draft

    def book(self, num_drafted: int, num_accepted: int, *, num_running: int = 1) -> None:
        """Take in what a verification has brought.

        num_running  requests that ran meanwhile: the more, the more of a token's time a draft takes
        """
        row = num_running / (num_running + _ROWS_ALONE)
        balance = self._balance + num_accepted - 1 - row * num_drafted
        self._balance = min(_MAX_BALANCE, max(_MIN_BALANCE, balance))

    def _follow(self) -> None:
        """Take in the tokens that have come."""
        tokens, behind = self._tokens, self._behind
        if not self._num_followed:
            self._num_followed = len(tokens) - 1
            starts = (tokens[i:-1] for i in range(_MATCH))
            behind.update(zip(zip(*starts, strict=False), range(_MATCH, len(tokens)), strict=False))
        for i in range(self._num_followed, len(tokens)):
            if self._run:
                if tokens[self._source] == tokens[i]:
                    self._run = min(self._run + 1, _MAX_RUN)
                else:
                    if self._run >= _MATCH and i - self._broken_at > _EDIT:
                        self._broken_at, self._broken_behind = i, self._source
                    self._run //= _LEFT_BY_MISS
                self._source += 1
            last = tuple(tokens[i + 1 - _MATCH : i + 1])
            if self._run < _MATCH:
                found = behind.get(last) or self._find_behind_edit(i)
                if found is not None:
                    self._source, self._run = found, _MATCH
            if len(last) == _MATCH:
                behind[last] = i + 1
        self._num_followed = len(tokens)

    def _find_behind_edit(self, i: int) -> int | None:
        """Return where a match goes on that broke off just before token i, by that token alone."""
        if i == self._broken_at or i - self._broken_at > _EDIT:
            return None
        source, tokens = self._broken_behind, self._tokens
        for j in range(source, min(source + _EDIT + 2, i)):
            if tokens[j] == tokens[i]:
                return j + 1
        return None
