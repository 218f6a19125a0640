"""Token masks, computed beside a step: what each constrained request's next token may be.

Matchers are advanced and asked in threads of their own, while the step's layers run: by the tokens
that a step has drawn in one without the interpreter (native_lane.py), and else in one of Python's.
A request whose mask takes more than MASK_TIME_LIMIT_S of processor time is given up alone, its
thread left to end by itself, and another does the rest.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

from bitwatt.constraints.constraint import Constraint
from bitwatt.constraints.watch import LOOK_S, MaskWatch, give_up

if TYPE_CHECKING:  # it needs torch, which whoever gives tokens as a tensor has
    from torch import Tensor

    from bitwatt.constraints.native_lane import NativeLane, NewLane

__all__ = ["MaskThread"]


_Asked = tuple[Constraint, Sequence[int]]


class MaskThread:
    """Advances constraints in the order it was asked to. ask and settle are safe in any thread."""

    def __init__(self, new_lane: "NewLane | None" = None) -> None:
        """Begin without a thread; new_lane as NativeLane takes it."""
        self._new_lane = new_lane
        self._lock = threading.Lock()
        self._lane: _Lane | None = None
        self._native: NativeLane | None = None

    def start(self, constrained: Mapping[int, Constraint], tokens: "Tensor") -> bool:
        """Have each constraint take its token of a step's, and its next mask computed, natively.

        Returns whether that was begun: else they are to be asked for.

        constrained  by the index of its token
        tokens       [R] int64, on the host; below 0 where none was drawn
        """
        with self._lock:
            if self._native is None:
                if not all(constraint.matcher.is_native for constraint in constrained.values()):
                    return False
                from bitwatt.constraints.native_lane import NativeLane

                self._native = NativeLane(self._new_lane)
            self._settle_native()
            return self._native.start(constrained, tokens)

    def _settle_native(self) -> None:
        while (lane := self._native) is not None and not lane.is_idle(LOOK_S):
            if lane.is_stuck():
                self._native = lane.replaced()

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
            while lane is not None and not (lane.is_idle.is_set() or lane.is_idle.wait(LOOK_S)):
                if lane.is_stuck():
                    lane = self._lane = lane.replaced()
            self._settle_native()

    def close(self) -> None:
        """End the thread once it has done what it was asked."""
        with self._lock:
            if self._lane is not None:
                self._lane.end()
                self._lane = None
            if self._native is not None:
                self._settle_native()
                self._native.end()
                self._native = None


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
        self._watch = MaskWatch()
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
        """Whether the mask under way was so at an earlier look, and has taken too long since."""
        with self._guard:
            if self._current is None or self._thread.ident is None:
                return False
            clock = time.pthread_getcpuclockid(self._thread.ident)
            return self._watch.is_over(self._number, time.clock_gettime(clock))

    def replaced(self) -> "_Lane":
        """Give the mask under way up; return a lane that does what is left."""
        with self._guard:
            if self._current is None:
                return self
            self._is_given_up = True
            give_up(self._current)
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
