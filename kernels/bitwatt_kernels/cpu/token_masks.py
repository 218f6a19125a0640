"""Token masks by matchers of another library, computed in threads that need no interpreter.

That library's functions are known by address, and advance a matcher and compute its mask as
csrc/token_masks.h says. Rows are MatchedRow structures, which stay where they are.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from bitwatt_kernels.cpu.abi import MatchedRow, MatcherCalls
from bitwatt_kernels.cpu.library import load_library

__all__ = ["MaskBatch", "MaskLane", "MatchedRow", "MatcherCalls", "advance"]


def advance(calls: MatcherCalls, row: MatchedRow, token_ids: Sequence[int]) -> None:
    """Have the row take its tokens, and its next mask computed; its status says how that went."""
    tokens = (ctypes.c_int64 * len(token_ids))(*token_ids)
    load_library().bw_advance(ctypes.byref(calls), ctypes.byref(row), tokens, len(token_ids))


class MaskBatch:
    """Rows that take one token each, of those a step draws."""

    def __init__(self, rows: Sequence[MatchedRow], where: Sequence[int], owners: object) -> None:
        """Begin with rows, at which index the token of each is, and what their memory is of."""
        self.num_rows = len(rows)
        self.rows = (ctypes.c_void_p * len(rows))(*(ctypes.addressof(row) for row in rows))
        self.where = (ctypes.c_int32 * len(rows))(*where)
        self._owners = (tuple(rows), owners)


@cache
def _library_with_gil() -> ctypes.PyDLL:
    """Return the library for what takes so short that to let go of the GIL would take longer.

    Another thread that wants it would have it, and keep it while this one has to go on.
    """
    library = load_library()
    same = ctypes.PyDLL(library._name)
    for name in ("bw_lane_start", "bw_lane_wait"):
        function = getattr(library, name)
        getattr(same, name).argtypes, getattr(same, name).restype = (
            function.argtypes,
            function.restype,
        )
    return same


_given_up: list[object] = []  # what threads that were left may yet write to, for good


class MaskLane:
    """Advances one batch after another, beside its caller. End it once; it is used no more then."""

    def __init__(self, calls: MatcherCalls, context: ctypes.c_void_p | None = None) -> None:
        """Begin without a batch.

        calls    what advances the rows
        context  a backend's, whose threads take a batch when they have nothing else to do; without
                 one, or where it has no thread but its caller's, the lane has one of its own
        """
        self._library = load_library()
        self._lane = self._library.bw_lane_create(ctypes.byref(calls), context)
        self._busy: tuple[MaskBatch, Tensor] | None = None
        self._num_begun = 0  # until the batch under way

    @property
    def is_busy(self) -> bool:
        """Whether a batch was begun and wait has not said yet that it is done."""
        return self._busy is not None

    def start(self, batch: MaskBatch, tokens: Tensor) -> None:
        """Begin a batch while no other is under way; tokens [R] int64, on the host."""
        self._busy = (batch, tokens)
        _library_with_gil().bw_lane_start(
            self._lane, batch.rows, batch.where, tokens.data_ptr(), batch.num_rows
        )

    def wait(self, seconds: float) -> int | None:
        """Return how many of the batch's rows can't go on; None where it isn't done by then."""
        if self._busy is None:
            return 0
        num_failed: int = _library_with_gil().bw_lane_wait(self._lane, 0.0)
        if num_failed < 0:
            num_failed = self._library.bw_lane_wait(self._lane, seconds)
        if num_failed < 0:
            return None
        self._num_begun += self._busy[0].num_rows + 1
        self._busy = None
        return num_failed

    def look(self) -> tuple[int, float]:
        """Return the batch's row under way, -1 before the first, and its thread's CPU time."""
        cpu_s = ctypes.c_double()
        num_begun = self._library.bw_lane_look(self._lane, ctypes.byref(cpu_s))
        return num_begun - self._num_begun - 1, cpu_s.value

    def give_up(self, row: int) -> bool:
        """Leave the batch where the row is still under way: no other is begun. Return whether."""
        if not self._library.bw_lane_give_up(self._lane, self._num_begun + row + 1):
            return False
        _given_up.append(self._busy)
        return True

    def end(self) -> None:
        """End the thread, where a batch was given up once its row is done."""
        self._library.bw_lane_end(self._lane)
