"""Drafts: guesses of a request's next tokens, looked up in its own prompt and answer.

An answer that rewrites, quotes or continues a pattern says again what stands in the tokens before
it. The drafter looks the last tokens up there, follows what came behind them, and proposes it. The
model then computes all proposed tokens in one step and keeps those that it would have drawn, so a
wrong draft costs time and changes nothing.

How much it drafts follows from what that brings. How often the token is right that a match says
comes next is counted at every token, drafted or not, so that text without repetition is soon left
alone, and text that begins to repeat itself is found again without a trial. A draft is as long as
what it is expected to bring exceeds what its rows add to a step, which StepCost learns from steps.

Source  prompt look-up: Saxena, "Prompt Lookup Decoding", 2023; verification in one step: Leviathan,
        Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023,
        here with the draws themselves in place of a rejection test
"""

from typing import Literal

__all__ = ["MAX_DRAFT_TOKENS", "Drafter", "Speculation", "StepCost"]

Speculation = Literal["ngram", "off"]
"""What drafts: a look-up in prompt and answer, or nothing."""

MAX_DRAFT_TOKENS = 15
"""Of one request in one step: with the token before them they fill 16 rows."""

_MATCH = 3  # tokens looked up together
_MAX_RUN = 16  # trust that a match can earn
_LEFT_BY_MISS = 4  # a wrong token leaves the match a quarter of its trust: it may be an edit
_EDIT = 3  # tokens that an edit puts in, leaves out or replaces at most, for its match to be found
_FIRST_HITS, _FIRST_MISSES = 1.0, 1.0  # a request's matches, before it had any
_KEPT_OF_COUNTS = 1 - 1 / 48  # behind each further token that a match foretold
_WAITING = 0.1  # of a step: a draft is of known tokens, so all wait for the step that runs to end

_PRIOR_FREE_ROWS = 4.0
_MAX_FREE_ROWS = 128.0
_KEPT_OF_STEPS = 1 - 1 / 64


class StepCost:
    """What a step takes by the tokens it computes, learnt from steps: a part that is there anyway,
    and as much for each token.

    free_rows  tokens that take as long as the part that is there anyway
    """

    __slots__ = ("_moments", "free_rows")

    def __init__(self) -> None:
        self._moments = [0.0] * 5  # weight, and sums of x, y, x², xy
        self.free_rows = _PRIOR_FREE_ROWS

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take in a step of few tokens; the latest count most."""
        new = (1.0, num_tokens, seconds, num_tokens**2, num_tokens * seconds)
        kept = zip(self._moments, new, strict=True)
        self._moments = [_KEPT_OF_STEPS * old + one for old, one in kept]
        weight, x, y, xx, xy = self._moments
        spread = weight * xx - x * x
        if spread < 0.5 * weight * weight:
            return  # nearly all of one size: there is nothing to tell
        each = (weight * xy - x * y) / spread
        anyway = (y - each * x) / weight
        if each <= 0:
            self.free_rows = _MAX_FREE_ROWS
        else:
            self.free_rows = min(_MAX_FREE_ROWS, max(1.0, anyway / each))


class Drafter:
    """Follows one request's tokens; the list is the request's own and grows."""

    __slots__ = (
        "_behind",
        "_broken_at",
        "_broken_behind",
        "_hits",
        "_misses",
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
        self._hits, self._misses = _FIRST_HITS, _FIRST_MISSES  # of tokens that a match foretold

    def num_worthwhile(self, *, num_running: int = 1, free_rows: float = _PRIOR_FREE_ROWS) -> int:
        """Return how many of the next tokens are worth guessing, of what is known by now.

        num_running  requests that run meanwhile: they wait for what is drafted, and the more they
                     are, the more of a token's time a draft takes
        free_rows    see StepCost
        """
        self._follow()
        if self._run < _MATCH:
            return 0
        chance = self._hits / (self._hits + self._misses)
        row = num_running / (num_running + free_rows)  # what one adds, in tokens of this step
        best, best_gain = 0, _WAITING * num_running
        gain, reached = 0.0, 1.0
        for num_drafted in range(1, min(MAX_DRAFT_TOKENS, self._run + 1) + 1):
            reached *= chance
            gain += reached - row
            if gain > best_gain:
                best, best_gain = num_drafted, gain
            if reached < row:
                break
        return best

    def draft(self, count: int) -> list[int]:
        """Return guesses of the next tokens, in order; none where nothing matches.

        A guess that comes to the end of what is known goes on with itself: a pattern repeats.
        """
        self._follow()
        if self._run < _MATCH:
            return []
        tokens, source = self._tokens, self._source
        draft = tokens[source : source + count]
        period = len(tokens) - source
        while len(draft) < count:
            draft.append(draft[-period])
        return draft

    def _follow(self) -> None:
        """Take in the tokens that have come."""
        tokens, behind = self._tokens, self._behind
        if not self._num_followed:
            self._num_followed = len(tokens) - 1
            starts = (tokens[i:-1] for i in range(_MATCH))
            behind.update(zip(zip(*starts, strict=False), range(_MATCH, len(tokens)), strict=False))
        for i in range(self._num_followed, len(tokens)):
            if self._run:
                is_hit = tokens[self._source] == tokens[i]
                if self._run >= _MATCH:
                    self._hits = _KEPT_OF_COUNTS * self._hits + is_hit
                    self._misses = _KEPT_OF_COUNTS * self._misses + (not is_hit)
                if is_hit:
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
