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
_ROWS_A_TOKEN = 4  # drafted tokens that cost about as much as a token drawn alone
_FIRST_BALANCE, _MAX_BALANCE = 3.0, 8.0  # tokens; what a request may lose before it is asked more


class Drafter:
    """Follows one request's tokens; the list is the request's own and grows."""

    __slots__ = ("_balance", "_behind", "_num_followed", "_run", "_source", "_tokens")

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._behind: dict[tuple[int, ...], int] = {}  # where what followed so many tokens lies
        self._num_followed = 0
        self._source = 0  # where the guess of the next token lies, if anything matches
        self._run = 0  # tokens that have agreed
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

    def book(self, num_drafted: int, num_accepted: int) -> None:
        """Take in what a verification has brought."""
        cost = 1 + num_drafted / _ROWS_A_TOKEN
        self._balance = min(_MAX_BALANCE, self._balance + num_accepted - cost)

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
                    self._run //= _LEFT_BY_MISS
                self._source += 1
            last = tuple(tokens[i + 1 - _MATCH : i + 1])
            if self._run < _MATCH:
                found = behind.get(last)
                if found is not None:
                    self._source, self._run = found, _MATCH
            if len(last) == _MATCH:
                behind[last] = i + 1
        self._num_followed = len(tokens)
