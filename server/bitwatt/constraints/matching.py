"""A compiled grammar and its matchers, without what compiles them.

A model's runner reads this, and runs where llguidance is not installed: there is no grammar then.
"""

import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["Grammar", "one_line", "why_unusable"]

_NOT_TOLD = re.compile(r"at \d+\(\d+\): |failed to compile JSON schema: |<non-verbose/>")
_EXCERPT = re.compile(r"<state>|\n +\d+ \| ")


class Grammar:
    """A compiled grammar. Its matchers share it, and are independent of one another.

    vocab_size     rows of the model's head
    end_token_ids  drawn behind the end by a request that no token ends: they have no text
    no_tokens      the mask that allows nothing
    failure        why it is used no more, once that is so
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._lock = threading.Lock()
        self.vocab_size = vocab_size
        self.end_token_ids = end_token_ids
        self.no_tokens = bytes(4 * (vocab_size // 32 + 1))  # one token more than the model has
        self.failure: str | None = None

    def new_matcher(self) -> "LLMatcher":
        """Return a matcher at the grammar's start, in some microseconds."""
        with self._lock:
            return self._matcher.deep_copy()


def why_unusable(matcher: "LLMatcher") -> str | None:
    """Return in one line why the matcher can't go on, None where it can."""
    return one_line(matcher.get_error()) if matcher.is_error() else None


def one_line(text: str) -> str:
    """Return the library's message without its excerpt of the grammar and its own state."""
    text = _EXCERPT.split(_NOT_TOLD.sub("", text), maxsplit=1)[0]
    return " ".join(text.split())[:300]
