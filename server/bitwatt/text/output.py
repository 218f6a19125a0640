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

    __slots__ = (
        "_detokenizer",
        "_matcher",
        "_num_exempt",
        "_stop_token_ids",
        "_vocabulary",
        "num_unused",
    )

    def __init__(
        self,
        vocabulary: Vocabulary,
        stops: Sequence[str],
        *,
        min_tokens: int = 0,
        spelled: Sequence[str] = (),
    ) -> None:
        """Begin a text.

        stops       strings that end the text, and aren't of it; one that is a special token's
                    ends it at that token, which has no text of its own
        min_tokens  none of which a stop string ends the text at
        spelled     special tokens that are text here, for a parser to see
        """
        self._detokenizer = Detokenizer(vocabulary, spelled=spelled)
        self._matcher = StopMatcher(stops) if stops else None
        self._vocabulary = vocabulary
        self._stop_token_ids = vocabulary.special_ids(stops)
        self._num_exempt = min_tokens
        self.num_unused = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._matcher is not None and self._matcher.stopped

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text; None where none did."""
        return None if self._matcher is None else self._matcher.matched

    @property
    def holds_back(self) -> bool:
        """Whether tokens have text that isn't certain yet."""
        return self._detokenizer.holds_back or (
            self._matcher is not None and self._matcher.holds_back
        )

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
            is_exempt = self._num_exempt > 0
            pieces.append(matcher.push(self._detokenizer.push((token_id,)), may_stop=not is_exempt))
            if is_exempt:
                self._num_exempt -= 1
            elif token_id in self._stop_token_ids and not matcher.stopped:
                held = matcher.push(self._detokenizer.finish())
                pieces.append(held + matcher.stop(self._vocabulary.spell(token_id)))
            self.num_unused -= 1
        return "".join(pieces)

    def finish(self) -> str:
        """Return the rest of the text; no more tokens come."""
        text = self._detokenizer.finish()
        if self._matcher is None:
            return text
        return self._matcher.push(text) + self._matcher.finish()
