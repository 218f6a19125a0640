"""Token masks, computed beside a step: what each constrained request's next token may be.

Matchers are advanced and asked in a thread of their own, while the step's layers run. llguidance's
limits bound a mask's time but loosely, so a request whose mask takes more than MASK_TIME_LIMIT_S of
processor time is given up alone, its thread left to end by itself, and another does the rest.
"""

import ctypes
import logging
import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue

from bitwatt.constraints.matching import Grammar, why_unusable

__all__ = ["MASK_TIME_LIMIT_S", "Constraint", "MaskThread", "Trial"]

MASK_TIME_LIMIT_S = 0.05  # of processor time, a thousand times what a JSON schema's takes
_LONGEST_WAIT_S = 5.0  # for a thread that works on a mask and gets no processor time for it
_LOOK_S = 0.01  # from one look at the mask under way to the next

logger = logging.getLogger(__name__)


class Constraint:
    """Where one request stands in its grammar, and the mask of its next token.

    A MaskThread changes it; others read it once the thread has settled.

    mask     a bit a token of the model's, lowest first, in whole words of 32; it changes with the
             next advance
    failure  why it can't go on, fit for the caller; then the mask has no bits
    """

    __slots__ = (
        "_address",
        "_grammar",
        "_matcher",
        "_min_tokens",
        "_must_end",
        "_num_tokens",
        "_own",
        "_stops",
        "failure",
        "mask",
    )

    def __init__(
        self, grammar: Grammar, stop_token_ids: Sequence[int], *, min_tokens: int = 0
    ) -> None:
        """Begin at the grammar's start.

        stop_token_ids  allowed where the grammar may end, and nowhere else
        min_tokens      before so many tokens it ends where the grammar must alone
        """
        self._grammar = grammar
        self._matcher = grammar.new_matcher()
        self._stops = [i for i in stop_token_ids if 0 <= i < grammar.vocab_size]
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._must_end = False  # the grammar allows nothing but an end
        self._allocate()
        self.failure: str | None = None
        self.mask: bytes | bytearray = grammar.no_tokens

    def _allocate(self) -> None:
        """Get memory of its own for masks: a thread left behind may yet write there."""
        self._own = bytearray(len(self._grammar.no_tokens))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._own))

    def fail(self, reason: str) -> None:
        """Allow nothing any more."""
        self.failure = reason
        self.mask = self._grammar.no_tokens

    def advance(self, token_ids: Sequence[int]) -> bytearray:
        """Take the tokens drawn, and return the next one's mask, until the next advance.

        Raises  ValueError with the reason where it can't go on
        """
        self._num_tokens += len(token_ids)
        matcher = self._matcher
        for token_id in token_ids:
            if self._must_end or matcher.is_stopped():
                break  # what an ended one is told is its end again
            matcher.consume_token(token_id)
        # Into its own memory: a mask that the library returns takes twice as long.
        matcher.unsafe_compute_mask_ptr(self._address, len(self._own))
        if matcher.is_error():
            raise ValueError(f"its grammar can't go on: {why_unusable(matcher)}")
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
            raise ValueError("its grammar allows none of the model's tokens here")

    @property
    def grammar(self) -> Grammar:
        """The grammar it goes by."""
        return self._grammar

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
        self._matcher = constraint._matcher.deep_copy()
        self._stops = constraint._stops
        self._min_tokens = constraint._min_tokens
        self._num_tokens = constraint._num_tokens
        self._must_end = constraint._must_end
        self._allocate()
        self.failure = constraint.failure
        self.mask = constraint.mask
        self.masks: list[bytes] = []

    def advance(self, token_ids: Sequence[int]) -> bytearray:
        """Take a draft, and return the mask behind it; see Constraint."""
        mask = super().advance(token_ids)
        self.masks.append(bytes(mask))
        return mask


_Asked = tuple[Constraint, Sequence[int]]


class MaskThread:
    """Advances constraints in the order it was asked to. ask and settle are safe in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lane: _Lane | None = None

    def ask(self, asked: Sequence[_Asked]) -> None:
        """Have each constraint take its tokens, and its next mask computed."""
        if not asked:
            return
        with self._lock:
            if self._lane is None:
                self._lane = _Lane()
            self._lane.put(asked)

    def settle(self) -> None:
        """Wait until all that was asked is done, or given up."""
        with self._lock:
            lane = self._lane
            while lane is not None and not (lane.is_idle.is_set() or lane.is_idle.wait(_LOOK_S)):
                if lane.is_stuck():
                    lane = self._lane = lane.replaced()

    def close(self) -> None:
        """End the thread once it has done what it was asked."""
        with self._lock:
            if self._lane is not None:
                self._lane.end()
                self._lane = None


class _Lane:
    """A thread and what it was asked, until it is stuck; only its owner's lock lets others in."""

    def __init__(self) -> None:
        self.is_idle = threading.Event()
        self.is_idle.set()
        self._queue: SimpleQueue[Sequence[_Asked] | None] = SimpleQueue()
        self._guard = threading.Lock()
        self._num_left = 0
        self._is_given_up = False
        self._current: Constraint | None = None
        self._asked: Sequence[_Asked] = ()  # together with the current one
        self._num_begun = 0  # of them
        self._number = 0  # of the mask under way, among all it was ever asked for
        self._seen = 0  # the number at the look that the clocks were read at
        self._seen_cpu_s = 0.0
        self._seen_s = 0.0
        self._thread = threading.Thread(target=self._serve, name="masks", daemon=True)
        self._thread.start()

    def put(self, asked: Sequence[_Asked]) -> None:
        with self._guard:
            self._num_left += len(asked)
            self.is_idle.clear()
        self._queue.put(asked)

    def end(self) -> None:
        self._queue.put(None)

    def is_stuck(self) -> bool:
        """Whether the mask under way was so at an earlier look, and has taken too long since.

        Only who waits looks at clocks: to note when each mask begins would cost half as much again.
        """
        with self._guard:
            if self._current is None or self._thread.ident is None:
                return False
            clock = time.pthread_getcpuclockid(self._thread.ident)
            cpu_s, now_s = time.clock_gettime(clock), time.monotonic()
            if self._number != self._seen:
                self._seen, self._seen_cpu_s, self._seen_s = self._number, cpu_s, now_s
            spent_s, waited_s = cpu_s - self._seen_cpu_s, now_s - self._seen_s
            return spent_s > MASK_TIME_LIMIT_S or waited_s > _LONGEST_WAIT_S

    def replaced(self) -> "_Lane":
        """Give the mask under way up; return a lane that does what is left."""
        with self._guard:
            if self._current is None:
                return self
            self._is_given_up = True
            told = (
                f"a mask of its grammar took more than {1000 * MASK_TIME_LIMIT_S:.0f} ms; "
                "that is the limit"
            )
            logger.warning("a request is given up: %s", told)
            self._current.grammar.failure = told
            self._current.fail(told)
            left = [*self._asked[self._num_begun :]]
            while not self._queue.empty():
                if (asked := self._queue.get()) is not None:
                    left += asked
            self._queue.put(None)
        lane = _Lane()
        if left:
            lane.put(left)
        return lane

    def _serve(self) -> None:
        while (asked := self._queue.get()) is not None:
            with self._guard:
                self._begin(asked, 0)
            for number, (constraint, token_ids) in enumerate(asked, start=1):
                reason, mask = constraint.failure or constraint.grammar.failure, None
                if reason is None:
                    try:
                        mask = constraint.advance(token_ids)
                    except BaseException as error:  # a panic of the library's is one too
                        reason = str(error) or type(error).__name__
                with self._guard:
                    if self._is_given_up:
                        return
                    if mask is not None:
                        constraint.mask = mask
                    else:
                        constraint.fail(reason or "")
                    self._num_left -= 1
                    self._begin(asked, number)
                    if not self._num_left:
                        self.is_idle.set()

    def _begin(self, asked: Sequence[_Asked], number: int) -> None:
        """Note which is worked on from now on, if one is left."""
        self._current = None
        if number < len(asked):
            self._current, self._asked, self._num_begun = asked[number][0], asked, number + 1
            self._number += 1
