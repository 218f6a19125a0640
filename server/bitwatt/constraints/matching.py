"""A compiled grammar and its matchers, without what compiles them.

A model's runner reads this, and runs where llguidance is not installed: there is no grammar then.
"""

import ctypes
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["NOTHING_ALLOWED", "Grammar", "Matcher", "cannot_go_on", "one_line", "why_unusable"]

NOTHING_ALLOWED = "its grammar allows none of the model's tokens here"


_NOT_TOLD = re.compile(r"at \d+\(\d+\): |failed to compile JSON schema: |<non-verbose/>")
_EXCERPT = re.compile(r"<state>|\n +\d+ \| ")


class Matcher(Protocol):
    """Where one answer stands in its grammar.

    is_native  whether a NativeLane can advance it
    """

    @property
    def is_native(self) -> bool: ...

    def advance(self, token_ids: Sequence[int]) -> bytearray:
        """Take the tokens drawn, and return the next one's mask, until the next advance.

        A bit a token of the model's, lowest first, in whole words of 32.

        Raises  ValueError with the reason where it can't go on
        """
        ...

    def copy(self) -> "Matcher":
        """Return one that goes on from here by itself."""
        ...


class Grammar:
    """A compiled grammar. Its matchers share it, and are independent of one another.

    vocab_size     rows of the model's head
    end_token_ids  drawn behind the end by a request that no token ends: they have no text
    no_tokens      the mask that allows nothing
    failure        why it is used no more, once that is so
    """

    def __init__(
        self, matcher: "LLMatcher | None", vocab_size: int, end_token_ids: Sequence[int]
    ) -> None:
        """Begin with llguidance's own; None where new_matcher needs none."""
        self._matcher = matcher
        self._lock = threading.Lock()
        self.vocab_size = vocab_size
        self.end_token_ids = end_token_ids
        self.no_tokens = bytes(4 * (vocab_size // 32 + 1))  # one token more than the model has
        self.failure: str | None = None

    def new_matcher(self, stop_token_ids: Sequence[int], min_tokens: int) -> Matcher:
        """Return a matcher at the grammar's start, in some microseconds.

        stop_token_ids  allowed where the grammar may end, and nowhere else; rows of the head
        min_tokens      before so many tokens it ends where the grammar must alone
        """
        assert self._matcher is not None
        with self._lock:
            matcher = self._matcher.deep_copy()
        return _PythonMatcher(self, matcher, stop_token_ids, min_tokens)


class _PythonMatcher:
    """A Matcher by the library's Python interface."""

    is_native = False

    __slots__ = (
        "_address",
        "_grammar",
        "_matcher",
        "_min_tokens",
        "_must_end",
        "_num_tokens",
        "_own",
        "_stops",
    )

    def __init__(
        self,
        grammar: Grammar,
        matcher: "LLMatcher",
        stop_token_ids: Sequence[int],
        min_tokens: int,
    ) -> None:
        self._grammar = grammar
        self._matcher = matcher
        self._stops = stop_token_ids
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._must_end = False  # the grammar allows nothing but an end
        # Memory of its own: a thread left behind may yet write there.
        self._own = bytearray(len(grammar.no_tokens))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._own))

    def copy(self) -> "_PythonMatcher":
        copied = _PythonMatcher(
            self._grammar, self._matcher.deep_copy(), self._stops, self._min_tokens
        )
        copied._num_tokens, copied._must_end = self._num_tokens, self._must_end
        return copied

    def advance(self, token_ids: Sequence[int]) -> bytearray:
        self._num_tokens += len(token_ids)
        matcher = self._matcher
        for token_id in token_ids:
            if self._must_end or matcher.is_stopped():
                break  # what an ended one is told is its end again
            matcher.consume_token(token_id)
        # Into its own memory: a mask that the library returns takes twice as long.
        matcher.unsafe_compute_mask_ptr(self._address, len(self._own))
        if matcher.is_error():
            raise ValueError(cannot_go_on(matcher.get_error()))
        self._set_ends()
        return self._own

    def _set_ends(self) -> None:
        """Set the bits of tokens that end the answer, where it may end; clear them elsewhere.

        Before min_tokens it may not, unless the grammar allows nothing else.
        """
        mask, nothing = self._own, self._grammar.no_tokens
        end = self._grammar.vocab_size  # the token that stands for all that end an answer
        may_end = bool(mask[end >> 3] >> (end & 7) & 1)
        for token_id in (end, *self._stops):
            mask[token_id >> 3] &= ~(1 << (token_id & 7))
        self._must_end = may_end and mask == nothing
        if may_end:
            ends: Sequence[int] = ()
            if self._must_end:
                ends = (
                    self._stops or self._grammar.end_token_ids
                )  # these without a text: ignore_eos
            elif self._num_tokens >= self._min_tokens:
                ends = self._stops
            for token_id in ends:
                mask[token_id >> 3] |= 1 << (token_id & 7)
        if mask == nothing:
            raise ValueError(NOTHING_ALLOWED)


def cannot_go_on(message: str) -> str:
    """Return what a request is told whose matcher has said so."""
    return f"its grammar can't go on: {one_line(message)}"


def why_unusable(matcher: "LLMatcher") -> str | None:
    """Return in one line why the matcher can't go on, None where it can."""
    return one_line(matcher.get_error()) if matcher.is_error() else None


def one_line(text: str) -> str:
    """Return the library's message without its excerpt of the grammar and its own state."""
    text = _EXCERPT.split(_NOT_TOLD.sub("", text), maxsplit=1)[0]
    return " ".join(text.split())[:300]
