"""Advances native matchers by the tokens a step has drawn, in a thread of the kernels' library.

It needs no interpreter: it begins while the step's thread still has the interpreter's lock (GIL).
The native backend has it done by one of the threads that wait for the next step's layers.
"""

from collections.abc import Callable, Mapping
from typing import cast

from bitwatt_kernels.cpu.token_masks import MaskBatch, MaskLane, MatcherCalls
from torch import Tensor

from bitwatt.constraints.constraint import Constraint
from bitwatt.constraints.matching import Grammar
from bitwatt.constraints.native import NativeMatcher, native_calls
from bitwatt.constraints.watch import MaskWatch, give_up

__all__ = ["NativeLane", "NewLane"]

NewLane = Callable[[MatcherCalls], MaskLane]
_Constrained = Mapping[int, Constraint]  # by the index of its token


class NativeLane:
    """One batch at a time, until one is stuck; only its owner's lock lets others in."""

    def __init__(self, new_lane: NewLane | None = None) -> None:
        """Begin without a batch; new_lane is a backend's, else the lane has a thread of its own."""
        calls = native_calls()
        assert calls is not None, "there are native matchers"
        self._lane = (new_lane or MaskLane)(calls)
        self._watch = MaskWatch()
        self._constrained: _Constrained = {}
        self._batch: MaskBatch | None = None  # of those; None where Python is to advance one
        self._grammars: set[Grammar] = set()
        self._tokens: Tensor | None = None
        self._stuck_row = -1

    def start(self, constrained: _Constrained, tokens: Tensor) -> bool:
        """Begin a batch, the one before being done; return whether all its matchers are native.

        tokens  [R] int64, on the host; below 0 where none was drawn
        """
        is_known = constrained == self._constrained and self._batch is not None
        if not is_known or any(grammar.failure for grammar in self._grammars):
            self._constrained, self._batch = constrained, _batch_of(constrained)
            self._grammars = {constraint.grammar for constraint in constrained.values()}
        if self._batch is None:
            return False
        self._tokens = tokens
        self._watch = MaskWatch()
        self._lane.start(self._batch, tokens)
        return True

    def is_idle(self, wait_s: float) -> bool:
        """Return whether the batch is done, by then; its failures are noted."""
        num_failed = self._lane.wait(wait_s)
        if num_failed:
            self._batch = None
            for constraint in self._constrained.values():
                reason = cast(NativeMatcher, constraint.matcher).failure()
                if constraint.failure is None and reason is not None:
                    constraint.fail(reason)
        return num_failed is not None

    def is_stuck(self) -> bool:
        """Whether the mask under way was so at an earlier look, and has taken too long since."""
        self._stuck_row, cpu_s = self._lane.look()
        is_begun = 0 <= self._stuck_row < len(self._constrained)
        return is_begun and self._watch.is_over(self._stuck_row, cpu_s)

    def replaced(self) -> "NativeLane":
        """Give the mask up that was stuck; return a lane that does what is left."""
        if not self._lane.give_up(self._stuck_row):
            return self  # it is done by now
        self._lane.end()
        (_, stuck), *left = [*self._constrained.items()][self._stuck_row :]
        give_up(stuck)
        lane = NativeLane()  # a thread of the backend's may be what is stuck
        same = [c for _, c in left if c.grammar.failure is not None]
        for constraint in same:
            constraint.fail(constraint.grammar.failure or "")
        others = {i: c for i, c in left if c not in same}
        if others and self._tokens is not None:
            lane.start(others, self._tokens)
        return lane

    def end(self) -> None:
        """Let the thread go."""
        self._lane.end()


def _batch_of(constrained: _Constrained) -> MaskBatch | None:
    matchers = [c.matcher for c in constrained.values() if c.grammar.failure is None]
    native = [matcher for matcher in matchers if isinstance(matcher, NativeMatcher)]
    if len(native) < len(constrained):
        return None
    return MaskBatch([matcher.row for matcher in native], [*constrained], native)
