"""A choice's text: detokenized, ended at a stop string."""

from collections.abc import Sequence

from bitwatt.text.detokenizer import Detokenizer
from bitwatt.text.stops import StopMatcher
from bitwatt.text.vocabulary import Vocabulary

__all__ = ["OutputText"]


class OutputText:
    """The text of one choice, from its tokens as they come.

    num_unused  tokens of the last push that came after the one that completed a stop string
    """

    __slots__ = ("_detokenizer", "_matcher", "num_unused")

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(vocabulary)
        self._matcher = StopMatcher(stops) if stops else None
        self.num_unused = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._matcher is not None and self._matcher.stopped

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that is certain now; after a stop string there is none."""
        matcher = self._matcher
        if matcher is None:
            return self._detokenizer.push(token_ids)
        pieces = []
        self.num_unused = len(token_ids)
        for token_id in token_ids:
            if matcher.stopped:
                break
            pieces.append(matcher.push(self._detokenizer.push((token_id,))))
            self.num_unused -= 1
        return "".join(pieces)

    def finish(self) -> str:
        """Return the rest of the text; no more tokens come."""
        text = self._detokenizer.finish()
        if self._matcher is None:
            return text
        return self._matcher.push(text) + self._matcher.finish()
