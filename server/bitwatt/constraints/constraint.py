"""Where a request stands in its grammar."""

from collections.abc import Sequence

from bitwatt.constraints.matching import Grammar, Matcher

__all__ = ["Constraint", "Trial"]


class Constraint:
    """Where one request stands in its grammar, and the mask of its next token.

    A MaskThread changes it; others read it once the thread has settled.

    mask     a bit a token of the model's, lowest first, in whole words of 32; it changes with the
             next advance
    failure  why it can't go on, fit for the caller; then the mask has no bits
    """

    __slots__ = ("_grammar", "_matcher", "failure", "mask")

    def __init__(
        self, grammar: Grammar, stop_token_ids: Sequence[int], *, min_tokens: int = 0
    ) -> None:
        """Begin at the grammar's start.

        stop_token_ids  allowed where the grammar may end, and nowhere else
        min_tokens      before so many tokens it ends where the grammar must alone
        """
        stops = [i for i in stop_token_ids if 0 <= i < grammar.vocab_size]
        self._grammar = grammar
        self._matcher = grammar.new_matcher(stops, min_tokens)
        self.failure: str | None = None
        self.mask: bytes | bytearray = grammar.no_tokens

    def fail(self, reason: str) -> None:
        """Allow nothing any more."""
        self.failure = reason
        self.mask = self._grammar.no_tokens

    def advance(self, token_ids: Sequence[int]) -> bytearray:
        """Take the tokens drawn, and return the next one's mask, until the next advance.

        Raises  ValueError with the reason where it can't go on
        """
        return self._matcher.advance(token_ids)

    @property
    def grammar(self) -> Grammar:
        """The grammar it goes by."""
        return self._grammar

    @property
    def matcher(self) -> Matcher:
        """What advances it."""
        return self._matcher

    def trial(self) -> "Trial":
        """Return one that goes on from here by itself, for a thread that has settled."""
        return Trial(self)


class Trial(Constraint):
    """Where drafts would lead a constraint.

    masks  behind each draft that the grammar allows, in order, so far as the thread has come
    """

    __slots__ = ("masks",)

    def __init__(self, constraint: Constraint) -> None:
        self._grammar = constraint._grammar
        self._matcher = constraint._matcher.copy()
        self.failure = constraint.failure
        self.mask = constraint.mask
        self.masks: list[bytes] = []

    def advance(self, token_ids: Sequence[int]) -> bytearray:
        """Take a draft, and return the mask behind it; see Constraint."""
        mask = super().advance(token_ids)
        self.masks.append(bytes(mask))
        return mask
